// A compiled kernel that came as text: its launch parameters, and its way onto the device through the driver API.

#pragma once

#include <cuda.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace trimtab
{

// One kernel of the attribute "kernels": "entry rows columns threads shared_bytes dtype\n", then its PTX.
struct Kernel
{
    std::string entry;
    int64_t rows{};
    int64_t columns{};
    uint32_t threads{};
    uint32_t sharedBytes{};
    std::string dtype;
    std::string ptx;

    // Blocks that cover down x across, or 0 where no grid is that large.
    uint32_t programs(int64_t down, int64_t across) const noexcept;
};

// The kernels of an attribute, which form feeds separate; empty where the text is none of ours.
std::vector<Kernel> readKernels(std::string const& text);

// A kernel that is loaded into one CUDA context. The same PTX is loaded once, however many layers bring it.
class Loaded
{
public:
    // Null where the driver is missing or refuses the kernel.
    static std::shared_ptr<Loaded> get(Kernel const& kernel);

    // False where the driver refuses the launch.
    bool launch(uint32_t programs, void** arguments, CUstream stream) const noexcept;

    ~Loaded();

private:
    Loaded() = default;

    CUmodule mModule{};
    CUfunction mFunction{};
    uint32_t mThreads{};
    uint32_t mSharedBytes{};
};

} // namespace trimtab
