#include "kernel.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <sstream>
#include <tuple>

namespace trimtab
{
namespace
{

// What a launch may have without asking: CUDA C++ Programming Guide, shared memory.
constexpr uint32_t kStaticLimit = 48 * 1024;

// The driver's functions. They are looked up and not linked, so that the library builds where there is no driver.
struct Driver
{
    decltype(&cuCtxGetCurrent) ctxGetCurrent{};
    decltype(&cuModuleLoadData) moduleLoadData{};
    decltype(&cuModuleUnload) moduleUnload{};
    decltype(&cuModuleGetFunction) moduleGetFunction{};
    decltype(&cuFuncSetAttribute) funcSetAttribute{};
    decltype(&cuLaunchKernel) launchKernel{};
    bool whole{};

    Driver()
    {
        void* library = dlopen("libcuda.so.1", RTLD_NOW);
        whole = library != nullptr && find(library, "cuCtxGetCurrent", ctxGetCurrent)
            && find(library, "cuModuleLoadData", moduleLoadData) && find(library, "cuModuleUnload", moduleUnload)
            && find(library, "cuModuleGetFunction", moduleGetFunction)
            && find(library, "cuFuncSetAttribute", funcSetAttribute) && find(library, "cuLaunchKernel", launchKernel);
    }

    template <typename Function>
    static bool find(void* library, char const* name, Function& function)
    {
        function = reinterpret_cast<Function>(dlsym(library, name));
        return function != nullptr;
    }

    static Driver const& get()
    {
        static Driver const driver;
        return driver;
    }
};

} // namespace

uint32_t Kernel::programs(int64_t down, int64_t across) const noexcept
{
    int64_t const total = ((down + rows - 1) / rows) * ((across + columns - 1) / columns);
    return total > 0 && total <= INT32_MAX ? static_cast<uint32_t>(total) : 0;
}

std::vector<Kernel> readKernels(std::string const& text)
{
    std::vector<Kernel> kernels;
    std::istringstream parts(text);
    for (std::string part; std::getline(parts, part, '\f');)
    {
        Kernel kernel;
        size_t const end = part.find('\n');
        std::istringstream line(part.substr(0, end));
        line >> kernel.entry >> kernel.rows >> kernel.columns >> kernel.threads >> kernel.sharedBytes >> kernel.dtype;
        bool const sound = line && line.peek() == EOF && kernel.rows > 0 && kernel.rows <= INT32_MAX
            && kernel.columns > 0 && kernel.columns <= INT32_MAX && kernel.threads > 0 && kernel.threads <= 1024
            && kernel.sharedBytes <= INT32_MAX && end != std::string::npos
            && part.find(".entry " + kernel.entry + "(", end) != std::string::npos;
        if (!sound)
        {
            return {};
        }
        kernel.ptx = part.substr(end + 1);
        kernels.push_back(std::move(kernel));
    }
    return kernels;
}

std::shared_ptr<Loaded> Loaded::get(Kernel const& kernel)
{
    static std::mutex mutex;
    static std::map<std::tuple<CUcontext, std::string>, std::weak_ptr<Loaded>> known;

    Driver const& driver = Driver::get();
    CUcontext context{};
    if (!driver.whole || driver.ctxGetCurrent(&context) != CUDA_SUCCESS || context == nullptr)
    {
        return nullptr;
    }
    std::lock_guard<std::mutex> const lock(mutex);
    auto& place = known[{context, kernel.ptx}];
    if (auto loaded = place.lock())
    {
        return loaded;
    }
    std::shared_ptr<Loaded> loaded(new Loaded);
    loaded->mThreads = kernel.threads;
    loaded->mSharedBytes = kernel.sharedBytes;
    bool const sound = driver.moduleLoadData(&loaded->mModule, kernel.ptx.c_str()) == CUDA_SUCCESS
        && driver.moduleGetFunction(&loaded->mFunction, loaded->mModule, kernel.entry.c_str()) == CUDA_SUCCESS
        && (kernel.sharedBytes <= kStaticLimit
            || driver.funcSetAttribute(loaded->mFunction, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                   static_cast<int>(kernel.sharedBytes))
                == CUDA_SUCCESS);
    if (!sound)
    {
        return nullptr;
    }
    place = loaded;
    return loaded;
}

bool Loaded::launch(uint32_t programs, void** arguments, CUstream stream) const noexcept
{
    return programs > 0
        && Driver::get().launchKernel(
               mFunction, programs, 1, 1, mThreads, 1, 1, mSharedBytes, stream, arguments, nullptr)
        == CUDA_SUCCESS;
}

Loaded::~Loaded()
{
    if (mModule != nullptr)
    {
        Driver::get().moduleUnload(mModule);
    }
}

} // namespace trimtab
