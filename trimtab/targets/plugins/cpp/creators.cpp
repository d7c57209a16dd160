// Products with weights that are held as codes into a codebook, for TensorRT 10.3 (JetPack 6) and later.
//
// Two operators of namespace "trimtab", the same as qdp.py registers with newer versions:
//
//   TrimtabVQMatMul1(x, words, codebook, scale, bias; kernels) -> x W^T scale + bias
//   TrimtabVQDecode1(words, codebook, scale; kernels, shape) -> W
//
// The kernels come as text in the attribute, stay in the engine as plugin data, and are launched through the driver
// API: the library holds none. It links against neither TensorRT nor CUDA; IPluginRegistry::loadLibrary finds its
// creators.

#include "plugin.h"

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace trimtab
{
namespace
{

class Creator final : public IPluginCreatorV3One
{
public:
    explicit Creator(bool decode)
        : mDecode{decode}
    {
        mFields.emplace_back("kernels", nullptr, PluginFieldType::kCHAR, 0);
        if (decode)
        {
            mFields.emplace_back("shape", nullptr, PluginFieldType::kINT32, 0);
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    }

    IPluginV3* createPlugin(
        AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override
    {
        try
        {
            std::string kernels;
            std::vector<int32_t> shape;
            for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i)
            {
                PluginField const& field = fields->fields[i];
                if (field.length < 0 || (field.length > 0 && field.data == nullptr))
                {
                    return nullptr;
                }
                if (std::strcmp(field.name, "kernels") == 0)
                {
                    kernels.assign(static_cast<char const*>(field.data), field.length);
                    // A parser may count the end of a C string among its characters.
                    kernels.erase(kernels.find_last_not_of('\0') + 1);
                }
                else if (std::strcmp(field.name, "shape") == 0)
                {
                    if (field.type == PluginFieldType::kINT32)
                    {
                        auto const* sizes = static_cast<int32_t const*>(field.data);
                        shape.assign(sizes, sizes + field.length);
                    }
                    else if (field.type == PluginFieldType::kINT64)
                    {
                        auto const* sizes = static_cast<int64_t const*>(field.data);
                        shape.assign(sizes, sizes + field.length);
                    }
                }
            }
            std::unique_ptr<Plugin> plugin(new Plugin(mDecode, std::move(kernels), std::move(shape)));
            return plugin->sound() ? plugin.release() : nullptr;
        }
        catch (...)
        {
            return nullptr;
        }
    }

    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
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

private:
    bool mDecode;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

} // namespace
} // namespace trimtab

// The two entry points that IPluginRegistry::loadLibrary looks for.

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& nbCreators)
{
    static trimtab::Creator product(false);
    static trimtab::Creator decoder(true);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&product, &decoder};
    nbCreators = 2;
    return creators;
}
