// The codebook in shared memory: a line for each codeword, with a copy of it for every bank that a thread reads from,
// so that none waits for another.

#pragma once

INLINE uint2 load_codeword(u32 const* codebook, int code) // of two numbers: twice
{
    if (D == 4)
    {
        return load(reinterpret_cast<uint2 const*>(codebook) + code);
    }
    u32 const two = load(codebook + code);
    return make_uint2(two, two);
}

// Eight threads that write together write to different banks.
template <int kLine>
INLINE void write_line(u8* table, int code, uint2 codeword)
{
#pragma unroll
    for (int i = 0; i < kLine / 16; ++i)
    {
        *reinterpret_cast<uint4*>(table + code * kLine + (i + code) % (kLine / 16) * 16)
            = make_uint4(codeword.x, codeword.y, codeword.x, codeword.y);
    }
}
