// The PTX instructions that the kernels use, a function each. Nothing here decides anything.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if BFLOAT16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif

#define INLINE __device__ __forceinline__

// ---- memory ----

// These stay in the order in which they are written down: what is waited for first comes first.
INLINE u32 load(u32 const* from)
{
    u32 a;
    asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(a) : "l"(from));
    return a;
}

INLINE uint2 load(uint2 const* from)
{
    uint2 a;
    asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];" : "=r"(a.x), "=r"(a.y) : "l"(from));
    return a;
}

INLINE uint4 load_later(uint4 const* from) // where its turn comes
{
    uint4 a;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a.x), "=r"(a.y), "=r"(a.z), "=r"(a.w)
                 : "l"(from));
    return a;
}

INLINE void prefetch(void const* from)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

INLINE u32 shared_address(void const* at)
{
    return static_cast<u32>(__cvta_generic_to_shared(at));
}

INLINE u32 shared_load(u32 from)
{
    u32 a;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(a) : "r"(from));
    return a;
}

INLINE uint2 shared_load2(u32 from)
{
    uint2 a;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(a.x), "=r"(a.y) : "r"(from));
    return a;
}

// Asynchronous copies of 16 and 8 bytes to shared memory; zeros where `inside` is false, and nothing is read then.
INLINE void copy16(u32 to, void const* from, bool inside)
{
    int const bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

INLINE void copy8(u32 to, void const* from, bool inside)
{
    int const bytes = inside ? 8 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

INLINE void close_copies() // of this thread, into one group
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kOpen>
INLINE void wait_for_copies() // until at most kOpen groups of this thread are under way
{
    asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// ---- numbers ----

INLINE float widen(u16 half)
{
#if BFLOAT16
    return __uint_as_float(static_cast<u32>(half) << 16);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(half));
    return wide;
#endif
}

INLINE u32 narrow(float low, float high)
{
    u32 both;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// ---- tensor cores ----

// total (16 x 8) += a (16 x 16) b (16 x 8), of one warp.
INLINE void multiply(float (&total)[4], u32 const (&a)[4], u32 b0, u32 b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if __CUDA_ARCH_FEAT_SM90_ALL

// The rest is of compute capability 9.0 alone.

// total (64 x kColumns) += a (64 x 16) b (16 x kColumns), of four warps: a in registers, b in shared memory. Runs on
// its own until it is waited for; what it reads has to be left alone until then.
#define ROW16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ROW32 ROW16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ROW64                                                                                                          \
    ROW32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "     \
          "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define COMMA ,
#define OUT4(i) "+f"(total[i]), "+f"(total[i + 1]), "+f"(total[i + 2]), "+f"(total[i + 3])
#define OUT16(i) OUT4(i), OUT4(i + 4), OUT4(i + 8), OUT4(i + 12)
#define MULTIPLY(columns, row, operands, outputs)                                                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." TYPE "." TYPE " {" row "}, " operands          \
                 ", 1, 1, 1, 0;"                                                                                       \
                 : outputs                                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <int kColumns>
INLINE void multiply_async(float (&total)[kColumns / 2], u32 const (&a)[4], u64 b)
{
    static_assert(kColumns == 32 || kColumns == 64 || kColumns == 128, "a width that the instruction is written for");
    if constexpr (kColumns == 32)
    {
        MULTIPLY("32", ROW16, "{%16, %17, %18, %19}, %20", OUT16(0));
    }
    else if constexpr (kColumns == 64)
    {
        MULTIPLY("64", ROW32, "{%32, %33, %34, %35}, %36", OUT16(0) COMMA OUT16(16));
    }
    else
    {
        MULTIPLY("128", ROW64, "{%64, %65, %66, %67}, %68", OUT16(0) COMMA OUT16(16) COMMA OUT16(32) COMMA OUT16(48));
    }
}

INLINE void open_products() // before the first of a group: what was written to registers is seen
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

INLINE void close_products()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

INLINE void wait_for_products() // all groups
{
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// What threads wrote to shared memory, tensor cores will read.
INLINE void show_to_tensor_cores()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What the instruction wants to know of b, (columns x 64) in shared memory with the pieces of 16 bytes of a row of 128
// moved by (row % 8): "128-byte swizzle", groups of eight rows 1024 bytes apart.
INLINE u64 description(u32 at)
{
    return 1ull << 62 | 64ull << 32 | 1ull << 16 | (at >> 4 & 0x3fff);
}

// Two 8 x 8 matrices of a warp, turned; lanes 0 to 7 name the rows of the first, 8 to 15 of the second.
INLINE void store_turned(u32 at, u32 first, u32 second)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(first), "r"(second)
                 : "memory");
}

#endif
