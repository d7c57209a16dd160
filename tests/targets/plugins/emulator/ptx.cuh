// A GPU's program on the CPU, in the place of trimtab/targets/plugins/cuda/ptx.cuh: each thread is a fiber that runs
// until it waits for others. What is asynchronous happens at once, or as late as the program allows (`late`), and the
// order of the threads is forwards, backwards or shuffled, and then most warps sleep at a time (`turns`): a wait that is
// missing shows as a wrong number. The address sanitizer sees what lies outside of a tensor, or of the shared memory that a kernel asks for.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE inline
#define __global__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct alignas(8) uint2
{
    u32 x, y;
};
struct alignas(16) uint4
{
    u32 x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y)
{
    return {x, y};
}
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w)
{
    return {x, y, z, w};
}
struct Index
{
    int x;
};
using std::min;

enum class Turns
{
    forwards,
    backwards,
    shuffled
};
inline bool late;
inline Turns turns;

inline Index threadIdx, blockIdx;
inline u8 shared[227 * 1024] __align__(1024);

// ---- threads ----

struct Thread
{
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 * 1024);
    bool done = false;
    std::deque<std::vector<std::function<void()>>> copies; // groups that were closed
    std::vector<std::function<void()>> open;
    std::vector<std::function<void()>> products;
    // what other threads of its warp or of its four warps read
    u32 const* a = nullptr;
    u32 b[2];
    u32 at, turned[2];
};

struct Meeting
{
    int arrived = 0;
    u64 round = 0;
};

inline std::vector<Thread> threads;
inline std::map<int, Meeting> meetings;
inline ucontext_t scheduler;
inline std::function<void()> program;

inline Thread& self()
{
    return threads[threadIdx.x];
}

inline void meet(int index, int count)
{
    Meeting& meeting = meetings[index];
    u64 const round = meeting.round;
    if (++meeting.arrived == count)
    {
        meeting.arrived = 0;
        ++meeting.round;
        return;
    }
    while (meeting.round == round)
    {
        Thread& thread = self();
        swapcontext(&thread.context, &scheduler);
    }
}

inline void __syncthreads()
{
    meet(0, static_cast<int>(threads.size()));
}

inline int meet_warp()
{
    int const warp = threadIdx.x / 32;
    meet(1000 + warp, 32);
    return warp * 32;
}

inline int meet_four_warps()
{
    int const group = threadIdx.x / 128;
    meet(2000 + group, 128);
    return group * 128;
}

inline void run_program()
{
    program();
    for (auto const& group : self().copies)
    {
        assert(group.empty()); // whatever they would have written over
    }
    self().done = true;
    swapcontext(&self().context, &scheduler);
}

inline void run_block(int block, int count, int shared_bytes)
{
    ASAN_POISON_MEMORY_REGION(shared + shared_bytes, sizeof shared - shared_bytes);
    blockIdx.x = block;
    threads = std::vector<Thread>(count);
    meetings.clear();
    std::memset(shared, 0xff, shared_bytes); // NaN, wherever nothing was written
    std::vector<int> order(count);
    for (int i = 0; i < count; ++i)
    {
        order[i] = turns == Turns::backwards ? count - 1 - i : i;
        getcontext(&threads[i].context);
        threads[i].context.uc_stack.ss_sp = threads[i].stack.data();
        threads[i].context.uc_stack.ss_size = threads[i].stack.size();
        threads[i].context.uc_link = nullptr;
        makecontext(&threads[i].context, run_program, 0);
    }
    std::mt19937 random(block);
    u64 waited = 0;
    for (int left = count; left > 0;)
    {
        if (turns == Turns::shuffled)
        {
            std::shuffle(order.begin(), order.end(), random);
        }
        u32 const awake = turns == Turns::shuffled ? random() & random() : ~0u;
        int before = left;
        u64 rounds = 0;
        for (auto const& [index, meeting] : meetings)
        {
            rounds += meeting.round;
        }
        for (int i : order)
        {
            if (!threads[i].done && awake >> i / 32 % 32 & 1)
            {
                threadIdx.x = i;
                swapcontext(&scheduler, &threads[i].context);
                left -= threads[i].done;
            }
        }
        for (auto const& [index, meeting] : meetings)
        {
            rounds -= meeting.round;
        }
        waited = rounds == 0 && before == left ? waited + 1 : 0;
        if (waited > 1000)
        {
            std::fprintf(stderr, "all threads wait\n");
            std::exit(3);
        }
    }
}

// ---- memory ----

template <typename Value>
inline Value load(Value const* from)
{
    return *from;
}
inline uint4 load_later(uint4 const* from)
{
    return *from;
}
inline void prefetch(void const*) {}
inline u32 shared_address(void const* at)
{
    return static_cast<u32>(static_cast<u8 const*>(at) - shared);
}
template <typename Value>
inline Value read_shared(u32 from)
{
    assert(from % sizeof(Value) == 0);
    Value value;
    std::memcpy(&value, shared + from, sizeof value);
    return value;
}
inline u32 shared_load(u32 from)
{
    return read_shared<u32>(from);
}
inline uint2 shared_load2(u32 from)
{
    return read_shared<uint2>(from);
}

inline void copy(u32 to, void const* from, bool inside, int bytes)
{
    assert(to % bytes == 0 && (!inside || reinterpret_cast<uintptr_t>(from) % bytes == 0));
    auto const act = [=] { inside ? std::memcpy(shared + to, from, bytes) : std::memset(shared + to, 0, bytes); };
    if (late)
    {
        self().open.push_back(act);
    }
    else
    {
        act();
    }
}
inline void copy16(u32 to, void const* from, bool inside)
{
    copy(to, from, inside, 16);
}
inline void copy8(u32 to, void const* from, bool inside)
{
    copy(to, from, inside, 8);
}
inline void close_copies()
{
    self().copies.push_back(std::move(self().open));
    self().open.clear();
}
template <int kOpen>
inline void wait_for_copies()
{
    while (self().copies.size() > kOpen)
    {
        for (auto const& act : self().copies.front())
        {
            act();
        }
        self().copies.pop_front();
    }
}

// ---- numbers ----

inline u32 __funnelshift_r(u32 low, u32 high, u32 by)
{
    return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> (by & 31));
}

inline float widen(u16 half)
{
#if BFLOAT16
    return std::bit_cast<float>(static_cast<u32>(half) << 16);
#else
    return static_cast<float>(std::bit_cast<_Float16>(half));
#endif
}

inline u16 narrow_one(float wide)
{
#if BFLOAT16
    u32 const bits = std::bit_cast<u32>(wide);
    return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    return std::bit_cast<u16>(static_cast<_Float16>(wide));
#endif
}

inline u32 narrow(float low, float high)
{
    return narrow_one(low) | static_cast<u32>(narrow_one(high)) << 16;
}

inline float half_of(u32 pair, int which)
{
    return widen(static_cast<u16>(pair >> 16 * which));
}

// ---- tensor cores: PTX ISA, "Matrix Fragments" of mma.m16n8k16 and of wgmma.m64nNk16 ----

// Element (row, column) of the 16 x 16 that 32 threads hold in four registers each.
inline float element(int first, int row, int column)
{
    u32 const* a = threads[first + row % 8 * 4 + column % 8 / 2].a;
    return half_of(a[row / 8 + column / 8 * 2], column % 2);
}

inline void multiply(float (&total)[4], u32 const (&a)[4], u32 b0, u32 b1)
{
    self().a = a;
    self().b[0] = b0;
    self().b[1] = b1;
    int const first = meet_warp(), lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i)
    {
        int const row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k)
        {
            Thread const& other = threads[first + column * 4 + k % 8 / 2];
            total[i] += element(first, row, k) * half_of(other.b[k / 8], k % 2);
        }
    }
    meet_warp();
}

// Address, and rows of 128 bytes in groups of eight; pieces of 16 bytes moved by the row's place.
inline u64 description(u32 at)
{
    assert(at % 1024 == 0);
    return at >> 4;
}

template <int kColumns>
inline void multiply_async(float (&total)[kColumns / 2], u32 const (&a)[4], u64 b)
{
    Thread& thread = self();
    auto const act = [&total, &a, b, &thread] {
        thread.a = a;
        int const first = meet_four_warps() + threadIdx.x % 128 / 32 * 32, lane = threadIdx.x % 32;
        for (int i = 0; i < kColumns / 2; ++i)
        {
            int const row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k)
            {
                u32 const plain = static_cast<u32>(b << 4) + column / 8 * 1024 + column % 8 * 128 + k * 2;
                u32 const at = plain ^ (plain >> 7 & 7) << 4;
                total[i] += element(first, row, k) * widen(read_shared<u16>(at));
            }
        }
        meet_warp();
    };
    if (late)
    {
        self().products.push_back(act);
    }
    else
    {
        act();
    }
}
inline void open_products() {}
inline void close_products() {}
inline void show_to_tensor_cores() {}
inline void wait_for_products()
{
    for (auto const& act : self().products)
    {
        act();
    }
    self().products.clear();
}

inline void store_turned(u32 at, u32 first_matrix, u32 second_matrix)
{
    self().at = at;
    self().turned[0] = first_matrix;
    self().turned[1] = second_matrix;
    int const first = meet_warp(), lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i)
    {
        int const matrix = i / 2, row = lane % 4 * 2 + i % 2; // of what is stored: its column here
        u32 const to = threads[first + matrix * 8 + row].at + lane / 4 * 2;
        u16 const value = static_cast<u16>(self().turned[matrix] >> 16 * (i % 2));
        std::memcpy(shared + to, &value, 2);
    }
    meet_warp();
}
