// CUDA C++ as C++ of the processor: the threads of a block are fibers. Blocks run one after another, those of a
// cooperative launch all at once.
//
// Included before a source of csrc/ (-include), which is then compiled with -DFASTCLSTM_EMULATOR. Threads and blocks
// run in a shuffled order, each until its next barrier, and warps leave others behind, so that what needs a barrier and
// has none goes wrong.
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

const int MOST_THREADS = 1024, STACK = 128 << 10, COPIES = 160, GROUPS = 16, SUMS = 4, PRODUCTS = 64;
const int WARPS = MOST_THREADS / 32;
const unsigned SHARED_ADDRESS = 1024 + 128;  // where shared memory starts: aligned as far as kernels ask for it

struct Copy {
    void* to;
    const void* from;
    int bytes, taken;
};

struct Piece {
    int at, bytes;
};

// Sums that products under way own: they are here, and in the thread's registers there is POISON, a signalling NaN that
// arithmetic changes.
struct Owned {
    float* sum;
    int count;
    float values[128];
};
const unsigned POISON = 0x7fa0dead;

// What a thread has to do with products of its warpgroup.
struct Multiplying {
    Piece written[COPIES];  // by its copies to shared memory, and not yet shown to the async proxy
    int written_count;
    bool fenced;  // since wgmma.fence no register of a product was free
    int issued, finished, ends[GROUPS], groups;
    Owned owned[SUMS];
    int owned_count;
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
    Multiplying multiplying;
};

struct Barrier {
    int arrived, generation;
};

struct Order {
    unsigned long long a, b;         // descriptors
    int columns, accumulate, bytes;  // `bytes` of an element
    float (*element)(const unsigned char*);
};

// A product of a warpgroup: what its threads ask for, and its operands as they are when the first of them waits for it.
struct Product {
    Order order;
    const unsigned* registers[128];  // a may come from here,
    unsigned given[128][4];          // which held this
    float* sums[128];
    int issued, finished;  // threads
    bool read;
    float rows[64][16], weights[256][16];
};

// Beside the shared memory of a block: how the async proxy sees it, how many copies to each word of it are under way and
// how many products that read it; and the products.
struct Shadow {
    unsigned char* shown;
    short *copying, *reading;
    int size;
    Barrier barriers[MOST_THREADS / 128];
    Product products[MOST_THREADS / 128][PRODUCTS];
};

static void reset(Shadow& shadow, int shared_bytes, int threads)
{
    int words = shared_bytes / 4 + 1;
    shadow.size = shared_bytes;
    shadow.shown = (unsigned char*)realloc(shadow.shown, words * 4);
    shadow.copying = (short*)realloc(shadow.copying, words * sizeof(short));
    shadow.reading = (short*)realloc(shadow.reading, words * sizeof(short));
    memset(shadow.shown, 0xff, shared_bytes);
    memset(shadow.copying, 0, words * sizeof(short));
    memset(shadow.reading, 0, words * sizeof(short));
    for (int w = 0; w * 128 < threads; w++) {
        shadow.barriers[w] = {};
        for (Product& product : shadow.products[w]) product.issued = product.finished = 0;
    }
}

struct Block {
    Fiber fibers[MOST_THREADS];
    int order[MOST_THREADS], alive, warp_alive[WARPS];
    Barrier barrier, warp_barriers[WARPS];
    unsigned char exchange[2][WARPS][32][64];
    unsigned char *stacks, *shared;
    Shadow shadow;
    dim3 index;
};

// An array that a cooperative launch is given; marks: which of its bytes passed through a cache that is not kept
// coherent.
struct Region {
    const unsigned char* bytes;
    size_t size;
    unsigned char* marks;
};

static Block** blocks;  // as many as any launch has had at once, zeroed memory at first
static int blocks_made, threads;
static Block* block;  // the current one
static Fiber* current;
static const Region* regions;
static int region_count;
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
static void wait_for_warp() { wait(block->warp_barriers[warp()], block->warp_alive[warp()]); }

// Every lane gives `bytes` bytes and sees those of all lanes until it comes here again: there are two places in turn.
static unsigned char (*gather(const void* mine, int bytes))[64]
{
    auto place = block->exchange[current->exchanges++ % 2][warp()];
    memcpy(place[lane()], mine, bytes);
    wait_for_warp();
    return place;
}

static void open(Barrier& barrier, int expected)
{
    if (!expected || barrier.arrived < expected) return;
    barrier.arrived = 0;
    barrier.generation++;
}

static void finished()
{
    if (current->multiplying.finished < current->multiplying.issued) fail("a product is not waited for");
    current->done = true;
    open(block->barrier, --block->alive);
    open(block->warp_barriers[warp()], --block->warp_alive[warp()]);
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
    fiber.start.uc_stack.ss_sp = block->stacks + size_t(fiber.thread) * STACK;
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
static void shuffle_threads(int* order)
{
    int warps = (threads + 31) / 32, first[WARPS];
    for (int w = 0; w < warps; w++) first[w] = w;
    shuffle(first, warps);
    for (int w = 0, n = 0; w < warps; w++) {
        int count = min(32, threads - first[w] * 32);
        for (int i = 0; i < count; i++) order[n + i] = first[w] * 32 + i;
        shuffle(order + n, count);
        n += count;
    }
}

static void* memory(size_t bytes)
{
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) abort();
    return mapped;
}

// Block number n of those that are there at once, with a new index.
static Block& ready(int n, int index, int shared_bytes)
{
    if (n == blocks_made) {
        blocks = (Block**)realloc(blocks, ++blocks_made * sizeof(Block*));
        blocks[n] = (Block*)memory(sizeof(Block));
        blocks[n]->stacks = (unsigned char*)memory(size_t(MOST_THREADS) * STACK);
    }
    Block& made = *blocks[n];
    made.index = {index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y};
    free(made.shared);
    made.shared = (unsigned char*)aligned_alloc(128, (shared_bytes + 64 + 127) / 128 * 128);
    memset(made.shared, 0xff, shared_bytes + 64);
    reset(made.shadow, shared_bytes, threads);
    made.alive = threads;
    made.barrier = {};
    for (int w = 0; w * 32 < threads; w++) {
        made.warp_barriers[w] = {};
        made.warp_alive[w] = min(32, threads - w * 32);
    }
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = made.fibers[i];
        fiber.done = false;
        fiber.waits = nullptr;
        fiber.count = fiber.groups = 0;
        fiber.multiplying = {};
        fiber.exchanges = 0;
        fiber.thread = i;
        fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    }
    shuffle_threads(made.order);
    return made;
}

// Run every thread of a block that does not wait, or some of them, until its next barrier; whether there was one. The
// warps that are `resting` are left behind.
static bool sweep(Block& now, unsigned resting, bool some)
{
    bool progress = false;
    block = &now;
    blockIdx = now.index;
    for (int i = 0; i < threads && !error[0]; i++) {
        Fiber& fiber = now.fibers[now.order[i]];
        if (fiber.done || (fiber.waits && *fiber.waits == fiber.seen)) continue;
        if (resting >> now.order[i] / 32 % 31 & 1 || (some && draw(4) == 0)) continue;
        enter(fiber);
        progress = true;
    }
    return progress;
}

static void look_at_shared(const Block& done, int shared_bytes)
{
    for (int i = 0; i < 64; i++)
        if (done.shared[shared_bytes + i] != 0xff && !error[0])
            snprintf(error, sizeof error, "a write beyond the %d bytes of shared memory", shared_bytes);
}

// Blocks at once, each for some sweeps before the next one: some run far ahead of others.
static void run_together(int* numbers, int count, int shared_bytes)
{
    for (int n = 0; n < count; n++) ready(n, n, shared_bytes);
    for (bool progress = true; !error[0];) {
        bool drawn = progress;  // else one sweep for each
        int alive = 0;
        progress = false;
        shuffle(numbers, count);
        for (int n = 0; n < count; n++) {
            Block& now = *blocks[numbers[n]];
            for (int sweeps = drawn ? draw(8) : 1; now.alive && sweeps; sweeps--) progress |= sweep(now, 0, drawn);
            alive += now.alive;
        }
        if (!alive) break;
        if (!progress && !drawn && !error[0])
            snprintf(error, sizeof error, "a barrier is not reached by every thread and block");
    }
    for (int n = 0; n < count; n++) look_at_shared(*blocks[n], shared_bytes);
}

static void run_alone(int index, int shared_bytes)
{
    Block& alone = ready(0, index, shared_bytes);
    while (alone.alive && !error[0])
        if (!sweep(alone, draw(1u << 31), false) && !sweep(alone, 0, false) && !error[0])
            snprintf(error, sizeof error, "a barrier is not reached by every thread");
    look_at_shared(alone, shared_bytes);
}

static const char* launch(void (*kernel)(void**), void** given, const unsigned* grid, const unsigned* block_size,
                          int bytes, uint64_t new_seed, int cooperative, const Region* watched, int watched_count)
{
    error[0] = 0;
    seed = new_seed;
    body = kernel;
    arguments = given;
    regions = watched, region_count = watched_count;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block_size[0], block_size[1], block_size[2]};
    threads = block_size[0] * block_size[1] * block_size[2];
    if (threads > MOST_THREADS) return "more than 1024 threads a block";
    int count = grid[0] * grid[1] * grid[2];
    int* numbers = (int*)malloc(count * sizeof(int));
    for (int i = 0; i < count; i++) numbers[i] = i;
    shuffle(numbers, count);
    if (cooperative)
        run_together(numbers, count, bytes);
    else
        for (int i = 0; i < count && !error[0]; i++) run_alone(numbers[i], bytes);
    free(numbers);
    if (error[0])
        for (int n = 0; n < blocks_made; n++)
            for (Fiber& fiber : blocks[n]->fibers) fiber.started = false;
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
                                          uint64_t seed, int cooperative, const emulator::Region* watched, int count) \
    {                                                                                                                  \
        return emulator::launch(&emulator::Call<&name>::run, given, grid, block, bytes, seed, cooperative, watched,   \
                                count);                                                                                \
    }                                                                                                                  \
    extern "C" const char* signature_##name() { return emulator::Call<&name>::signature(); }

static inline void __syncthreads() { emulator::wait(emulator::block->barrier, emulator::block->alive); }
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

// The bytes may come from a cache that other multiprocessors' writes do not reach.
static void mark(const void* address, size_t bytes)
{
    for (int n = 0; n < emulator::region_count; n++) {
        const emulator::Region& region = emulator::regions[n];
        size_t at = (const unsigned char*)address - region.bytes;
        if (at < region.size) memset(region.marks + at, 1, bytes);
    }
}
template <class T> static T __ldg(const T* address)
{
    expect_aligned(address);
    mark(address, sizeof(T));
    return *address;
}

// What the helpers of csrc/ that wrap PTX do here.

static inline unsigned char* emulated_shared_memory() { return emulator::block->shared; }

template <class T> static T emulated_load_late(const T* address)
{
    expect_aligned(address);
    return *address;
}

// Wait until a count of all blocks is reached.
static inline void emulated_wait_for(const int* arrived, int count)
{
    while (*arrived < count) {
        emulator::current->waits = arrived;
        emulator::current->seen = *arrived;
        emulator::leave();
    }
}

namespace emulator {

static long offset_of(const void* pointer) { return (const unsigned char*)pointer - block->shared; }

static bool is_copied(long at, int bytes)
{
    bool copied = false;
    for (int i = 0; i < bytes / 4; i++) copied = copied || block->shadow.copying[at / 4 + i];
    return copied;
}

static void start_copy(const void* to, int bytes)
{
    long at = offset_of(to);
    if (at < 0 || at + bytes > block->shadow.size) fail("a copy beyond shared memory");
    for (int i = 0; i < bytes / 4; i++) {
        if (block->shadow.reading[at / 4 + i]) fail("a copy to what a product still reads");
        block->shadow.copying[at / 4 + i]++;
    }
}

static void end_copy(const Copy& copy)
{
    int at = int(offset_of(copy.to));
    for (int i = 0; i < copy.bytes / 4; i++) block->shadow.copying[at / 4 + i]--;
    Multiplying& mine = current->multiplying;
    mine.written[mine.written_count++ % COPIES] = {at, copy.bytes};
}

}  // namespace emulator

static inline void emulated_cp_async(void* to, const void* from, int bytes, bool taken)
{
    emulator::Fiber& fiber = *emulator::current;
    if (uintptr_t(to) % bytes || (taken && uintptr_t(from) % bytes)) emulator::fail("a misaligned copy");
    if (fiber.count == emulator::COPIES) emulator::fail("too many copies under way");
    emulator::start_copy(to, bytes);
    if (bytes < 16 && taken) mark(from, bytes);
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
        emulator::end_copy(copy);
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
    if (emulator::is_copied(emulator::offset_of(row), 16)) emulator::fail("ldmatrix reads what is still being copied");
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

// Products of a warpgroup, by the rules that csrc/warpgroup.cuh names. They run as late as they may; what a kernel must
// not do meanwhile, and what it must have done before, is checked.

static inline unsigned emulated_shared_address(const void* pointer)
{
    return unsigned(emulator::offset_of(pointer)) + emulator::SHARED_ADDRESS;
}

// What this thread's copies have written so far is shown to the async proxy; where it wrote more than can be
// remembered, the oldest is not.
static inline void emulated_fence_async_proxy()
{
    emulator::Multiplying& mine = emulator::current->multiplying;
    for (int i = 0; i < min(mine.written_count, emulator::COPIES); i++) {
        const emulator::Piece& piece = mine.written[i];
        memcpy(emulator::block->shadow.shown + piece.at, emulator::block->shared + piece.at, piece.bytes);
    }
    mine.written_count = 0;
}

static inline void emulated_wgmma_fence() { emulator::current->multiplying.fenced = true; }

static inline void emulated_wgmma_commit()
{
    emulator::Multiplying& mine = emulator::current->multiplying;
    if (mine.groups == emulator::GROUPS) emulator::fail("too many groups of products");
    mine.ends[mine.groups++] = mine.issued;
}

namespace emulator {

// Where in shared memory 16 bytes of a row's 32 bytes of depth stand.
static int operand_at(unsigned long long descriptor, int row, int piece)
{
    unsigned start = unsigned(descriptor & 0x3fff) << 4, stride = unsigned(descriptor >> 32 & 0x3fff) << 4;
    unsigned leading = unsigned(descriptor >> 16 & 0x3fff) << 4, address;
    if (descriptor >> 62 > 1) fail("only the swizzle of 128 bytes is emulated, and none");
    if (descriptor & (0x3ffull << 52 | 7ull << 46 | 3ull << 30 | 3ull << 14)) fail("unknown bits in a descriptor");
    if (descriptor >> 62) {
        if (start & 0x380 || stride & 0x3ff || descriptor >> 49 & 7) fail("an atom does not start at 1024 bytes");
        if (start % 128 + 32 > 128) fail("a product reads beyond its row");
        address = start + row / 8 * stride + row % 8 * 128 + piece * 16;
        address ^= address >> 3 & 0x70;
    } else {
        if (descriptor >> 49 & 7) fail("a base offset without a swizzle");
        address = start + row / 8 * stride + row % 8 * 16 + piece * leading;
    }
    int at = int(address - SHARED_ADDRESS);
    if (at < 0 || at + 16 > block->shadow.size) fail("a product reads beyond shared memory");
    return at;
}

static void check_shown(int at)
{
    if (is_copied(at, 16)) fail("a product reads what is still being copied");
    if (memcmp(block->shared + at, block->shadow.shown + at, 16)) fail("a product reads what no fence.proxy.async has shown it");
}

template <class Visit> static void visit_operands(const Product& product, Visit visit)
{
    for (int row = 0; row < 64 && !product.registers[0]; row++)
        for (int piece = 0; piece < 2; piece++) visit(operand_at(product.order.a, row, piece), row, piece, true);
    for (int column = 0; column < product.order.columns; column++)
        for (int piece = 0; piece < 2; piece++) visit(operand_at(product.order.b, column, piece), column, piece, false);
}

static void issue(const Order& order, const unsigned* a, float* sum)
{
    Multiplying& mine = current->multiplying;
    int group = current->thread / 128, t = current->thread % 128;
    Product& product = block->shadow.products[group][mine.issued % PRODUCTS];
    if (threads % 128) fail("a block is not of whole warpgroups");
    if (!mine.fenced) fail("wgmma.fence is missing");
    if (product.issued == 128) fail("too many products under way");
    if (!product.issued) product.order = order, product.read = false;
    if (memcmp(&product.order, &order, sizeof order))
        fail("the threads of a warpgroup issue different products");
    product.registers[t] = a;
    if (a) memcpy(product.given[t], a, sizeof product.given[t]);
    product.sums[t] = sum;
    int n = 0, count = order.columns / 2;
    while (n < mine.owned_count && mine.owned[n].sum != sum) n++;
    if (n == SUMS) fail("too many sums under way");
    if (n == mine.owned_count) {
        mine.owned_count++;
        mine.owned[n].sum = sum, mine.owned[n].count = count;
        memcpy(mine.owned[n].values, sum, count * sizeof *sum);
        for (int i = 0; i < count; i++) memcpy(sum + i, &POISON, sizeof POISON);
    }
    mine.issued++;
    if (++product.issued == 128)
        visit_operands(product, [](int at, int, int, bool) {
            check_shown(at);
            for (int i = 0; i < 4; i++) block->shadow.reading[at / 4 + i]++;
        });
    wait(block->shadow.barriers[group], 128);
}

static void read_operands(Product& product)
{
    const Order& order = product.order;
    int each = 16 / order.bytes;
    visit_operands(product, [&](int at, int row, int piece, bool of_a) {
        check_shown(at);
        for (int i = 0; i < each; i++)
            (of_a ? product.rows : product.weights)[row][piece * each + i] =
                order.element(block->shadow.shown + at + i * order.bytes);
    });
    for (int t = 0; t < 128 && product.registers[0]; t++)
        for (int i = 0; i < 4; i++)
            product.rows[t / 32 * 16 + t % 32 / 4 + i % 2 * 8][t % 4 + i / 2 * 4] =
                order.element((const unsigned char*)&product.given[t][i]);
    product.read = true;
}

static void finish(Product& product)
{
    Multiplying& mine = current->multiplying;
    int t = current->thread % 128, depth = 32 / product.order.bytes;
    if (!product.read) read_operands(product);
    if (product.registers[t] && memcmp(product.registers[t], product.given[t], sizeof product.given[t]))
        fail("registers of a product were changed while it was under way");
    Owned* owned = mine.owned;
    while (owned->sum != product.sums[t]) owned++;
    for (int i = 0; i < owned->count; i++) {
        int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
        double total = product.order.accumulate ? owned->values[i] : 0;
        for (int k = 0; k < depth; k++) total += double(product.rows[row][k]) * product.weights[column][k];
        owned->values[i] = toward_zero(total);
    }
    if (++product.finished < 128) return;
    visit_operands(product, [](int at, int, int, bool) {
        for (int i = 0; i < 4; i++) block->shadow.reading[at / 4 + i]--;
    });
    product.issued = product.finished = 0;
}

// Give sums back that no product owns any more.
static void give_back()
{
    Multiplying& mine = current->multiplying;
    int group = current->thread / 128, t = current->thread % 128, left = 0;
    for (int n = 0; n < mine.owned_count; n++) {
        Owned& owned = mine.owned[n];
        bool under_way = false;
        for (int p = mine.finished; p < mine.issued; p++)
            under_way = under_way || block->shadow.products[group][p % PRODUCTS].sums[t] == owned.sum;
        for (int i = 0; i < owned.count; i++)
            if (memcmp(owned.sum + i, &POISON, sizeof POISON)) fail("a sum was changed while a product owned it");
        if (under_way)
            mine.owned[left++] = owned;
        else
            memcpy(owned.sum, owned.values, owned.count * sizeof *owned.sum);
    }
    mine.owned_count = left;
}

}  // namespace emulator

// Wait for all products but those of the newest `most` groups.
static inline void emulated_wgmma_wait(int most)
{
    emulator::Multiplying& mine = emulator::current->multiplying;
    int group = emulator::current->thread / 128, now = mine.groups - most;
    if (now > 0) {
        for (; mine.finished < mine.ends[now - 1]; mine.finished++)
            emulator::finish(emulator::block->shadow.products[group][mine.finished % emulator::PRODUCTS]);
        for (int g = now; g < mine.groups; g++) mine.ends[g - now] = mine.ends[g];
        mine.groups -= now;
        emulator::give_back();
    }
    mine.fenced = false;
}

template <int N>
static void emulated_wgmma(float (&sum)[N / 8][4], const unsigned* a, unsigned long long a_descriptor,
                           unsigned long long b_descriptor, int accumulate, int bytes,
                           float (*element)(const unsigned char*))
{
    emulator::Order order = {a_descriptor, b_descriptor, N, accumulate, bytes, element};
    emulator::issue(order, a, sum[0]);
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
