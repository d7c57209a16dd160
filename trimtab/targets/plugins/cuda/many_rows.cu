// y = (x W^T) scale + bias for many rows of x, with W decoded on the way, on compute capability 9.0. Arguments are
// those of few_rows.cu, and docs/kernels.md says why it looks so.
//
// A program makes ROWS x 64 numbers of y with four warps. They decode their rows of W into registers, one side of the
// instruction; x comes to shared memory, its other side, STAGES - 1 turns ahead, with the codes of the turn after it.
// The table has LINE bytes for each codeword. K is a multiple of 8.

#include "ptx.cuh"
#include "table.cuh"

enum : int
{
    kThreads = 128,
    kCodewords = 1 << BITS,
    kWords = 64 / D * BITS / 32, // of the codes of one turn: 64 columns of a row of W
    kShift = LINE == 128 ? 7 : LINE == 64 ? 6 : 5,
    kStage = ROWS * 128, // bytes of x of one turn
    kCodes = 64 * kWords * 4,
    kCodesAt = STAGES * kStage,
    kTableAt = kCodesAt + STAGES * kCodes,
    kTurns = (K + 63) / 64,
};

static_assert(LINE == 1 << kShift && K % 8 == 0 && ROWS * 8 % kThreads == 0, "whole copies of 16 bytes");

// The two registers of a thread for one row of 16 columns: columns 2 part, 2 part + 1 and those eight further on. A
// codeword of four is read in halves, for its columns are those of two threads.
INLINE uint2 decode(u32 table, u32 mine, u32 const (&codes)[kWords], int step, int part)
{
    constexpr u32 mask = (kCodewords - 1) << kShift;
    u32 first, second;
    if (D == 4)
    {
        u32 const word = codes[step % kWords], turned = __funnelshift_r(word, word, 8 * (part / 2) - kShift & 31);
        first = turned;
        second = turned >> 16;
    }
    else if (BITS == 8)
    {
        u32 const low = codes[2 * step % kWords], high = codes[(2 * step + 1) % kWords];
        first = __funnelshift_r(low, low, 8 * part - kShift & 31);
        second = __funnelshift_r(high, high, 8 * part - kShift & 31);
    }
    else
    {
        // Sixteen codes in three words; four lie in 24 bits.
        int const at = step / 2 * 3;
        u32 const low = codes[at % kWords], middle = codes[(at + 1) % kWords], high = codes[(at + 2) % kWords];
        u32 const four = step % 2 ? __funnelshift_r(middle, high, 16) : low;
        u32 const next = step % 2 ? high >> 8 : __funnelshift_r(low, middle, 24);
        first = four >> 6 * part << kShift;
        second = next >> 6 * part << kShift;
    }
    return make_uint2(shared_load(table + (mine | first & mask)), shared_load(table + (mine | second & mask)));
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    vq_matmul(u16 const* __restrict__ x, u32 const* __restrict__ words, u32 const* __restrict__ codebook,
        float const* __restrict__ scale, u16 const* __restrict__ bias, int m, int, int, int, u16* __restrict__ y)
{
    extern __shared__ __align__(1024) u8 shared[];
    u32 const start = shared_address(shared);
    int const lane = threadIdx.x % 32, row = lane / 4, part = lane % 4;
    int const strip = threadIdx.x / 32; // sixteen columns of y
    constexpr int programs_n = (N + 63) / 64;
    int const first_n = blockIdx.x % programs_n * 64, first_m = blockIdx.x / programs_n * ROWS;

    // Codes are wanted from memory as soon as may be: all of them, into the L2 cache; and those of the first turn.
    u32 codes[2][kWords];
#pragma unroll
    for (int half = 0; half < 2; ++half)
    {
        u32 const* from = words + min(first_n + 16 * strip + 8 * half + row, N - 1) * STRIDE;
#pragma unroll
        for (int i = 0; i < kWords; i += 2)
        {
            uint2 const two = i < STRIDE ? load(reinterpret_cast<uint2 const*>(from + i)) : make_uint2(0, 0);
            codes[half][i] = two.x;
            codes[half][i + 1] = two.y;
        }
        for (int at = part * 32; at < STRIDE; at += 128)
        {
            prefetch(from + at);
        }
    }

    // Rows of x past the end are the last one again, and are never stored; columns past the end are zeros.
    constexpr int kCopies = ROWS * 8 / kThreads;
    int const piece = threadIdx.x % 8, x_row = threadIdx.x / 8;
    u16 const* from[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
    {
        from[i] = x + static_cast<long long>(min(first_m + x_row + 16 * i, m - 1)) * K + piece * 8;
    }
    u32 const to = x_row * 128 + (piece ^ x_row % 8) * 16;
    auto const fetch = [&](int turn, int stage) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i)
        {
            copy16(start + stage * kStage + to + i * 16 * 128, from[i] + turn * 64, turn * 64 + piece * 8 < K);
        }
#pragma unroll
        for (int i = 0; i < (kCodes / 8 + kThreads - 1) / kThreads; ++i)
        {
            int const two = threadIdx.x + i * kThreads;
            if (kCodes / 8 % kThreads == 0 || two < kCodes / 8)
            {
                int const at_n = min(first_n + two / (kWords / 2), N - 1);
                int const at = (turn + 1) * kWords + two % (kWords / 2) * 2;
                copy8(start + kCodesAt + stage * kCodes + two * 8, words + at_n * STRIDE + at, at < STRIDE);
            }
        }
        close_copies();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i)
    {
        fetch(i, i);
    }

    for (int i = threadIdx.x; i < kCodewords; i += kThreads)
    {
        write_line<LINE>(shared + kTableAt, i, load_codeword(codebook, i));
    }
    float by[2], plus[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
    {
        int const at = min(first_n + 16 * strip + 8 * half + row, N - 1);
        by[half] = scale[at];
        plus[half] = widen(bias[at]);
    }
    __syncthreads();

    float total[ROWS / 2] = {};
    u32 w[2][4][4]; // of this turn and the next: sixteen columns, four times
    u32 const table = start + kTableAt, mine = lane * 4 % LINE;
    auto const decode_turn = [&](u32(&into)[4][4]) {
#pragma unroll
        for (int step = 0; step < 4; ++step)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                uint2 const both = decode(table, mine, codes[half], step, part);
                into[step][half] = both.x;
                into[step][2 + half] = both.y;
            }
        }
    };
    decode_turn(w[0]);
    u32 const own = start + kCodesAt + (16 * strip + row) * kWords * 4;
    int stage = 0;
    auto const take_turn = [&](int turn, u32 const(&now)[4][4], u32(&next)[4][4]) {
        wait_for_copies<STAGES - 2>();
        show_to_tensor_cores();
        __syncthreads(); // all have this turn's x, and are done with the turn before
        open_products();
#pragma unroll
        for (int step = 0; step < 4; ++step)
        {
            multiply_async<ROWS>(total, now[step], description(start + stage * kStage) + 2 * step);
        }
        close_products();
        // Beside the products: a copy into the stage of the turn before, and the next turn's weights.
        fetch(turn + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
#pragma unroll
        for (int i = 0; i < 2 * kWords; i += 2)
        {
            uint2 const two = shared_load2(own + stage * kCodes + i / kWords * 8 * kWords * 4 + i % kWords * 4);
            codes[i / kWords][i % kWords] = two.x;
            codes[i / kWords][i % kWords + 1] = two.y;
        }
        decode_turn(next);
        wait_for_products();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    };
    int turn = 0;
    for (; turn + 1 < kTurns; turn += 2)
    {
        take_turn(turn, w[0], w[1]);
        take_turn(turn + 1, w[1], w[0]);
    }
    if (turn < kTurns)
    {
        take_turn(turn, w[0], w[1]);
    }
    wait_for_copies<0>();
    __syncthreads(); // nothing is under way: shared memory is free

    // Turned in shared memory, so that a row of y is written in one go; rows there are 16 bytes longer, for the banks.
    constexpr int kWide = 128 + 16;
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i)
    {
        u32 const first = narrow(total[4 * i] * by[0] + plus[0], total[4 * i + 1] * by[0] + plus[0]);
        u32 const second = narrow(total[4 * i + 2] * by[1] + plus[1], total[4 * i + 3] * by[1] + plus[1]);
        store_turned(start + (8 * i + lane % 8) * kWide + (16 * strip + lane / 8 % 2 * 8) * 2, first, second);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * 8; i += kThreads)
    {
        int const at_m = i / 8, at_n = i % 8 * 8;
        if (first_m + at_m >= m || first_n + at_n >= N)
        {
            continue;
        }
        u16 const* source = reinterpret_cast<u16 const*>(shared + at_m * kWide + at_n * 2);
        u16* target = y + static_cast<long long>(first_m + at_m) * N + first_n + at_n;
        if (N % 8 == 0)
        {
            *reinterpret_cast<uint4*>(target) = *reinterpret_cast<uint4 const*>(source);
        }
        else
        {
            for (int j = 0; j < 8 && first_n + at_n + j < N; ++j)
            {
                target[j] = source[j];
            }
        }
    }
}
