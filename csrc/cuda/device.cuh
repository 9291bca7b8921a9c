// Shared by all CUDA kernels: reductions over a block in a fixed order, and launches.
#pragma once

#include <cuda_runtime.h>

#include "common.h"

#ifndef NAPO_LAUNCH  // tests/cuda_emulation has its own, for a compiler that knows no <<<>>>
#define NAPO_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace napo::cuda {

constexpr unsigned kWarp = 32, kAllLanes = 0xffffffffu;

struct Sum {
  static constexpr float identity = 0.0f;
  template <class T>
  __device__ static T combine(T a, T b) {
    return a + b;
  }
};
struct Max {
  static constexpr float identity = -INFINITY;
  __device__ static float combine(float a, float b) { return fmaxf(a, b); }
};

// Reduces the x of a warp; every lane gets the result.
template <class Op, class T>
__device__ T reduce_warp(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = Op::combine(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Reduces the x of all threads; every thread gets the result. All threads of the block must come here.
template <class Op, class T>
__device__ T reduce(T x) {
  __shared__ T of_warp[kWarp];
  x = reduce_warp<Op>(x);
  __syncthreads();  // of_warp may still be read by the reduction before
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = threadIdx.x % kWarp < blockDim.x / kWarp ? of_warp[threadIdx.x % kWarp] : static_cast<T>(Op::identity);
  return reduce_warp<Op>(x);
}

// Runs a kernel on `blocks` x `slabs` blocks without waiting for it; none is no launch.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int64_t slabs, int threads, void* stream,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  NAPO_CHECK(blocks < (int64_t{1} << 31) && slabs <= 65535, "%s: too large for one launch, %lld x %lld blocks", name,
             static_cast<long long>(blocks), static_cast<long long>(slabs));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(slabs));
  NAPO_LAUNCH(kernel, grid, threads, stream, arguments...);
  const cudaError_t error = cudaGetLastError();
  NAPO_CHECK(error == cudaSuccess, "%s: CUDA could not launch: %s", name, cudaGetErrorString(error));
}

}  // namespace napo::cuda
