// A driver that writes down what it is asked: built as libcuda.so.1 and found in place of the real one.

#include <cstdio>
#include <cstring>
#include <cuda.h>

namespace
{
// Stand for functions, and are how many inputs each has; both have four scalars and one output.
constexpr long kMatMul = 5;
constexpr long kDecode = 3;
} // namespace

extern "C"
{

CUresult cuCtxGetCurrent(CUcontext* context)
{
    *context = reinterpret_cast<CUcontext>(0x10);
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, void const* image)
{
    std::printf("load %.8s\n", static_cast<char const*>(image));
    *module = reinterpret_cast<CUmodule>(0x20);
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule)
{
    std::printf("unload\n");
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule, char const* name)
{
    std::printf("function %s\n", name);
    *function = reinterpret_cast<CUfunction>(std::strcmp(name, "vq_decode") == 0 ? kDecode : kMatMul);
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value)
{
    std::printf("attribute %d %d\n", static_cast<int>(attribute), value);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
    unsigned shared, CUstream stream, void** arguments, void**)
{
    long const inputs = reinterpret_cast<long>(function);
    std::printf("launch %u %u %u threads %u shared %u stream %p:", x, y, z, threads, shared, static_cast<void*>(stream));
    for (long i = 0; i < inputs + 5; ++i)
    {
        bool const scalar = i >= inputs && i < inputs + 4;
        std::printf(scalar ? " %d" : " %#x", scalar ? *static_cast<int*>(arguments[i])
                                                    : static_cast<int>(reinterpret_cast<long>(*static_cast<void**>(arguments[i]))));
    }
    std::printf("\n");
    return CUDA_SUCCESS;
}
}
