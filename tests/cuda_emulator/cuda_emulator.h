// CUDA C++ as C++ of the processor: the threads of a block are fibers, blocks run one after another.
//
// Included before a source of csrc/ (-include), which is then compiled with -DFASTCLSTM_EMULATOR. Threads and blocks
// run in a shuffled order, each until its next barrier, so that what needs a barrier and has none goes wrong.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <type_traits>
#include <ucontext.h>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::isnan;
template <class T> static T min(T a, T b) { return b < a ? b : a; }
template <class T> static T max(T a, T b) { return a < b ? b : a; }

namespace emulator {

const int MOST_THREADS = 1024, STACK = 128 << 10, COPIES = 160, GROUPS = 8;

struct Copy {
    void* to;
    const void* from;
    int bytes, taken;
};

struct Fiber {
    jmp_buf at;
    ucontext_t start;
    bool started;
    bool done;
    const int* waits;  // for *waits to differ from `seen`
    int seen;
    dim3 index;
    int thread;
    unsigned exchanges;
    Copy copies[COPIES];  // asked for and not yet made, the groups one after another
    int count, ends[GROUPS], groups;
};

struct Barrier {
    int arrived, generation;
};

static Fiber fibers[MOST_THREADS];
static int order[MOST_THREADS], threads, alive;
static int warp_alive[MOST_THREADS / 32];
static Barrier block_barrier, warp_barriers[MOST_THREADS / 32];
static unsigned char exchange[2][MOST_THREADS / 32][32][64];
static unsigned char* stacks;
static unsigned char* shared;
static Fiber* current;
static jmp_buf scheduler;
static ucontext_t origin;
static char error[300];
static uint64_t seed = 1;
static void (*body)(void**);
static void** arguments;

static unsigned draw(unsigned below)
{
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return unsigned(seed >> 33) % below;
}

static void leave()
{
    if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

[[noreturn]] static void fail(const char* what)
{
    if (!error[0])
        snprintf(error, sizeof error, "%s in thread (%u, %u, %u) of block (%u, %u, %u)", what, threadIdx.x, threadIdx.y,
                 threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z);
    for (;;) leave();
}

static void wait(Barrier& barrier, int expected)
{
    if (++barrier.arrived >= expected) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    current->waits = &barrier.generation;
    current->seen = barrier.generation;
    leave();
}

static int warp() { return current->thread / 32; }
static int lane() { return current->thread % 32; }
static void wait_for_warp() { wait(warp_barriers[warp()], warp_alive[warp()]); }

// Every lane gives `bytes` bytes and sees those of all lanes until it comes here again: there are two places in turn.
static unsigned char (*gather(const void* mine, int bytes))[64]
{
    auto place = exchange[current->exchanges++ % 2][warp()];
    memcpy(place[lane()], mine, bytes);
    wait_for_warp();
    return place;
}

static void finished()
{
    current->done = true;
    alive--;
    int w = warp();
    warp_alive[w]--;
    if (alive && block_barrier.arrived >= alive) {
        block_barrier.arrived = 0;
        block_barrier.generation++;
    }
    if (warp_alive[w] && warp_barriers[w].arrived >= warp_alive[w]) {
        warp_barriers[w].arrived = 0;
        warp_barriers[w].generation++;
    }
}

static void life()
{
    for (;;) {
        body(arguments);
        finished();
        leave();
    }
}

static void enter(Fiber& fiber)
{
    current = &fiber;
    threadIdx = fiber.index;
    fiber.waits = nullptr;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks + size_t(fiber.thread) * STACK;
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, life, 0);
    setcontext(&fiber.start);
}

static void shuffle(int* items, int count)
{
    for (int i = count - 1; i > 0; i--) {
        int j = draw(i + 1), kept = items[i];
        items[i] = items[j];
        items[j] = kept;
    }
}

// The lanes of a warp stay together; the order of warps and of the lanes in each is drawn.
static void shuffle_threads()
{
    int warps = (threads + 31) / 32, first[MOST_THREADS / 32];
    for (int w = 0; w < warps; w++) first[w] = w;
    shuffle(first, warps);
    for (int w = 0, n = 0; w < warps; w++) {
        int count = min(32, threads - first[w] * 32);
        for (int i = 0; i < count; i++) order[n + i] = first[w] * 32 + i;
        shuffle(order + n, count);
        n += count;
    }
}

static void run_block(int shared_bytes)
{
    memset(shared, 0xff, shared_bytes + 64);
    alive = threads;
    block_barrier = {};
    for (int w = 0; w * 32 < threads; w++) {
        warp_barriers[w] = {};
        warp_alive[w] = min(32, threads - w * 32);
    }
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.done = false;
        fiber.waits = nullptr;
        fiber.count = fiber.groups = 0;
        fiber.exchanges = 0;
        fiber.thread = i;
        fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    }
    shuffle_threads();
    while (alive && !error[0]) {
        bool progress = false;
        for (int i = 0; i < threads && !error[0]; i++) {
            Fiber& fiber = fibers[order[i]];
            if (fiber.done || (fiber.waits && *fiber.waits == fiber.seen)) continue;
            enter(fiber);
            progress = true;
        }
        if (!progress && !error[0]) snprintf(error, sizeof error, "a barrier is not reached by every thread");
    }
    for (int i = 0; i < 64; i++)
        if (shared[shared_bytes + i] != 0xff && !error[0])
            snprintf(error, sizeof error, "a write beyond the %d bytes of shared memory", shared_bytes);
}

static const char* launch(void (*kernel)(void**), void** given, const unsigned* grid, const unsigned* block, int bytes,
                          uint64_t new_seed)
{
    error[0] = 0;
    seed = new_seed;
    body = kernel;
    arguments = given;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    threads = block[0] * block[1] * block[2];
    if (threads > MOST_THREADS) return "more than 1024 threads a block";
    if (!stacks) {
        void* memory = mmap(nullptr, size_t(MOST_THREADS) * STACK, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return "no memory for the stacks";
        stacks = (unsigned char*)memory;
    }
    shared = (unsigned char*)aligned_alloc(128, (bytes + 64 + 127) / 128 * 128);
    int count = grid[0] * grid[1] * grid[2];
    int* blocks = (int*)malloc(count * sizeof(int));
    for (int i = 0; i < count; i++) blocks[i] = i;
    shuffle(blocks, count);
    for (int i = 0; i < count && !error[0]; i++) {
        blockIdx = {blocks[i] % grid[0], blocks[i] / grid[0] % grid[1], blocks[i] / grid[0] / grid[1]};
        run_block(bytes);
    }
    free(blocks);
    free(shared);
    if (error[0])
        for (Fiber& fiber : fibers) fiber.started = false;
    return error[0] ? error : nullptr;
}

// What a kernel takes: p and the kind of element for pointers, the kind for numbers.
template <class T> constexpr char kind()
{
    using U = std::remove_const_t<T>;
    if (std::is_same_v<U, float>) return 'f';
    if (std::is_same_v<U, double>) return 'd';
    if (std::is_same_v<U, int> || std::is_same_v<U, int4>) return 'i';
    if (std::is_same_v<U, unsigned short>) return 'H';
    if (std::is_same_v<U, unsigned char>) return 'B';
    if (std::is_same_v<U, long long>) return 'l';
    return '?';
}

template <auto kernel> struct Call;
template <class... Parameters, void (*kernel)(Parameters...)> struct Call<kernel> {
    template <size_t... I> static void with(void** given, std::index_sequence<I...>)
    {
        kernel(*(Parameters*)given[I]...);
    }
    static void run(void** given) { with(given, std::index_sequence_for<Parameters...>()); }
    static const char* signature()
    {
        static char text[2 * sizeof...(Parameters) + 1];
        char* end = text;
        ((std::is_pointer_v<Parameters> ? void(*end++ = 'p') : void(),
          *end++ = kind<std::remove_pointer_t<Parameters>>()),
         ...);
        *end = 0;
        return text;
    }
};

}  // namespace emulator

// What the tests call of a kernel.
#define EMULATE(name)                                                                                                  \
    extern "C" const char* emulate_##name(void** given, const unsigned* grid, const unsigned* block, int bytes,       \
                                          uint64_t seed)                                                              \
    {                                                                                                                  \
        return emulator::launch(&emulator::Call<&name>::run, given, grid, block, bytes, seed);                         \
    }                                                                                                                  \
    extern "C" const char* signature_##name() { return emulator::Call<&name>::signature(); }

static inline void __syncthreads() { emulator::wait(emulator::block_barrier, emulator::alive); }
static inline void __syncwarp() { emulator::wait_for_warp(); }

template <class T> static T __shfl_sync(unsigned, T value, int source)
{
    return *(T*)emulator::gather(&value, sizeof value)[source & 31];
}
template <class T> static T __shfl_xor_sync(unsigned mask, T value, int bits)
{
    return __shfl_sync(mask, value, emulator::lane() ^ bits);
}
template <class T> static T __shfl_down_sync(unsigned mask, T value, int by)
{
    return __shfl_sync(mask, value, min(31, emulator::lane() + by));
}
template <class T> static void expect_aligned(const T* address)
{
    if (uintptr_t(address) % sizeof(T)) emulator::fail("a misaligned access");
}
template <class T> static T __ldg(const T* address)
{
    expect_aligned(address);
    return *address;
}

// What the helpers of csrc/ that wrap PTX do here.

static inline unsigned char* emulated_shared_memory() { return emulator::shared; }

static inline void emulated_cp_async(void* to, const void* from, int bytes, bool taken)
{
    emulator::Fiber& fiber = *emulator::current;
    if (uintptr_t(to) % bytes || (taken && uintptr_t(from) % bytes)) emulator::fail("a misaligned copy");
    if (fiber.count == emulator::COPIES) emulator::fail("too many copies under way");
    fiber.copies[fiber.count++] = {to, from, bytes, taken};
}

static inline void emulated_commit()
{
    emulator::Fiber& fiber = *emulator::current;
    if (fiber.groups == emulator::GROUPS) emulator::fail("too many groups of copies");
    fiber.ends[fiber.groups++] = fiber.count;
}

// Make all copies but those of the newest `most` groups: as late as a device may.
static inline void emulated_wait(int most)
{
    emulator::Fiber& fiber = *emulator::current;
    int now = fiber.groups - most;
    if (now <= 0) return;
    int made = fiber.ends[now - 1];
    for (int i = 0; i < made; i++) {
        const emulator::Copy& copy = fiber.copies[i];
        if (copy.taken)
            memcpy(copy.to, copy.from, copy.bytes);
        else
            memset(copy.to, 0, copy.bytes);
    }
    memmove(fiber.copies, fiber.copies + made, (fiber.count - made) * sizeof(emulator::Copy));
    fiber.count -= made;
    for (int g = now; g < fiber.groups; g++) fiber.ends[g - now] = fiber.ends[g] - made;
    fiber.groups -= now;
}

// Four 8x8 matrices of 16-bit elements; lane 8i + j holds the address of row j of matrix i.
static inline void emulated_ldmatrix(unsigned (&result)[4], const void* row)
{
    if (uintptr_t(row) % 16) emulator::fail("a misaligned row of ldmatrix");
    auto rows = emulator::gather(&row, sizeof row);
    int lane = emulator::lane();
    for (int i = 0; i < 4; i++) {
        const unsigned* words = *(const unsigned* const*)rows[8 * i + lane / 4];
        result[i] = words[lane % 4];
    }
}

// The same, each matrix transposed.
static inline void emulated_ldmatrix_transposed(unsigned (&result)[4], const void* row)
{
    if (uintptr_t(row) % 16) emulator::fail("a misaligned row of ldmatrix");
    auto rows = emulator::gather(&row, sizeof row);
    int lane = emulator::lane();
    for (int i = 0; i < 4; i++) {
        const unsigned short* first = *(const unsigned short* const*)rows[8 * i + lane % 4 * 2];
        const unsigned short* second = *(const unsigned short* const*)rows[8 * i + lane % 4 * 2 + 1];
        result[i] = first[lane / 4] | (unsigned)second[lane / 4] << 16;
    }
}

static inline float emulated_bfloat16(unsigned bits)
{
    unsigned word = bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}
static inline float emulated_float16(unsigned bits)
{
    unsigned short half = bits;
    _Float16 value;
    memcpy(&value, &half, 2);
    return value;
}
static inline float emulated_tf32(unsigned bits)
{
    bits &= 0xffffe000u;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Tensor cores cut off what does not fit, where everything else rounds.
static inline float toward_zero(double x)
{
    float y = float(x);
    return fabs(double(y)) > fabs(x) ? nextafterf(y, 0) : y;
}

// sum (16x8) += a (16xK) b (Kx8); a word of a and b holds K / 8 elements, read by `element(word, n)`.
template <int PER_WORD, class Element>
static void emulated_mma(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], Element element)
{
    unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    auto all = emulator::gather(mine, sizeof mine);
    int lane = emulator::lane();
    for (int n = 0; n < 4; n++) {
        int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
        double total = sum[n];
        for (int half = 0; half < 2; half++)
            for (int t = 0; t < 4; t++) {
                unsigned word_a = ((const unsigned*)all[row % 8 * 4 + t])[row / 8 + 2 * half];
                unsigned word_b = ((const unsigned*)all[column * 4 + t])[4 + half];
                for (int e = 0; e < PER_WORD; e++) total += double(element(word_a, e)) * element(word_b, e);
            }
        sum[n] = toward_zero(total);
    }
}

static inline unsigned short emulated_bits(int kind, float x)
{
    if (kind == 5) {
        _Float16 half = (_Float16)x;
        unsigned short bits;
        memcpy(&bits, &half, 2);
        return bits;
    }
    unsigned word;
    memcpy(&word, &x, 4);
    if (x != x) return (unsigned short)(word >> 16 | 0x40);
    return (unsigned short)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
