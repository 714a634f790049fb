// CUDA for a machine without a GPU: memory, streams and errors behave as on one, and kernels do
// nothing. Preloaded, it stands before the libraries of an unmodified torch, whose own work on CUDA
// (allocators, autocast, streams, launches) runs as ever. So tests see launches, copies, waiting,
// memory, devices and failures; values and times mean nothing.
//
// Each call is done when it returns. Calls that need no answer are made by conftest.py: they return
// 0, which means success.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include <sys/mman.h>

namespace {

constexpr int MOST_DEVICES = 8;
constexpr int CUBLAS_EXECUTION_FAILED = 13, CUDNN_EXECUTION_FAILED = 5000, CUDNN_FMA_MATH = 3;

int devices = 1;
size_t capacity = size_t{80} << 30;  // bytes of each device

struct Range {
    size_t size;
    int device;  // -1: page-locked memory of the host
};

std::mutex lock;
std::map<std::string, long> counts;
std::map<const char*, Range> ranges;
size_t held[MOST_DEVICES];
std::atomic<bool> has_context[MOST_DEVICES];
std::atomic<long> launches_left{-1};
std::atomic<int> dead{0};
thread_local int current = 0;
thread_local cudaError_t latest = cudaSuccess;
thread_local cudaStream_t recording = nullptr;  // what this thread records launches on
thread_local bool spoilt = false;               // that it waited meanwhile, as it may not
thread_local long recorded = 0;

void count(const std::string& what, long by = 1) {
    std::lock_guard<std::mutex> guard(lock);
    counts[what] += by;
}

cudaError_t told(cudaError_t error) {
    if (error != cudaSuccess) latest = error;
    return error;
}

// What every call on a device does: it opens a context there, and fails on a dead one.
cudaError_t used(const char* call) {
    count(call);
    has_context[current] = true;
    return told(static_cast<cudaError_t>(dead.load()));
}

cudaError_t waits(const char* call) {
    if (recording) return spoilt = true, told(cudaErrorStreamCaptureUnsupported);
    count("wait");
    return used(call);
}

// The launch at which a device dies succeeds, as launches on a real one are not waited for.
bool survives_launch() {
    if (recording) return ++recorded;
    count("kernel");
    has_context[current] = true;
    const bool was_alive = !dead;
    if (launches_left >= 0 && --launches_left < 0) dead = cudaErrorIllegalAddress;
    return was_alive;
}

cudaError_t launch() { return survives_launch() ? cudaSuccess : told(cudaError_t(dead.load())); }

Range* range_of(const void* pointer) {
    auto next = ranges.upper_bound(static_cast<const char*>(pointer));
    if (next == ranges.begin()) return nullptr;
    auto found = std::prev(next);
    const bool inside = static_cast<const char*>(pointer) < found->first + found->second.size;
    return inside ? &found->second : nullptr;
}

enum Kind { PAGEABLE, PINNED, DEVICE };

Kind kind_of(const void* pointer) {
    std::lock_guard<std::mutex> guard(lock);
    const Range* range = range_of(pointer);
    return !range ? PAGEABLE : range->device < 0 ? PINNED : DEVICE;
}

// What comes from a device is 0: no kernel has computed it, and old memory may hold anything. So
// nothing need be moved there, and a copy takes no time of the host's, as on a real one.
void copy(void* to, const void* from, size_t size) {
    if (kind_of(to) == DEVICE) return;
    if (kind_of(from) == DEVICE) std::memset(to, 0, size);
    else std::memmove(to, from, size);
}

cudaError_t allocate(void** result, size_t size, int device) {
    std::lock_guard<std::mutex> guard(lock);
    if (device >= 0 && held[device] + size > capacity) return told(cudaErrorMemoryAllocation);
    const size_t mapped = std::max<size_t>(size, 1);
    void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return told(cudaErrorMemoryAllocation);
    ranges[static_cast<char*>(memory)] = {mapped, device};
    if (device >= 0) held[device] += size;
    else counts["pinned bytes"] += size;
    *result = memory;
    return cudaSuccess;
}

cudaError_t release(void* memory) {
    std::lock_guard<std::mutex> guard(lock);
    auto found = ranges.find(static_cast<char*>(memory));
    if (found == ranges.end()) return memory ? told(cudaErrorInvalidValue) : cudaSuccess;
    if (found->second.device >= 0) held[found->second.device] -= found->second.size;
    else counts["pinned bytes"] -= found->second.size;
    munmap(memory, found->second.size);
    ranges.erase(found);
    return cudaSuccess;
}

void* handle() { return std::calloc(1, 4096); }

int made(void** result) {
    *result = handle();
    return 0;
}

}  // namespace

extern "C" {

// For the tests.

void nogpu_setup(int number, size_t bytes) {
    devices = number;
    capacity = bytes;
}
long nogpu_count(const char* what) {
    std::lock_guard<std::mutex> guard(lock);
    return counts[what];
}
void nogpu_reset() {
    std::lock_guard<std::mutex> guard(lock);
    for (auto& entry : counts)
        if (entry.first != "pinned bytes") entry.second = 0;
}
bool nogpu_has_context(int device) { return has_context[device]; }
void nogpu_die_after(long launches) { launches_left = launches; }

// Devices.

cudaError_t cudaGetDeviceCount(int* n) { return *n = devices, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device >= devices) return told(cudaErrorInvalidDevice);
    current = device;
    return used("cudaSetDevice");
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
    std::memset(found, 0, sizeof *found);
    std::strcpy(found->name, "No GPU");
    found->totalGlobalMem = capacity;
    found->major = 9;
    found->multiProcessorCount = 132;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = 2048;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->sharedMemPerBlock = 48 << 10;
    found->sharedMemPerBlockOptin = found->sharedMemPerMultiprocessor = 227 << 10;
    for (int axis = 0; axis < 3; ++axis) {
        found->maxThreadsDim[axis] = axis < 2 ? 1024 : 64;
        found->maxGridSize[axis] = axis ? 65535 : 2147483647;
    }
    found->unifiedAddressing = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
    cudaDeviceProp found;
    cudaGetDeviceProperties(&found, device);
    switch (which) {
        case cudaDevAttrComputeCapabilityMajor: *value = found.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = found.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = found.multiProcessorCount; break;
        case cudaDevAttrWarpSize: *value = found.warpSize; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = found.maxThreadsPerBlock; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrMaxGridDimX: *value = found.maxGridSize[0]; break;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
        default: *value = 1;
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* low, int* high) {
    return *low = *high = 0, cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return waits("cudaDeviceSynchronize"); }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    std::memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->binaryVersion = found->ptxVersion = 90;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
    return *n = 1, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t,
                                                                   unsigned) {
    return *n = 1, cudaSuccess;
}
// torch asks for calls of newer drivers, and does without them.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** call, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *call = nullptr;
    if (result) *result = cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// Errors. That of a dead device never goes away.

cudaError_t cudaPeekAtLastError() { return dead ? cudaError_t(dead.load()) : latest; }
cudaError_t cudaGetLastError() {
    const cudaError_t error = cudaPeekAtLastError();
    latest = cudaSuccess;
    return error;
}
const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorIllegalAddress ? "cudaErrorIllegalAddress" : "cudaError";
}
const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorIllegalAddress) return "an illegal memory access was encountered";
    return error == cudaErrorMemoryAllocation ? "out of memory" : "an error";
}

// Memory.

cudaError_t cudaMalloc(void** result, size_t size) {
    if (cudaError_t error = used("cudaMalloc")) return error;
    return allocate(result, size, current);
}
cudaError_t cudaFree(void* memory) {
    if (cudaError_t error = waits("cudaFree")) return error;
    return release(memory);
}
cudaError_t cudaHostAlloc(void** result, size_t size, unsigned) {
    if (cudaError_t error = used("cudaHostAlloc")) return error;
    return allocate(result, size, -1);
}
cudaError_t cudaFreeHost(void* memory) {
    if (cudaError_t error = waits("cudaFreeHost")) return error;
    return release(memory);
}
cudaError_t cudaHostRegister(void* memory, size_t size, unsigned) {
    if (cudaError_t error = used("cudaHostRegister")) return error;
    std::lock_guard<std::mutex> guard(lock);
    char* start = static_cast<char*>(memory);
    auto next = ranges.lower_bound(start);
    if (range_of(start) || (next != ranges.end() && next->first < start + size))
        return told(cudaErrorHostMemoryAlreadyRegistered);
    ranges[start] = {size, -1};
    counts["pinned bytes"] += size;
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* memory) {
    if (cudaError_t error = waits("cudaHostUnregister")) return error;
    std::lock_guard<std::mutex> guard(lock);
    auto found = ranges.find(static_cast<char*>(memory));
    if (found == ranges.end()) return told(cudaErrorHostMemoryNotRegistered);
    counts["pinned bytes"] -= found->second.size;
    ranges.erase(found);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = capacity;
    *free = capacity - held[current];
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
    std::memset(found, 0, sizeof *found);
    std::lock_guard<std::mutex> guard(lock);
    const Range* range = range_of(pointer);
    const bool on_device = range && range->device >= 0;
    found->type = !range ? cudaMemoryTypeUnregistered
                         : on_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    found->device = on_device ? range->device : 0;
    return cudaSuccess;
}
// The driver copies pageable memory by way of its own, and may wait for all earlier work first.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
    const bool pageable = size && (kind_of(to) == PAGEABLE || kind_of(from) == PAGEABLE);
    if (pageable) count("pageable copy");
    if (cudaError_t error = pageable ? waits("cudaMemcpyAsync") : used("cudaMemcpyAsync"))
        return error;
    copy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    if (cudaError_t error = waits("cudaMemcpy")) return error;
    copy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
    if (cudaError_t error = used("cudaMemcpy2DAsync")) return error;
    for (size_t row = 0; row < height; ++row)
        std::memmove(static_cast<char*>(to) + row * to_pitch,
                     static_cast<const char*>(from) + row * from_pitch, width);
    return cudaSuccess;
}
cudaError_t cudaMemset(void*, int, size_t) { return waits("cudaMemset"); }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return used("cudaMemsetAsync"); }

// Streams and events.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
    if (cudaError_t error = used("cudaStreamCreate")) return error;
    return *stream = static_cast<cudaStream_t>(handle()), cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* found) { return *found = 0, cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return used("cudaStreamQuery"); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return waits("cudaStreamSynchronize"); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    return used("cudaStreamWaitEvent");
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    const bool is_recorded = recording && stream == recording;
    *status = !is_recorded ? cudaStreamCaptureStatusNone
                           : spoilt ? cudaStreamCaptureStatusInvalidated
                                    : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t*) {
    if (id) *id = 1;
    return cudaStreamIsCapturing(stream, status);
}

// Graphs: a handle begins with the number of its kernels.

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    recording = stream, spoilt = false, recorded = 0;
    return used("cudaStreamBeginCapture");
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    recording = nullptr;
    if (spoilt) return told(cudaErrorStreamCaptureInvalidated);
    *graph = static_cast<cudaGraph_t>(handle());
    *reinterpret_cast<long*>(*graph) = recorded;
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* number) {
    return *number = *reinterpret_cast<long*>(graph), cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
    return *made = reinterpret_cast<cudaGraphExec_t>(graph), used("cudaGraphInstantiate");
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph,
                                          unsigned long long flags) {
    return cudaGraphInstantiate(made, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    count("cudaGraphLaunch");
    count("kernel in a graph", *reinterpret_cast<long*>(graph));
    return launch();
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    if (cudaError_t error = used("cudaEventCreate")) return error;
    return *event = static_cast<cudaEvent_t>(handle()), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return used("cudaEventRecord"); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) {
    return used("cudaEventRecord");
}
cudaError_t cudaEventQuery(cudaEvent_t) { return used("cudaEventQuery"); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return waits("cudaEventSynchronize"); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
    return *ms = 1, cudaSuccess;
}

// Kernels.

void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(handle()); }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { return launch(); }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
    return launch();
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return launch(); }

// cuBLAS and cuDNN, the latter by its older interface (TORCH_CUDNN_V8_API_DISABLED).

#define MATMUL(name) \
    int name() { return survives_launch() ? 0 : CUBLAS_EXECUTION_FAILED; }
#define NET(name) \
    int name() { return survives_launch() ? 0 : CUDNN_EXECUTION_FAILED; }
#define MAKES(name) \
    int name(void** result) { return made(result); }

MATMUL(cublasGemmEx)
MATMUL(cublasSgemm_v2)
MATMUL(cublasSgemmEx)
MATMUL(cublasSgemv_v2)
MATMUL(cublasGemmStridedBatchedEx)
MATMUL(cublasSgemmStridedBatched)
MATMUL(cublasLtMatmul)
MAKES(cublasCreate_v2)
MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatmulPreferenceCreate)
MAKES(cublasLtMatrixLayoutCreate)
int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int,
                                   void* algorithm, int* found) {
    std::memset(algorithm, 0, 64);
    *found = 1;
    return 0;
}

MAKES(cudnnCreate)
MAKES(cudnnCreateTensorDescriptor)
MAKES(cudnnCreateFilterDescriptor)
MAKES(cudnnCreateConvolutionDescriptor)
MAKES(cudnnCreateActivationDescriptor)
NET(cudnnConvolutionForward)
NET(cudnnConvolutionBiasActivationForward)
NET(cudnnBatchNormalizationForwardInference)
size_t cudnnGetVersion() { return 91900; }
size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
const char* cudnnGetErrorString(int) { return "CUDNN_STATUS_EXECUTION_FAILED"; }
void cudnnGetLastErrorString(char* text, size_t size) {
    if (size) *text = 0;
}
struct Algorithm {
    int algorithm, status;
    float time;
    size_t memory;
    int determinism, math, reserved[3];
};
int cudnnGetConvolutionForwardAlgorithm_v7(void*, void*, void*, void*, void*, int, int* found,
                                           Algorithm* first) {
    *found = 1;
    *first = {1, 0, 0, 0, 0, CUDNN_FMA_MATH, {}};
    return 0;
}
int cudnnFindConvolutionForwardAlgorithmEx(void*, void*, const void*, void*, const void*, void*,
                                           void*, void*, int, int* found, Algorithm* first, void*,
                                           size_t) {
    count("search");
    *found = 1;
    *first = {1, 0, 0, 0, 0, CUDNN_FMA_MATH, {}};
    return 0;
}
int cudnnGetConvolutionForwardWorkspaceSize(void*, void*, void*, void*, void*, int, size_t* size) {
    return *size = 0;
}

// The driver, whose library torch looks for by name.

int cuDevicePrimaryCtxGetState(int device, unsigned*, int* active) {
    return *active = has_context[device], 0;
}
int cuCtxGetCurrent(void** context) {
    return *context = has_context[current] ? &has_context[current] : nullptr, 0;
}
int cuGetErrorString(int, const char** text) { return *text = "an error of the driver", 0; }

}  // extern "C"
