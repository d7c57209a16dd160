// The two operators as one class: what TensorRT asks of a plugin while it builds, and while it runs.

#pragma once

#include "kernel.h"

#include <NvInferRuntime.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace trimtab
{

using namespace nvinfer1;

constexpr char const* kNamespace = "trimtab";
constexpr char const* kVersion = "1";
constexpr char const* kMatMul = "TrimtabVQMatMul1";
constexpr char const* kDecode = "TrimtabVQDecode1";

// Inputs and outputs, in order. A product has all of the first row, a decoder words, codebook, scale and its output.
enum class Role
{
    kHalf, // x, codebook, bias and every output: fp16 or bf16, as the kernels say
    kWords,
    kScale
};

inline std::vector<Role> rolesOf(bool decode)
{
    return decode ? std::vector<Role>{Role::kWords, Role::kHalf, Role::kScale, Role::kHalf}
                  : std::vector<Role>{Role::kHalf, Role::kWords, Role::kHalf, Role::kScale, Role::kHalf, Role::kHalf};
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime
{
public:
    Plugin(bool decode, std::string kernels, std::vector<int32_t> shape)
        : mDecode{decode}
        , mText{std::move(kernels)}
        , mShape{std::move(shape)}
        , mKernels{readKernels(mText)}
        , mRoles{rolesOf(decode)}
    {
        mFields.emplace_back("kernels", mText.data(), PluginFieldType::kCHAR, static_cast<int32_t>(mText.size()));
        if (decode)
        {
            mFields.emplace_back(
                "shape", mShape.data(), PluginFieldType::kINT32, static_cast<int32_t>(mShape.size()));
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        mCacheId = std::string(kVersion) + "_" + std::to_string(std::hash<std::string>{}(mText));
    }

    // Whether the fields describe something that can run.
    bool sound() const noexcept
    {
        if (mKernels.empty())
        {
            return false;
        }
        for (auto const& kernel : mKernels)
        {
            if (kernel.dtype != mKernels[0].dtype || (kernel.dtype != "fp16" && kernel.dtype != "bf16"))
            {
                return false;
            }
        }
        bool positive = mShape.size() <= Dims::MAX_DIMS;
        for (int32_t const size : mShape)
        {
            positive = positive && size > 0;
        }
        return positive && (!mDecode || mShape.size() >= 2);
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override
    {
        try
        {
            auto* copy = new Plugin(mDecode, mText, mShape);
            copy->mTactic = mTactic;
            return copy;
        }
        catch (...)
        {
            return nullptr;
        }
    }

    AsciiChar const* getPluginName() const noexcept override
    {
        return mDecode ? kDecode : kMatMul;
    }

    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVersion;
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kNamespace;
    }

    // ---- build ----

    int32_t getNbOutputs() const noexcept override
    {
        return 1;
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t nbInputs, DynamicPluginTensorDesc const*,
        int32_t nbOutputs) noexcept override
    {
        return nbOutputs == 1 && nbInputs + 1 == static_cast<int32_t>(mRoles.size()) ? 0 : 1;
    }

    bool supportsFormatCombination(
        int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept override
    {
        if (nbInputs + nbOutputs != static_cast<int32_t>(mRoles.size()) || pos >= nbInputs + nbOutputs)
        {
            return false;
        }
        auto const& desc = inOut[pos].desc;
        return desc.format == TensorFormat::kLINEAR && desc.type == typeOf(mRoles[pos]);
    }

    int32_t getOutputDataTypes(
        DataType* outputTypes, int32_t nbOutputs, DataType const*, int32_t) const noexcept override
    {
        if (nbOutputs != 1)
        {
            return 1;
        }
        outputTypes[0] = typeOf(Role::kHalf);
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
        int32_t nbOutputs, IExprBuilder& builder) noexcept override
    {
        if (nbOutputs != 1 || nbInputs + 1 != static_cast<int32_t>(mRoles.size()))
        {
            return 1;
        }
        if (mDecode)
        {
            outputs[0].nbDims = static_cast<int32_t>(mShape.size());
            for (size_t i = 0; i < mShape.size(); ++i)
            {
                outputs[0].d[i] = builder.constant(mShape[i]);
            }
            return 0;
        }
        if (inputs[0].nbDims < 2 || inputs[1].nbDims != 2)
        {
            return 1;
        }
        outputs[0] = inputs[0];
        outputs[0].d[inputs[0].nbDims - 1] = inputs[1].d[0];
        return 0;
    }

    int32_t getNbTactics() noexcept override
    {
        return static_cast<int32_t>(mKernels.size());
    }

    int32_t getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept override
    {
        for (int32_t i = 0; i < nbTactics; ++i)
        {
            tactics[i] = i + 1; // 0 is TensorRT's own name for the default
        }
        return 0;
    }

    char const* getTimingCacheID() noexcept override
    {
        return mCacheId.c_str();
    }

    // ---- run ----

    int32_t setTactic(int32_t tactic) noexcept override
    {
        if (tactic < 0 || tactic > static_cast<int32_t>(mKernels.size()))
        {
            return 1;
        }
        mTactic = tactic;
        mLoaded.reset();
        return 0;
    }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override
    {
        if (nbOutputs != 1 || nbInputs + 1 != static_cast<int32_t>(mRoles.size()))
        {
            return 1;
        }
        // Here and not at the first launch, which may be recorded into a CUDA graph.
        return measure(in, out) && load() ? 0 : 1;
    }

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const* out, void const* const* inputs,
        void* const* outputs, void*, cudaStream_t stream) noexcept override
    {
        if (!measure(in, out) || !load())
        {
            return 1;
        }
        std::vector<void const*> tensors(inputs, inputs + mRoles.size() - 1);
        tensors.push_back(outputs[0]);
        std::vector<void*> arguments; // of the kernels: inputs, scalars, output
        for (size_t i = 0; i + 1 < tensors.size(); ++i)
        {
            arguments.push_back(&tensors[i]);
        }
        for (auto& scalar : mScalars)
        {
            arguments.push_back(&scalar);
        }
        arguments.push_back(&tensors.back());
        return mLoaded->launch(mPrograms, arguments.data(), reinterpret_cast<CUstream>(stream)) ? 0 : 1;
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override
    {
        return clone();
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        return &mCollection;
    }

private:
    DataType typeOf(Role role) const noexcept
    {
        switch (role)
        {
        case Role::kWords: return DataType::kINT32;
        case Role::kScale: return DataType::kFLOAT;
        case Role::kHalf: break;
        }
        return mKernels[0].dtype == "bf16" ? DataType::kBF16 : DataType::kHALF;
    }

    Kernel const& kernel() const noexcept
    {
        return mKernels[mTactic > 0 ? mTactic - 1 : 0];
    }

    bool load() noexcept
    {
        try
        {
            if (!mLoaded)
            {
                mLoaded = Loaded::get(kernel());
            }
        }
        catch (...)
        {
            mLoaded.reset();
        }
        return mLoaded != nullptr;
    }

    // The scalars and the grid of a launch; false where the tensors do not fit each other.
    bool measure(PluginTensorDesc const* in, PluginTensorDesc const* out) noexcept
    {
        auto const& words = in[mDecode ? 0 : 1].dims;
        auto const& codebook = in[mDecode ? 1 : 2].dims;
        auto const& scale = in[mDecode ? 2 : 3].dims;
        if (words.nbDims != 2 || codebook.nbDims != 2 || scale.nbDims != 1 || scale.d[0] != words.d[0])
        {
            return false;
        }
        int64_t const n = words.d[0];
        int64_t const stride = words.d[1];
        int64_t rows = 1;
        int64_t k = 1;
        int64_t taps = 1;
        if (mDecode)
        {
            for (size_t i = 1; i < mShape.size(); ++i)
            {
                k *= mShape[i];
                taps *= i > 1 ? mShape[i] : 1;
            }
            rows = k;
        }
        else
        {
            auto const& x = in[0].dims;
            if (x.nbDims < 2 || in[4].dims.nbDims != 1 || in[4].dims.d[0] != n)
            {
                return false;
            }
            k = x.d[x.nbDims - 1];
            for (int32_t i = 0; i + 1 < x.nbDims; ++i)
            {
                rows *= x.d[i];
            }
        }
        int64_t const d = codebook.d[1];
        int64_t const bits = codebook.d[0] == 256 ? 8 : codebook.d[0] == 64 ? 6 : 0;
        bool const fits = bits > 0 && (d == 2 || d == 4) && rows > 0 && k > 0 && n > 0 && volume(out[0].dims) > 0
            && stride * 32 >= (k + d - 1) / d * bits && (!mDecode || n == mShape[0])
            && (mDecode ? n * k : rows * n) == volume(out[0].dims);
        // The kernels count elements in 32 bits.
        if (!fits || rows * std::max(k, n) > INT32_MAX || n * std::max(k, stride) > INT32_MAX)
        {
            return false;
        }
        mPrograms = kernel().programs(rows, n);
        mScalars.clear();
        if (!mDecode)
        {
            mScalars.push_back(static_cast<int32_t>(rows));
        }
        for (int64_t const scalar : {n, k, stride})
        {
            mScalars.push_back(static_cast<int32_t>(scalar));
        }
        if (mDecode)
        {
            mScalars.push_back(static_cast<int32_t>(taps));
        }
        return mPrograms > 0;
    }

    static int64_t volume(Dims const& dims) noexcept
    {
        int64_t total = 1;
        for (int32_t i = 0; i < dims.nbDims; ++i)
        {
            total *= dims.d[i];
        }
        return total;
    }

    bool mDecode;
    std::string mText;
    std::vector<int32_t> mShape;
    std::vector<Kernel> mKernels;
    std::vector<Role> mRoles;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
    std::string mCacheId;
    int32_t mTactic{};
    std::shared_ptr<Loaded> mLoaded;
    std::vector<int32_t> mScalars;
    uint32_t mPrograms{};
};

} // namespace trimtab
