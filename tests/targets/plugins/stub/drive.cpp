// Does with the plugin library what TensorRT does with it, and prints what comes back: drive LIBRARY

#include <NvInferRuntime.h>

#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace
{

std::string const kKernels
    = "vq_matmul 8 16 256 1000 fp16\n.version 8.0\n.entry vq_matmul(\n)\f"
      "vq_matmul 64 32 128 60000 fp16\n.version 8.5\n.entry vq_matmul(\n)";
std::string const kDecoder = "vq_decode 256 16 128 2048 bf16\n.version 8.0\n.entry vq_decode(\n)";

struct Size : IDimensionExpr
{
    int64_t value;
    explicit Size(int64_t v)
        : value(v)
    {
    }
    int64_t getConstantValue() const noexcept override
    {
        return value;
    }
};

struct Builder : IExprBuilder
{
    std::vector<std::unique_ptr<Size>> made;
    IDimensionExpr const* constant(int64_t value) noexcept override
    {
        made.push_back(std::make_unique<Size>(value));
        return made.back().get();
    }
};

using Shape = std::vector<int64_t>;

PluginTensorDesc tensor(Shape const& shape, DataType type, TensorFormat format = TensorFormat::kLINEAR)
{
    PluginTensorDesc desc{};
    desc.dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), desc.dims.d);
    desc.type = type;
    desc.format = format;
    return desc;
}

template <typename Interface>
Interface* as(IPluginV3* plugin, PluginCapabilityType type)
{
    return static_cast<Interface*>(plugin->getCapabilityInterface(type));
}

IPluginV3* create(IPluginCreatorV3One* creator, std::string const& kernels, std::vector<int32_t> const& shape = {})
{
    std::vector<PluginField> fields{
        {"kernels", kernels.data(), PluginFieldType::kCHAR, static_cast<int32_t>(kernels.size())},
        {"shape", shape.data(), PluginFieldType::kINT32, static_cast<int32_t>(shape.size())}};
    PluginFieldCollection collection{2, fields.data()};
    return creator->createPlugin(creator->getPluginName(), &collection, TensorRTPhase::kBUILD);
}

// Which of the types 0, 1, 3, 7 each place takes, given the right ones elsewhere.
void types(IPluginV3* plugin, int32_t inputs)
{
    auto* build = as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    for (int32_t place = 0; place <= inputs; ++place)
    {
        std::vector<DynamicPluginTensorDesc> all(inputs + 1);
        std::printf("types %d:", place);
        for (auto type : {DataType::kFLOAT, DataType::kHALF, DataType::kINT8, DataType::kINT32, DataType::kBF16})
        {
            all[place].desc = tensor({1}, type);
            if (build->supportsFormatCombination(place, all.data(), inputs, 1))
            {
                std::printf(" %d", static_cast<int>(type));
            }
            all[place].desc.format = TensorFormat::kCHW2;
            if (build->supportsFormatCombination(place, all.data(), inputs, 1))
            {
                std::printf(" vectorised");
            }
        }
        std::printf("\n");
    }
}

void outputs(IPluginV3* plugin, std::vector<Shape> const& inputs)
{
    auto* build = as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    Builder builder;
    std::vector<DimsExprs> given;
    for (auto const& shape : inputs)
    {
        DimsExprs dims{static_cast<int32_t>(shape.size()), {}};
        for (size_t i = 0; i < shape.size(); ++i)
        {
            dims.d[i] = builder.constant(shape[i]);
        }
        given.push_back(dims);
    }
    DimsExprs out{};
    auto const count = static_cast<int32_t>(given.size());
    int32_t const status = build->getOutputShapes(given.data(), count, nullptr, 0, &out, 1, builder);
    DataType type{};
    build->getOutputDataTypes(&type, 1, nullptr, count);
    std::printf("output %d type %d:", status, static_cast<int>(type));
    for (int32_t i = 0; i < out.nbDims; ++i)
    {
        std::printf(" %d", static_cast<int>(out.d[i]->getConstantValue()));
    }
    std::printf("\n");
}

int32_t change(IPluginV3* plugin, std::vector<PluginTensorDesc> const& in, PluginTensorDesc const& out)
{
    auto* run = as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    return run->onShapeChange(in.data(), static_cast<int32_t>(in.size()), &out, 1);
}

void enqueue(IPluginV3* plugin, std::vector<PluginTensorDesc> const& in, PluginTensorDesc const& out)
{
    auto* run = as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    std::vector<void const*> inputs;
    for (size_t i = 0; i < in.size(); ++i)
    {
        inputs.push_back(reinterpret_cast<void const*>(0x100 * (i + 1)));
    }
    void* output = reinterpret_cast<void*>(0xf00);
    auto stream = reinterpret_cast<cudaStream_t>(0x77);
    std::printf("enqueue %d\n", run->enqueue(in.data(), &out, inputs.data(), &output, nullptr, stream));
}

std::vector<PluginTensorDesc> product(int64_t rows, int64_t k, int64_t n, int64_t stride, int64_t codes = 256)
{
    return {tensor({2, rows, k}, DataType::kHALF), tensor({n, stride}, DataType::kINT32),
        tensor({codes, 4}, DataType::kHALF), tensor({n}, DataType::kFLOAT), tensor({n}, DataType::kHALF)};
}

} // namespace

int main(int, char** argv)
{
    void* library = dlopen(argv[1], RTLD_NOW);
    if (library == nullptr)
    {
        std::printf("%s\n", dlerror());
        return 1;
    }
    using GetCreators = IPluginCreatorInterface* const* (*) (int32_t&);
    int32_t count = 0;
    auto* creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(count);
    std::printf("creators %d logger %d\n", count, dlsym(library, "setLoggerFinder") != nullptr);
    std::vector<IPluginCreatorV3One*> creator;
    for (int32_t i = 0; i < count; ++i)
    {
        creator.push_back(static_cast<IPluginCreatorV3One*>(creators[i]));
        std::printf("creator %s %s %s:", creator[i]->getPluginName(), creator[i]->getPluginVersion(),
            creator[i]->getPluginNamespace());
        auto* fields = creator[i]->getFieldNames();
        for (int32_t f = 0; f < fields->nbFields; ++f)
        {
            std::printf(" %s %d", fields->fields[f].name, static_cast<int>(fields->fields[f].type));
        }
        std::printf("\n");
    }

    std::string half = kKernels;
    half.replace(half.rfind("fp16"), 4, "bf16");
    std::string large = kKernels;
    large.replace(large.find(" 8 16"), 2, " 9223372036854775807");
    std::printf("refused %d %d %d %d %d %d\n", create(creator[0], "") == nullptr, create(creator[0], "no kernel") == nullptr,
        create(creator[0], half) == nullptr, create(creator[1], kDecoder) == nullptr,
        create(creator[1], kDecoder, {8, -1}) == nullptr, create(creator[0], large) == nullptr);

    std::unique_ptr<IPluginV3> built(create(creator[0], kKernels));
    types(built.get(), 5);
    outputs(built.get(), {{2, 3, 64}, {48, 4}, {256, 4}, {48}, {48}});
    auto* build = as<IPluginV3OneBuild>(built.get(), PluginCapabilityType::kBUILD);
    std::vector<int32_t> tactics(build->getNbTactics());
    build->getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size()));
    std::printf("tactics");
    for (int32_t tactic : tactics)
    {
        std::printf(" %d", tactic);
    }
    std::printf("\n");

    auto* fields = as<IPluginV3OneRuntime>(built.get(), PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
    std::unique_ptr<IPluginV3> engine(
        creator[0]->createPlugin("TrimtabVQMatMul1", fields, TensorRTPhase::kRUNTIME));
    auto* again = as<IPluginV3OneRuntime>(engine.get(), PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
    std::printf("serialised %d same %d\n", fields->nbFields,
        fields->fields[0].length == again->fields[0].length
            && std::memcmp(fields->fields[0].data, again->fields[0].data, fields->fields[0].length) == 0);
    built.reset();

    auto* run = as<IPluginV3OneRuntime>(engine.get(), PluginCapabilityType::kRUNTIME);
    std::printf("tactic %d %d\n", run->setTactic(2), run->setTactic(3));
    std::unique_ptr<IPluginV3> context(run->attachToContext(nullptr));
    auto const out = tensor({2, 50, 48}, DataType::kHALF);
    std::printf("change %d\n", change(context.get(), product(50, 64, 48, 4), out));
    enqueue(context.get(), product(50, 64, 48, 4), out);
    std::unique_ptr<IPluginV3> other(context->clone());
    enqueue(other.get(), product(50, 64, 48, 4), out);
    std::printf("misfits %d %d %d %d\n", change(other.get(), product(50, 64, 48, 3), out),
        change(other.get(), product(50, 64, 48, 4, 100), out), change(other.get(), product(51, 64, 48, 4), out),
        change(other.get(), product(40'000'000, 64, 48, 4), tensor({2, 40'000'000, 48}, DataType::kHALF)));
    context.reset();
    other.reset();

    std::unique_ptr<IPluginV3> decoder(create(creator[1], kDecoder, {18, 12, 3, 3}));
    types(decoder.get(), 3);
    outputs(decoder.get(), {{18, 16}, {256, 2}, {18}});
    std::vector<PluginTensorDesc> const in{tensor({18, 16}, DataType::kINT32), tensor({256, 2}, DataType::kBF16),
        tensor({18}, DataType::kFLOAT)};
    enqueue(decoder.get(), in, tensor({18, 12, 3, 3}, DataType::kBF16));
    return 0;
}
