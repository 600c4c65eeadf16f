// Devices, memory, the queue, and products by cuBLAS: what there is of CUDA's libraries in the
// runtime.
#include "kernels/cuda/device.h"

#ifndef RABIT_CUDA_EMULATOR
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#endif

#include <algorithm>

#include "kernels/api/gpu.h"

namespace rabit::gpu {
namespace {

constexpr int kOldestMajor = 7, kOldestMinor = 5;

Status checked(cudaError_t error, const char* what) {
  if (error == cudaSuccess) {
    return {};
  }
  cudaGetLastError();  // told here, and not again by the next call
  return Error{std::string("the GPU failed, ") + what + ": " + cudaGetErrorString(error)};
}

std::string mebibytes(uint64_t bytes) { return std::to_string((bytes + 1048575) >> 20) + " MiB"; }

/// An index of cuBLAS's own, of 32 bits.
int index(int64_t value) { return static_cast<int>(value); }

}  // namespace

Result<std::vector<DeviceInfo>> devices() {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    cudaGetLastError();
    return Error{std::string("no NVIDIA GPU can be used here: ") +
                 (error != cudaSuccess ? cudaGetErrorString(error) : "there is none")};
  }
  std::vector<DeviceInfo> all;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    RABIT_CHECK(checked(cudaGetDeviceProperties(&properties, i), "asked what it is"));
    all.push_back({.index = i,
                   .name = properties.name,
                   .major = properties.major,
                   .minor = properties.minor,
                   .multiprocessors = properties.multiProcessorCount,
                   .cooperative = properties.cooperativeLaunch != 0,
                   .block_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin),
                   .total_bytes = properties.totalGlobalMem});
  }
  return all;
}

Result<DeviceInfo> use_device(int32_t index) {
  RABIT_ASSIGN(const std::vector<DeviceInfo> all, devices());
  if (index < 0 || index >= static_cast<int32_t>(all.size())) {
    std::string names;
    for (const DeviceInfo& device : all) {
      names += (names.empty() ? "" : ", ") + device.label();
    }
    return Error{"there is no device cuda:" + std::to_string(index) + "; there are " + names};
  }
  DeviceInfo device = all[static_cast<size_t>(index)];
  RABIT_CHECK(checked(cudaSetDevice(index), "chosen"));
  const bool old = std::pair(device.major, device.minor) < std::pair(kOldestMajor, kOldestMinor);
  if (old || !code_fits()) {
    return Error{device.label() + " has compute capability " + std::to_string(device.major) + "." +
                 std::to_string(device.minor) + ", for which this rabit has no code" +
                 (old ? ": 7.5 is the oldest"
                      : ": build with -DCMAKE_CUDA_ARCHITECTURES=" + std::to_string(device.major) +
                            std::to_string(device.minor))};
  }
  size_t free = 0, total = 0;
  RABIT_CHECK(checked(cudaMemGetInfo(&free, &total), "asked for its memory"));
  device.free_bytes = free;
  device.warpgroups = device.major == 9 && has_warpgroups();
  return device;
}

Status activate(int32_t index) { return checked(cudaSetDevice(index), "chosen"); }

void Memory::Free::operator()(void* p) const { cudaFree(p); }

Result<Memory> Memory::make(uint64_t bytes, const char* what) {
  void* data = nullptr;
  if (cudaMalloc(&data, std::max<uint64_t>(bytes, 1)) != cudaSuccess) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    const bool known = cudaMemGetInfo(&free, &total) == cudaSuccess;
    return Error{"not enough memory on the GPU for " + std::string(what) + ": " + mebibytes(bytes) +
                 " are needed" + (known ? ", " + mebibytes(free) + " are free" : "")};
  }
  Memory memory;
  memory.data_.reset(data);
  memory.bytes_ = bytes;
  return memory;
}

void HostMemory::Free::operator()(void* p) const { cudaFreeHost(p); }

Result<HostMemory> HostMemory::make(uint64_t bytes, const char* what) {
  void* data = nullptr;
  if (cudaMallocHost(&data, std::max<uint64_t>(bytes, 1)) != cudaSuccess) {
    cudaGetLastError();
    return Error{"not enough memory of the host that a GPU can copy to for " + std::string(what) +
                 ": " + mebibytes(bytes) + " are needed"};
  }
  HostMemory memory;
  memory.data_.reset(data);
  return memory;
}

struct Queue::State {
  cudaStream_t stream = nullptr;
  cublasHandle_t blas = nullptr;
};

void Queue::Free::operator()(State* state) const {
  if (state->stream != nullptr) {
    cudaStreamSynchronize(state->stream);
  }
  if (state->blas != nullptr) {
    cublasDestroy(state->blas);
  }
  if (state->stream != nullptr) {
    cudaStreamDestroy(state->stream);
  }
  delete state;
}

Result<Queue> Queue::make() {
  Queue queue;
  queue.state_.reset(new State);
  State& state = *queue.state_;
  RABIT_CHECK(checked(cudaStreamCreateWithFlags(&state.stream, cudaStreamNonBlocking),
                      "asked for a queue of work"));
  if (cublasCreate(&state.blas) != CUBLAS_STATUS_SUCCESS ||
      cublasSetStream(state.blas, state.stream) != CUBLAS_STATUS_SUCCESS) {
    return Error{"cuBLAS cannot start on the GPU: its memory may be full"};
  }
  return queue;
}

Stream Queue::stream() const { return state_->stream; }

Status Queue::upload(void* to, const void* from, uint64_t bytes) const {
  return checked(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, state_->stream),
                 "copied to");
}

Status Queue::upload(void* to, const HostMemory& from, uint64_t bytes) const {
  return upload(to, from.as<void>(), bytes);
}

Status Queue::download(HostMemory& to, const void* from, uint64_t bytes) const {
  return checked(
      cudaMemcpyAsync(to.as<void>(), from, bytes, cudaMemcpyDeviceToHost, state_->stream),
      "copied from");
}

Status Queue::clear(void* at, uint64_t bytes) const {
  return checked(cudaMemsetAsync(at, 0, bytes, state_->stream), "cleared memory of");
}

Status Queue::wait() const { return checked(cudaStreamSynchronize(state_->stream), "at its work"); }

Status Queue::multiply(const Product& p) const {
  // cuBLAS takes columns: W as it lies is (d_in, d_out) by columns, x (d_in, tokens), y (d_out,
  // tokens).
  const float one = 1.0F, beta = p.add ? 1.0F : 0.0F;
  const cublasStatus_t status = cublasGemmEx(
      state_->blas, CUBLAS_OP_T, CUBLAS_OP_N, index(p.d_out), index(p.tokens), index(p.d_in), &one,
      p.w, CUDA_R_16F, index(p.w_stride), p.x, CUDA_R_16F, index(p.d_in), &beta, p.y, CUDA_R_32F,
      index(p.y_stride), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
  if (status != CUBLAS_STATUS_SUCCESS) {
    return Error{"cuBLAS refused a product of " + std::to_string(p.d_out) + " by " +
                 std::to_string(p.d_in) + " weights with " + std::to_string(p.tokens) +
                 " tokens: status " + std::to_string(static_cast<int>(status))};
  }
  return {};
}

#ifdef RABIT_CUDA_EMULATOR
void Recording::Free::operator()(void* p) const { delete static_cast<std::function<Status()>*>(p); }

Result<Recording> Queue::record(const std::function<Status()>& work) const {
  Recording recording;
  recording.graph_.reset(new std::function<Status()>(work));
  return recording;
}

Status Queue::replay(const Recording& recording) const {
  return (*static_cast<std::function<Status()>*>(recording.graph_.get()))();
}
#else
void Recording::Free::operator()(void* p) const {
  cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(p));
}

Result<Recording> Queue::record(const std::function<Status()>& work) const {
  RABIT_CHECK(checked(cudaStreamBeginCapture(state_->stream, cudaStreamCaptureModeThreadLocal),
                      "asked to record"));
  const Status status = work();
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(state_->stream, &graph);
  cudaGraphExec_t executable = nullptr;
  const cudaError_t made =
      ended == cudaSuccess ? cudaGraphInstantiate(&executable, graph, 0) : ended;
  if (graph != nullptr) {
    cudaGraphDestroy(graph);
  }
  RABIT_CHECK(status);
  RABIT_CHECK(checked(made, "recorded"));
  Recording recording;
  recording.graph_.reset(executable);
  return recording;
}

Status Queue::replay(const Recording& recording) const {
  return checked(
      cudaGraphLaunch(static_cast<cudaGraphExec_t>(recording.graph_.get()), state_->stream),
      "asked to replay");
}
#endif

bool start_decode(const DecodeArgs& args, const DecodePlan& plan, const Queue& queue) {
  if (launch_decode(args, plan, queue.stream()) == cudaSuccess) {
    return true;
  }
  cudaGetLastError();  // what is wrong with more than this kernel, the next call tells again
  return false;
}

Result<double> read_speed(const Queue& queue, const Memory& memory) {
  struct Event {
    cudaEvent_t event = nullptr;
    ~Event() {
      if (event != nullptr) {
        cudaEventDestroy(event);
      }
    }
  } begin, end;
  const uint64_t bytes = memory.size() / 16 * 16;
  RABIT_CHECK(checked(cudaEventCreate(&begin.event), "measured"));
  RABIT_CHECK(checked(cudaEventCreate(&end.event), "measured"));
  RABIT_CHECK(checked(cudaEventRecord(begin.event, queue.stream()), "measured"));
  RABIT_CHECK(start_reading(memory.as<void>(), static_cast<int64_t>(bytes), memory.as<uint32_t>(),
                            queue.stream()));
  RABIT_CHECK(checked(cudaEventRecord(end.event, queue.stream()), "measured"));
  RABIT_CHECK(queue.wait());
  float milliseconds = 0;
  RABIT_CHECK(checked(cudaEventElapsedTime(&milliseconds, begin.event, end.event), "measured"));
  return static_cast<double>(bytes) / std::max(static_cast<double>(milliseconds) / 1e3, 1e-9);
}

}  // namespace rabit::gpu
