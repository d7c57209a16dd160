// y = (x W^T) scale + bias for few rows of x, with W decoded on the way. docs/kernels.md says why it looks so.
//
// x (m, K) and y (m, N) are fp16 or bf16; words (N, STRIDE) the codes of W, padded rows; codebook (2^BITS, D) of the
// type of x; scale (N) fp32; bias (N) of the type of x. K, N, STRIDE, D, BITS and BFLOAT16 are given when this is
// compiled, and how the work is cut (tiles.py): ROWS x COLUMNS numbers of y by one program, whose WARPS share the
// depth. A thread takes STRETCH columns of a row of W at a time.

#include "ptx.cuh"
#include "table.cuh"

enum : int
{
    kThreads = 32 * WARPS,
    kCodewords = 1 << BITS,
    kGroups = COLUMNS / 16, // rows of W, sixteen at a time: one side of the instruction
    kBlocks = ROWS / 8,     // rows of x, eight at a time: its other side
    kWords = STRETCH / D * BITS / 32,
    kUnit = 4 * STRETCH, // columns that a warp takes at a time
    kUnits = (K + kUnit - 1) / kUnit,
    kRounds = (kUnits + WARPS - 1) / WARPS,
    kShift = 7,
    kLine = 1 << kShift, // bytes of the table for each codeword: those of all banks
    kTile = COLUMNS * ROWS,
    kWhole = K % STRETCH == 0,
};

static_assert(STRETCH * BITS % (32 * D) == 0 && kThreads % COLUMNS == 0, "whole words; a column for each thread");

// Where the line of code i of a stretch begins.
INLINE u32 line_of(u32 const (&words)[kWords], int i)
{
    constexpr u32 mask = (kCodewords - 1) << kShift;
    int const bit = BITS * i, word = bit / 32, within = bit % 32;
    if (within + BITS > 32) // six-bit codes may lie across two words
    {
        return __funnelshift_r(words[word], words[(word + 1) % kWords], within) << kShift & mask;
    }
    return (within >= kShift ? words[word] >> (within - kShift) : words[word] << (kShift - within)) & mask;
}

INLINE void load_codes(u32 (&words)[kWords], u32 const* row, int stretch)
{
    u32 const* from = row + stretch * kWords;
    if (kWhole && kWords % 2 == 0)
    {
#pragma unroll
        for (int i = 0; i < kWords; i += 2)
        {
            uint2 const two = stretch * STRETCH < K ? load(reinterpret_cast<uint2 const*>(from + i)) : make_uint2(0, 0);
            words[i] = two.x;
            words[(i + 1) % kWords] = two.y;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i)
    {
        words[i] = stretch * kWords + i < STRIDE ? load(from + i) : 0;
    }
}

// STRETCH columns of a row of x, two in a register; zeros past its end.
INLINE void load_row(u32 (&pairs)[STRETCH / 2], u16 const* row, int column, bool inside)
{
    if (kWhole)
    {
#pragma unroll
        for (int i = 0; i < STRETCH / 8; ++i)
        {
            uint4 const four = inside && column < K ? load_later(reinterpret_cast<uint4 const*>(row + column) + i)
                                                    : make_uint4(0, 0, 0, 0);
            pairs[4 * i] = four.x;
            pairs[4 * i + 1] = four.y;
            pairs[4 * i + 2] = four.z;
            pairs[4 * i + 3] = four.w;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < STRETCH / 2; ++i)
    {
        u32 const low = inside && column + 2 * i < K ? row[column + 2 * i] : 0;
        u32 const high = inside && column + 2 * i + 1 < K ? row[column + 2 * i + 1] : 0;
        pairs[i] = low | high << 16;
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    vq_matmul(u16 const* __restrict__ x, u32 const* __restrict__ words, u32 const* __restrict__ codebook,
        float const* __restrict__ scale, u16 const* __restrict__ bias, int m, int, int, int, u16* __restrict__ y)
{
    extern __shared__ __align__(128) u8 shared[];
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, part = lane % 4;
    constexpr int programs_n = (N + COLUMNS - 1) / COLUMNS;
    int const first_n = blockIdx.x % programs_n * COLUMNS, first_m = blockIdx.x / programs_n * ROWS;

    // The codebook first, for all wait until every thread has filled its part of the table.
    constexpr int kLines = (kCodewords + kThreads - 1) / kThreads;
    uint2 codeword[kLines];
#pragma unroll
    for (int i = 0; i < kLines; ++i)
    {
        codeword[i] = load_codeword(codebook, min(static_cast<int>(threadIdx.x) + i * kThreads, kCodewords - 1));
    }
    u32 code[kRounds][kGroups][2][kWords];
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
    {
#pragma unroll
        for (int i = 0; i < 2 * kGroups; ++i)
        {
            // Rows past the end are the last one again, and are never stored.
            int const at = N % COLUMNS == 0 ? first_n + 8 * i + row : min(first_n + 8 * i + row, N - 1);
            load_codes(code[round][i / 2][i % 2], words + at * STRIDE, (warp + round * WARPS) * 4 + part);
        }
    }
    u32 b[2][kBlocks][STRETCH / 2];
    auto const load_rows = [&](int round) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
        {
            int const at = first_m + 8 * i + row;
            int const column = ((warp + round * WARPS) * 4 + part) * STRETCH;
            load_row(b[round % 2][i], x + static_cast<long long>(at) * K, column, at < m);
        }
    };
    int const at_n = threadIdx.x % COLUMNS, out_n = first_n + at_n; // what this thread writes in the end
    bool const writes = N % COLUMNS == 0 || out_n < N;
    float const by = writes ? scale[out_n] : 0, plus = writes ? widen(bias[out_n]) : 0;
    load_rows(0);
    if (kRounds > 1)
    {
        load_rows(1);
    }

#pragma unroll
    for (int i = 0; i < kLines; ++i)
    {
        int const code = threadIdx.x + i * kThreads;
        if (kCodewords % kThreads == 0 || code < kCodewords)
        {
            write_line<kLine>(shared, code, codeword[i]);
        }
    }
    __syncthreads();

    // Sums of two chains, for an instruction waits for the one that it adds to.
    constexpr int kChains = kGroups * kBlocks > 2 ? 1 : 2;
    float total[kChains][kGroups][kBlocks][4] = {};
    u32 const table = shared_address(shared), mine = lane * (D == 4 ? 8 : 4) % kLine;
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
    {
        if (round > 0 && warp + round * WARPS >= kUnits)
        {
            break;
        }
#pragma unroll
        for (int step = 0; step < STRETCH / 4; ++step)
        {
            // In the instruction, a thread's columns are 2 part, 2 part + 1 and those eight further on: here they are
            // four that follow each other, in W as in x.
#pragma unroll
            for (int group = 0; group < kGroups; ++group)
            {
                u32 a[4];
#pragma unroll
                for (int half = 0; half < 2; ++half)
                {
                    auto const& codes = code[round][group][half];
                    if (D == 4)
                    {
                        uint2 const four = shared_load2(table + (mine | line_of(codes, step)));
                        a[half] = four.x;
                        a[2 + half] = four.y;
                    }
                    else
                    {
                        a[half] = shared_load(table + (mine | line_of(codes, 2 * step)));
                        a[2 + half] = shared_load(table + (mine | line_of(codes, 2 * step + 1)));
                    }
                }
#pragma unroll
                for (int i = 0; i < kBlocks; ++i)
                {
                    auto const& columns = b[round % 2][i];
                    multiply(total[step % kChains][group][i], a, columns[2 * step], columns[2 * step + 1]);
                }
            }
        }
        if (round + 2 < kRounds)
        {
            load_rows(round + 2);
        }
    }

    __syncthreads(); // the sums lie where the table was
    float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < kGroups * kBlocks * 4; ++i)
    {
        int const group = i / 4 / kBlocks, block = i / 4 % kBlocks;
        float const first = total[0][group][block][i % 4], other = total[kChains - 1][group][block][i % 4];
        sums[warp * kTile + i * 32 + lane] = kChains == 1 ? first : first + other;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTile; i += kThreads)
    {
        int const at_m = i / COLUMNS, out_m = first_m + at_m;
        if (out_m >= m || !writes)
        {
            break;
        }
        // Register 2 (at_n / 8 % 2) + at_m % 2 of lane 4 (at_n % 8) + at_m % 8 / 2 has it, in every warp.
        int const reg = (at_n / 16 * kBlocks + at_m / 8) * 4 + at_n / 8 % 2 * 2 + at_m % 2;
        int const from = reg * 32 + at_n % 8 * 4 + at_m % 8 / 2;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < WARPS; ++j)
        {
            sum += sums[j * kTile + from];
        }
        y[static_cast<long long>(out_m) * N + out_n] = narrow(sum * by + plus, 0);
    }
}
