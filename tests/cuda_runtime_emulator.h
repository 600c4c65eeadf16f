// After cuda_emulator.h: the tensor cores and the libraries of CUDA that the runtime uses, as far
// as it uses them. Device memory is the host's, filled with NaN, of a size that tests set; a
// product of cuBLAS is three loops that obey its strides. There are two devices, the second one too
// old; the first has three multiprocessors.
#pragma once

#include <chrono>
#include <map>

#include "cuda_emulator.h"

namespace rabit::emulator {

inline float half_value(uint32_t half) {
  static const std::vector<float> values = [] {
    std::vector<float> all;
    for (int bits = 0; bits < 1 << 16; ++bits) {
      const int exponent = bits >> 10 & 31, fraction = bits & 1023;
      const float size = exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                         : exponent == 0
                             ? std::ldexp(static_cast<float>(fraction), -24)
                             : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
      all.push_back((bits & 0x8000) != 0 ? -size : size);
    }
    return all;
  }();
  return values[half];
}

/// mma.m16n8k16 of F16, sums in F32, after the tables of the PTX manual.
inline void multiply_tile(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Block& block = *Block::current();
  const auto pair = [](uint32_t low, uint32_t high) {
    return low | static_cast<uint64_t>(high) << 32;
  };
  block.exchange_words({pair(a[0], a[1]), pair(a[2], a[3]), pair(b[0], b[1]), 0}, [&](auto of) {
    const auto value = [](uint64_t words, int word, int half) {
      return half_value(static_cast<uint32_t>(words >> (32 * word + 16 * half)) & 0xFFFFU);
    };
    const int lane = static_cast<int>(block.lane());
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        const auto& left = of(static_cast<unsigned>(row % 8 * 4 + k % 8 / 2));
        const auto& right = of(static_cast<unsigned>(column * 4 + k % 8 / 2));
        d[i] += value(left[k / 8], row / 8, k % 2) * value(right[2], k / 8, k % 2);
      }
    }
  });
}

/// An mbarrier: arrivals of a phase that are still to come, bytes that are, and the phase.
struct Barrier {
  int16_t arrivals, left;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(Barrier) == 8);

inline void start_barrier(Barrier* barrier, int arrivals) {
  *barrier = {static_cast<int16_t>(arrivals), static_cast<int16_t>(arrivals), 0, 0};
}
inline void open_if_done(Barrier* barrier) {
  if (barrier->left == 0 && barrier->bytes == 0) {
    barrier->left = barrier->arrivals;
    barrier->phase ^= 1;
    Block::current()->moved();
  }
}
inline void arrive(Barrier* barrier) {
  --barrier->left;
  open_if_done(barrier);
}
inline void expect(Barrier* barrier, int bytes) {
  barrier->bytes += bytes;
  arrive(barrier);
}
inline void await(Barrier* barrier, int phase) {
  while (barrier->phase == static_cast<uint32_t>(phase)) {
    Block::current()->pass();
  }
}
/// A tensor map of three dimensions, swizzled by 128 bytes or not, and a copy of its box.
struct BoxMap {
  const void* data;
  int bytes;
  int64_t sizes[3], strides[2];
  int box[3];
  bool swizzled;
};
inline void copy_box(void* shared, const BoxMap& map, int c0, int c1, int c2, Barrier* barrier) {
  const auto at = reinterpret_cast<uintptr_t>(shared);
  const int64_t row_bytes = int64_t{map.box[0]} * map.bytes;
  if (at % 128 != 0 || reinterpret_cast<uintptr_t>(map.data) % 16 != 0 ||
      map.strides[0] % 16 != 0 || map.strides[1] % 16 != 0 || row_bytes % 16 != 0 ||
      *std::max_element(map.box, map.box + 3) > 256 ||
      (map.swizzled && (row_bytes != 128 || at % 1024 != 0))) {
    std::fputs("cuda_emulator: a box that the copy engine does not take\n", stderr);
    std::abort();
  }
  auto* const to = static_cast<unsigned char*>(shared);
  const auto* const from = static_cast<const unsigned char*>(map.data);
  for (int k = 0; k < map.box[2]; ++k) {
    for (int j = 0; j < map.box[1]; ++j) {
      const int64_t row = int64_t{k} * map.box[1] + j;
      for (int64_t i = 0; i < map.box[0]; ++i) {
        const bool inside = c0 + i < map.sizes[0] && c1 + j < map.sizes[1] && c2 + k < map.sizes[2];
        const int64_t byte = i * map.bytes;
        const int64_t place = map.swizzled ? (byte / 16 ^ row % 8) * 16 + byte % 16 : byte;
        if (inside) {
          std::memcpy(
              to + row * row_bytes + place,
              from + (c0 + i) * map.bytes + (c1 + j) * map.strides[0] + (c2 + k) * map.strides[1],
              static_cast<size_t>(map.bytes));
        } else {
          std::memset(to + row * row_bytes + place, 0, static_cast<size_t>(map.bytes));
        }
      }
    }
  }
  barrier->bytes -= static_cast<int32_t>(row_bytes * map.box[1] * map.box[2]);
  open_if_done(barrier);
}

/// wgmma.m64nNk16 of F16, sums in F32, of one of its four warps: the right side by rows of 128
/// bytes in shared memory, swizzled.
template <size_t kQuads>
void multiply_group(float (&d)[kQuads][4], const uint32_t (&a)[4], uint64_t slab, int step) {
  if (slab % 1024 != 0) {
    std::fputs("cuda_emulator: a slab that is not aligned\n", stderr);
    std::abort();
  }
  Block& block = *Block::current();
  const unsigned g = block.lane() / 4, t = block.lane() % 4;
  const auto* const columns = reinterpret_cast<const uint16_t*>(slab);
  const auto right = [&](int k, size_t n) {
    const size_t chunk = static_cast<size_t>(step * 16 + k) / 8 ^ n % 8;
    return half_value(columns[n * 64 + chunk * 8 + static_cast<size_t>(k) % 8]);
  };
  const auto pair = [](uint32_t low, uint32_t high) {
    return low | static_cast<uint64_t>(high) << 32;
  };
  block.exchange_words({pair(a[0], a[1]), pair(a[2], a[3]), 0, 0}, [&](auto of) {
    float left[2][16];
    for (unsigned k = 0; k < 16; ++k) {
      const uint64_t words = of(g * 4 + k % 8 / 2)[k / 8] >> 16 * (k % 2);
      left[0][k] = half_value(static_cast<uint32_t>(words) & 0xFFFFU);
      left[1][k] = half_value(static_cast<uint32_t>(words >> 32) & 0xFFFFU);
    }
    for (size_t quad = 0; quad < kQuads; ++quad) {
      for (unsigned i = 0; i < 4; ++i) {
        for (int k = 0; k < 16; ++k) {
          d[quad][i] += left[i / 2][k] * right(k, quad * 8 + 2 * t + i % 2);
        }
      }
    }
  });
}

/// ldmatrix.x4.trans of 16-bit elements.
inline void load_turned(uint32_t (&out)[4], const uint16_t* row) {
  Block& block = *Block::current();
  block.exchange_words({reinterpret_cast<uint64_t>(row), 0, 0, 0}, [&](auto of) {
    const unsigned g = block.lane() / 4, t = block.lane() % 4;
    for (unsigned i = 0; i < 4; ++i) {
      const auto element = [&](unsigned r) -> uint32_t {
        const uint64_t at = of(i * 8 + r)[0];
        if (at % 16 != 0) {
          std::fputs("cuda_emulator: a matrix row that is not aligned\n", stderr);
          std::abort();
        }
        return reinterpret_cast<const uint16_t*>(at)[g];
      };
      out[i] = element(2 * t) | element(2 * t + 1) << 16;
    }
  });
}

/// Bytes of the device's memory, and those in use by address.
inline size_t& memory_size() {
  static size_t bytes = size_t{1} << 33;
  return bytes;
}
inline std::map<void*, size_t>& allocations() {
  static std::map<void*, size_t> all;
  return all;
}
/// Whether blocks may wait for each other.
inline bool& cooperative() {
  static bool may = true;
  return may;
}
inline size_t memory_used() {
  size_t used = 0;
  for (const auto& [at, bytes] : allocations()) {
    used += bytes;
  }
  return used;
}

}  // namespace rabit::emulator

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t totalGlobalMem, sharedMemPerBlockOptin;
  int cooperativeLaunch;
};
struct cudaFuncAttributes {};
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaStreamNonBlocking };

inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  std::strcpy(properties->name, device == 0 ? "an emulated GPU" : "an old GPU");
  properties->major = device == 0 ? 9 : 7;
  properties->minor = 0;
  properties->multiProcessorCount = 3;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->cooperativeLaunch = rabit::emulator::cooperative() ? 1 : 0;
  properties->totalGlobalMem = rabit::emulator::memory_size();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = rabit::emulator::memory_size();
  *free = *total - std::min(*total, rabit::emulator::memory_used());
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  if (bytes > free) {
    return 2;
  }
  const size_t rounded = (bytes + 255) / 256 * 256;
  *data = std::aligned_alloc(256, rounded);
  std::memset(*data, 0xFF, rounded);
  rabit::emulator::allocations()[*data] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* data) {
  rabit::emulator::allocations().erase(data);
  std::free(data);
  return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** data, size_t bytes) {
  return *data = std::malloc(bytes), cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* data) { return std::free(data), cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  return std::memset(at, value, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, int) {
  return *stream = reinterpret_cast<cudaStream_t>(1), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

using cudaEvent_t = std::chrono::steady_clock::time_point*;
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return *event = new std::chrono::steady_clock::time_point, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return *event = std::chrono::steady_clock::now(), cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(*end - *begin).count();
  return cudaSuccess;
}

struct cublasContext {};
using cublasHandle_t = cublasContext*;
using cublasStatus_t = int;
inline constexpr cublasStatus_t CUBLAS_STATUS_SUCCESS = 0;
enum { CUBLAS_OP_N, CUBLAS_OP_T, CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT };

inline cublasStatus_t cublasCreate(cublasHandle_t* handle) {
  return *handle = new cublasContext, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasDestroy(cublasHandle_t handle) {
  return delete handle, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t) {
  return CUBLAS_STATUS_SUCCESS;
}

/// c = alpha a^T b + beta c, all by columns: a (k, m), b (k, n), c (m, n).
inline cublasStatus_t cublasGemmEx(cublasHandle_t, int turn_a, int turn_b, int m, int n, int k,
                                   const float* alpha, const void* a, int type_a, int lda,
                                   const void* b, int type_b, int ldb, const float* beta, void* c,
                                   int type_c, int ldc, int compute, int) {
  if (turn_a != CUBLAS_OP_T || turn_b != CUBLAS_OP_N || type_a != CUDA_R_16F ||
      type_b != CUDA_R_16F || type_c != CUDA_R_32F || compute != CUBLAS_COMPUTE_32F || lda < k ||
      ldb < k || ldc < m) {
    return 7;
  }
  const auto column = [&](const void* from, int ld, int i) {
    std::vector<float> values(static_cast<size_t>(k));
    for (int l = 0; l < k; ++l) {
      values[static_cast<size_t>(l)] = rabit::emulator::half_value(
          static_cast<const uint16_t*>(from)[static_cast<int64_t>(i) * ld + l]);
    }
    return values;
  };
  std::vector<std::vector<float>> right;
  for (int j = 0; j < n; ++j) {
    right.push_back(column(b, ldb, j));
  }
  for (int i = 0; i < m; ++i) {
    const std::vector<float> left = column(a, lda, i);
    for (int j = 0; j < n; ++j) {
      float sum = 0.0F;
      for (size_t l = 0; l < left.size(); ++l) {
        sum += left[l] * right[static_cast<size_t>(j)][l];
      }
      float& out = static_cast<float*>(c)[static_cast<int64_t>(j) * ldc + i];
      out = *alpha * sum + (*beta != 0.0F ? *beta * out : 0.0F);
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}
