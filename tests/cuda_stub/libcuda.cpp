// A libcuda.so.1 that computes nothing: cuda.core and the cuda engine run their real code over it, without a GPU.
//
// It plays one Hopper card. Memory is the processor's, copies are made, kernels are loaded (their parameters are read
// from the cubin) and never run. What a driver refuses is refused; what it would let pass, though it is wrong, is a
// fault, told by stub_faults(). Declarations are those of cuda.h, whose handles are pointers here and enums int.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

enum Result { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
              INVALID_HANDLE = 400, NOT_FOUND = 500, LAUNCH_OUT_OF_RESOURCES = 701, NOT_SUPPORTED = 801 };

struct Parameter { size_t offset, size; };
struct Kernel { std::string name; std::vector<Parameter> parameters; int shared = 48 << 10; };
struct Library { std::string code; std::map<std::string, Kernel> kernels; };
struct Stream { uint64_t id; bool capturing; };

struct LaunchAttribute { int id; char padding[4]; union { char bytes[64]; int cooperative; } value; };
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    Stream* stream;
    LaunchAttribute* attributes;
    unsigned count;
};

static std::recursive_mutex mutex;
static std::map<void*, size_t> memory;
static std::set<void*> streams, graphs;
static std::string faults;
static long launches, cooperative_launches;
static uint64_t next_stream = 10;
static char context_object, pool_object;
static thread_local void* current;

static const char* text_of(const std::string& text) { static std::string kept; kept = text; return kept.c_str(); }

static int fault(int result, const std::string& what)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    faults += what + "\n";
    return result;
}

// A stream of ours that is there, or a default one of the current context.
static int check(const void* stream, const char* what)
{
    if ((size_t)stream <= 2) return current ? SUCCESS : fault(INVALID_CONTEXT, std::string(what) + ": no context");
    return streams.count((void*)stream) ? SUCCESS : fault(INVALID_HANDLE, std::string(what) + ": no such stream");
}

#define LOCK std::lock_guard<std::recursive_mutex> lock(mutex)
#define CHECK(stream) if (int result = check(stream, __func__)) return result

// --- The card ---

API int cuInit(unsigned) { return SUCCESS; }
API int cuDriverGetVersion(int* version) { *version = 13000; return SUCCESS; }
API int cuDeviceGetCount(int* count) { *count = 1; return SUCCESS; }
API int cuDeviceGet(int* device, int number) { *device = number; return number ? 101 : SUCCESS; }
API int cuDeviceGetName(char* name, int size, int) { snprintf(name, size, "a card that computes nothing"); return SUCCESS; }
API int cuGetExportTable(const void** table, const void*) { *table = nullptr; return NOT_FOUND; }
API int cuDeviceGetUuid_v2(void* uuid, int) { memset(uuid, 1, 16); return SUCCESS; }
API int cuDeviceGetAttribute(int* value, int attribute, int)
{
    static const std::map<int, int> known = {{8, 48 << 10}, {16, 132}, {75, 9}, {76, 0}, {97, 227 << 10}};
    auto found = known.find(attribute);  // shared memory, multiprocessors, sm_90, shared memory for those who ask
    *value = found == known.end() ? 1 : found->second;
    return SUCCESS;
}

// --- Contexts ---

API int cuDevicePrimaryCtxRetain(void** context, int) { *context = &context_object; return SUCCESS; }
API int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API int cuCtxGetCurrent(void** context) { *context = current; return SUCCESS; }
API int cuCtxSetCurrent(void* context) { current = context; return SUCCESS; }
API int cuCtxGetDevice(int* device) { *device = 0; return current ? SUCCESS : INVALID_CONTEXT; }
API int cuCtxGetDevice_v2(int* device, void*) { *device = 0; return SUCCESS; }
API int cuCtxGetStreamPriorityRange(int* least, int* greatest) { *least = *greatest = 0; return SUCCESS; }

// --- Streams and events ---

API int cuStreamCreateWithPriority(Stream** stream, unsigned, int)
{
    LOCK;
    if (!current) return fault(INVALID_CONTEXT, "cuStreamCreate: no context");
    streams.insert(*stream = new Stream{next_stream++, false});
    return SUCCESS;
}
API int cuStreamDestroy_v2(Stream* stream) { LOCK; CHECK(stream); streams.erase(stream); return SUCCESS; }
API int cuStreamGetCtx_v2(Stream* stream, void** context, void** green)
{
    CHECK(stream);
    *context = &context_object;
    if (green) *green = nullptr;
    return SUCCESS;
}
API int cuStreamGetCtx(Stream* stream, void** context) { return cuStreamGetCtx_v2(stream, context, nullptr); }
API int cuStreamGetDevice(Stream* stream, int* device) { CHECK(stream); *device = 0; return SUCCESS; }
API int cuStreamGetId(Stream* stream, uint64_t* id)
{
    CHECK(stream);
    *id = (size_t)stream <= 2 ? (size_t)stream : stream->id;
    return SUCCESS;
}
API int cuStreamGetFlags(Stream* stream, unsigned* flags) { CHECK(stream); *flags = 0; return SUCCESS; }
API int cuStreamIsCapturing(Stream* stream, int* status)
{
    CHECK(stream);
    *status = (size_t)stream > 2 && stream->capturing;
    return SUCCESS;
}
API int cuStreamSynchronize(Stream* stream) { CHECK(stream); return SUCCESS; }
API int cuStreamWaitEvent(Stream* stream, void*, unsigned) { CHECK(stream); return SUCCESS; }
API int cuEventCreate(void** event, unsigned) { *event = malloc(1); return SUCCESS; }
API int cuEventDestroy_v2(void* event) { free(event); return SUCCESS; }
API int cuEventRecord(void*, Stream* stream) { CHECK(stream); return SUCCESS; }

// --- Memory ---

API int cuDeviceGetMemPool(void** pool, int) { *pool = &pool_object; return SUCCESS; }
API int cuDeviceGetDefaultMemPool(void** pool, int) { *pool = &pool_object; return SUCCESS; }
API int cuMemPoolGetAttribute(void*, int, void* value) { memset(value, 0, 8); return SUCCESS; }
API int cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }
API int cuMemAllocFromPoolAsync(void** pointer, size_t size, void*, Stream* stream)
{
    LOCK;
    CHECK(stream);
    if (!size || posix_memalign(pointer, 512, size)) return size ? OUT_OF_MEMORY : INVALID_VALUE;
    memory[*pointer] = size;
    memset(*pointer, 0xff, size);  // NaN: what no kernel computed is not to look right by chance
    return SUCCESS;
}
API int cuMemFreeAsync(void* pointer, Stream* stream)
{
    LOCK;
    CHECK(stream);
    if (!memory.erase(pointer)) return fault(INVALID_VALUE, "cuMemFree: no such memory");
    free(pointer);
    return SUCCESS;
}
static bool is_there(const char* pointer, size_t size)
{
    LOCK;
    auto after = memory.upper_bound((void*)pointer);
    if (after == memory.begin()) return false;
    auto [start, length] = *--after;
    return pointer + size <= (char*)start + length;
}
API int cuMemsetD8Async(char* pointer, unsigned char value, size_t size, Stream* stream)
{
    CHECK(stream);
    if (!is_there(pointer, size)) return fault(INVALID_VALUE, "cuMemset: beyond the memory");
    memset(pointer, value, size);
    return SUCCESS;
}
API int cuMemcpyHtoDAsync_v2(char* to, const void* from, size_t size, Stream* stream)
{
    CHECK(stream);
    if (!is_there(to, size)) return fault(INVALID_VALUE, "cuMemcpyHtoD: beyond the memory");
    memcpy(to, from, size);
    return SUCCESS;
}
API int cuMemcpyDtoHAsync_v2(void* to, const char* from, size_t size, Stream* stream)
{
    CHECK(stream);
    if (!is_there(from, size)) return fault(INVALID_VALUE, "cuMemcpyDtoH: beyond the memory");
    memcpy(to, from, size);
    return SUCCESS;
}

// --- Kernels ---

template <class T> static T at(const std::string& code, size_t offset)
{
    T value;
    memcpy(&value, code.data() + offset, sizeof value);
    return value;
}

// Sections of a cubin, which is a 64-bit ELF file, by their names: where they begin, and their sizes.
static std::map<std::string, std::pair<size_t, size_t>> sections(const std::string& code)
{
    size_t table = at<uint64_t>(code, 0x28), size = at<uint16_t>(code, 0x3A), count = at<uint16_t>(code, 0x3C);
    size_t names = at<uint64_t>(code, table + at<uint16_t>(code, 0x3E) * size + 24);
    std::map<std::string, std::pair<size_t, size_t>> found;
    for (size_t entry = table; count--; entry += size)
        found[code.data() + names + at<uint32_t>(code, entry)] = {at<uint64_t>(code, entry + 24), at<uint64_t>(code, entry + 32)};
    return found;
}

// The attributes of a kernel: a format, a name and 16 bits, which with format 4 are the size of what follows.
static std::vector<Parameter> parameters_of(const std::string& code, size_t begin, size_t size)
{
    std::map<int, Parameter> found;
    for (size_t i = begin; i < begin + size;) {
        bool sized = code[i] == 4, parameter = code[i + 1] == 0x17;
        if (sized && parameter) found[at<uint16_t>(code, i + 8)] = {at<uint16_t>(code, i + 10), at<uint32_t>(code, i + 12) >> 18};
        i += 4 + (sized ? at<uint16_t>(code, i + 2) : 0);
    }
    std::vector<Parameter> result;
    for (auto& [number, parameter] : found) result.push_back(parameter);
    return result;
}

API int cuLibraryLoadData(Library** library, const char* code, int*, void**, unsigned, int*, void**, unsigned)
{
    if (memcmp(code, "\177ELF", 4)) return INVALID_IMAGE;
    size_t table, count, size;  // the table of sections is not always last; nor is anything told of the whole size
    memcpy(&table, code + 0x28, 8);
    count = *(const uint16_t*)(code + 0x3C), size = *(const uint16_t*)(code + 0x3A);
    size_t end = table + count * size;
    for (size_t n = 0; n < count; n++) {
        uint64_t offset, length;
        memcpy(&offset, code + table + n * size + 24, 8);
        memcpy(&length, code + table + n * size + 32, 8);
        bool in_file = *(const uint32_t*)(code + table + n * size + 4) != 8;  // SHT_NOBITS
        if (in_file && offset + length > end) end = offset + length;
    }
    *library = new Library{std::string(code, end), {}};
    return SUCCESS;
}
API int cuLibraryUnload(Library* library) { delete library; return SUCCESS; }
API int cuLibraryGetKernel(Kernel** kernel, Library* library, const char* name)
{
    LOCK;
    auto known = sections(library->code);
    auto text = known.find(std::string(".text.") + name), info = known.find(std::string(".nv.info.") + name);
    if (text == known.end() || info == known.end()) return NOT_FOUND;
    auto [begin, size] = info->second;
    auto slot = library->kernels.try_emplace(name, Kernel{name, parameters_of(library->code, begin, size)});
    *kernel = &slot.first->second;
    return SUCCESS;
}
API int cuKernelGetFunction(Kernel** function, Kernel* kernel) { *function = kernel; return SUCCESS; }
API int cuKernelGetParamInfo(Kernel* kernel, size_t number, size_t* offset, size_t* size)
{
    if (number >= kernel->parameters.size()) return INVALID_VALUE;
    *offset = kernel->parameters[number].offset;
    if (size) *size = kernel->parameters[number].size;
    return SUCCESS;
}
API int cuKernelSetAttribute(int attribute, int value, Kernel* kernel, int)
{
    if (attribute == 8) kernel->shared = value;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    return value <= 227 << 10 ? SUCCESS : INVALID_VALUE;
}
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Kernel* kernel, int threads, size_t shared)
{
    *count = (int)shared > kernel->shared ? 0 : 512 / threads;
    return SUCCESS;
}
API int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, Kernel* kernel, int threads, size_t shared, unsigned)
{
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(count, kernel, threads, shared);
}

// --- Launches and graphs ---

API int cuLaunchKernelEx(const LaunchConfig* config, Kernel* kernel, void** parameters, void**)
{
    LOCK;
    CHECK(config->stream);
    launches++;
    unsigned long threads = 1, blocks = 1;
    for (int axis = 0; axis < 3; axis++) threads *= config->block[axis], blocks *= config->grid[axis];
    if (!blocks || !threads || threads > 1024 || config->grid[1] > 65535 || config->grid[2] > 65535)
        return fault(INVALID_VALUE, kernel->name + ": a grid or a block that no card takes");
    if ((int)config->shared > kernel->shared)
        return fault(INVALID_VALUE, kernel->name + ": more shared memory than was asked for");
    if (kernel->parameters.size() && !parameters) return fault(INVALID_VALUE, kernel->name + ": no arguments");
    for (unsigned n = 0; n < config->count; n++) {
        if (config->attributes[n].id != 2 || !config->attributes[n].value.cooperative) continue;  // COOPERATIVE
        cooperative_launches++;
        if (blocks > 132 * 512 / threads) return fault(720, kernel->name + ": blocks that do not run at once");
    }
    const char* most = getenv("STUB_MOST_SHARED");  // of a launch that the card takes
    return most && (int)config->shared > atoi(most) ? LAUNCH_OUT_OF_RESOURCES : SUCCESS;
}
API int cuStreamBeginCapture_v2(Stream* stream, int) { LOCK; CHECK(stream); stream->capturing = true; return SUCCESS; }
API int cuStreamEndCapture(Stream* stream, void** graph)
{
    LOCK;
    CHECK(stream);
    stream->capturing = false;
    if (graph) *graph = malloc(1);
    return SUCCESS;
}
API int cuStreamGetCaptureInfo_v3(Stream* stream, int* status, uint64_t* id, void** graph, void** nodes, void** edges, size_t* count)
{
    CHECK(stream);
    *status = (size_t)stream > 2 && stream->capturing;
    if (id) *id = 1;
    if (graph) *graph = &pool_object;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return SUCCESS;
}
API int cuGraphInstantiateWithFlags(void** made, void*, uint64_t) { LOCK; graphs.insert(*made = malloc(1)); return SUCCESS; }
struct InstantiateParameters { uint64_t flags; void *stream, *node; int result; };
API int cuGraphInstantiateWithParams(void** made, void*, InstantiateParameters* parameters)
{
    parameters->result = 0;
    return cuGraphInstantiateWithFlags(made, nullptr, 0);
}
API int cuGraphDestroy(void*) { return SUCCESS; }
API int cuGraphExecDestroy(void* graph) { LOCK; graphs.erase(graph); return SUCCESS; }
API int cuGraphLaunch(void* graph, Stream* stream)
{
    LOCK;
    CHECK(stream);
    return graphs.count(graph) ? SUCCESS : fault(INVALID_HANDLE, "cuGraphLaunch: no such graph");
}
API int cuUserObjectCreate(void** object, void*, void (*)(void*), unsigned, unsigned) { *object = malloc(1); return SUCCESS; }
API int cuUserObjectRetain(void*, unsigned) { return SUCCESS; }
API int cuUserObjectRelease(void*, unsigned) { return SUCCESS; }
API int cuGraphReleaseUserObject(void*, void*, unsigned) { return SUCCESS; }
API int cuGraphRetainUserObject(void*, void*, unsigned, unsigned) { return SUCCESS; }

// --- Names ---

API int cuGetErrorName(int result, const char** text) { LOCK; *text = text_of("error " + std::to_string(result)); return SUCCESS; }
API int cuGetErrorString(int result, const char** text) { return cuGetErrorName(result, text); }
API int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status)
{
    static void* self = [] { Dl_info info; dladdr((void*)&cuInit, &info); return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD); }();
    *function = nullptr;
    for (const char* version : {"", "_v2", "_v3", "WithFlags"})
        if (!*function) *function = dlsym(self, (std::string(name) + version).c_str());
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
API int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) { return cuGetProcAddress_v2(name, function, version, flags, nullptr); }

// --- What the tests ask ---

API const char* stub_faults() { LOCK; return text_of(faults); }
API long stub_launches(bool cooperative) { return cooperative ? cooperative_launches : launches; }
