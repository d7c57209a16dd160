// Runs one kernel's programs, one after the other: run PROGRAMS THREADS SHARED_BYTES M LATE TURNS FOLDER. The tensors are
// files of the folder.

#include <standard.h>

#include "ptx.cuh"

#include SOURCE

template <typename Value>
std::vector<Value> read(std::string const& path)
{
    std::ifstream file(path, std::ios::binary);
    std::vector<char> const bytes{std::istreambuf_iterator<char>(file), {}};
    std::vector<Value> values(bytes.size() / sizeof(Value));
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
}

int main(int, char** arguments)
{
    int const programs = std::atoi(arguments[1]), count = std::atoi(arguments[2]);
    int const shared_bytes = std::atoi(arguments[3]), m = std::atoi(arguments[4]);
    late = std::atoi(arguments[5]) != 0;
    turns = static_cast<Turns>(std::atoi(arguments[6]));
    std::string const folder = std::string(arguments[7]) + "/";
    auto const x = read<u16>(folder + "x"), bias = read<u16>(folder + "bias");
    auto const words = read<u32>(folder + "words"), codebook = read<u32>(folder + "codebook");
    auto const scale = read<float>(folder + "scale");
    std::vector<u16> y(static_cast<size_t>(m) * N, 0x7fff);
    program = [&] {
        vq_matmul(x.data(), words.data(), codebook.data(), scale.data(), bias.data(), m, N, K, STRIDE, y.data());
    };
    for (int i = 0; i < programs; ++i)
    {
        run_block(i, count, shared_bytes);
    }
    std::ofstream(folder + "y", std::ios::binary).write(reinterpret_cast<char const*>(y.data()), y.size() * 2);
    return 0;
}
