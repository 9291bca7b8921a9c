// What csrc/cuda/*.cu use of CUDA, for a C++ compiler and the CPU: the same sources, block after block, each thread of
// a block a fiber. Only for tests; it finds wrong logic, not what only a GPU has (speed, limits, the memory model).
//
// Stricter than a GPU where it can be:
// - shared memory is filled with 0xff (NaN, -1) before each block;
// - threads run in an order that NAPO_EMULATION_ORDER chooses (up, down, or mixed): where results depend on it, a
//   barrier is missing;
// - a barrier that not all threads reach, or at different lines, a shuffle that lacks lanes, and a block that is no
//   multiple of a warp are errors.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time, so a block's memory is the program's; a section of its own makes it fillable.
#define __shared__ static __attribute__((section("napo_shared")))
extern "C" __attribute__((visibility("hidden"))) char __start_napo_shared[], __stop_napo_shared[];

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
// Loads with a word about caches.
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace napo_emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 << 10;

enum class State { ready, barrier, warp, done };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false;
  State state = State::done;
  int line = 0;      // of the barrier that it waits at
  unsigned ops = 0;  // warp operations so far
  dim3 index;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<uint32_t> lanes[2];  // what the threads gave to this and to the next warp operation
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline dim3 block_index, block_size, grid_size;

// swapcontext() costs a system call, so it only starts a fiber; from then on _longjmp does.
inline __attribute__((noinline)) void wait(State state, int line) {
  Fiber* self = current;
  self->state = state;
  self->line = line;
  if (_setjmp(self->resume) == 0) _longjmp(scheduler, 1);
}

inline void live() {
  for (;;) {
    body();
    wait(State::done, 0);
  }
}

inline __attribute__((noinline)) void run(Fiber* fiber) {
  current = fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->resume, 1);
  fiber->started = true;
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->stack.get();
  fiber->start.uc_stack.ss_size = kStack;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, &live, 0);
  setcontext(&fiber->start);
}

[[noreturn]] inline void refuse(const std::string& why) {
  fibers.clear();  // they stand in the middle of a kernel
  throw std::runtime_error("CUDA emulation: " + why);
}

// The i-th of `count`, a power of two: upwards, downwards, or mixed, and then differently each round.
inline unsigned pick(unsigned i, unsigned count, unsigned order, unsigned round) {
  if (order == 0) return i;
  if (order == 1) return count - 1 - i;
  return (i * (2 * (round * 7919 % count) + 1) + round) % count;
}

inline void run_block(unsigned threads, unsigned order) {
  memset(__start_napo_shared, 0xff, static_cast<size_t>(__stop_napo_shared - __start_napo_shared));
  for (unsigned t = 0; t < threads; ++t) {
    fibers[t]->state = State::ready;
    fibers[t]->ops = 0;
    fibers[t]->index = dim3(t, 0, 0);
  }
  const unsigned warps = threads / kWarp;
  for (unsigned round = 1;; ++round) {
    // A warp runs as far as it can before the next one does: what it overwrites too early, the others read.
    unsigned at_barrier = 0, done = 0;
    int line = 0;
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned first = kWarp * pick(w, warps, order, round);
      unsigned at_warp = kWarp;
      for (unsigned op = 1; at_warp == kWarp; ++op) {
        at_warp = 0;
        for (unsigned i = 0; i < kWarp; ++i) {
          Fiber* fiber = fibers[first + pick(i, kWarp, order, op)].get();
          if (fiber->state == State::ready) run(fiber);
        }
        for (unsigned t = first; t < first + kWarp; ++t) at_warp += fibers[t]->state == State::warp ? 1 : 0;
        for (unsigned t = first; t < first + kWarp && at_warp == kWarp; ++t) fibers[t]->state = State::ready;
      }
      for (unsigned t = first; t < first + kWarp; ++t) {
        const Fiber& fiber = *fibers[t];
        done += fiber.state == State::done ? 1 : 0;
        if (fiber.state != State::barrier) continue;
        if (line != 0 && fiber.line != line) refuse("threads wait at different barriers");
        line = fiber.line;
        ++at_barrier;
      }
    }
    if (done == threads) return;
    if (at_barrier + done != threads) refuse("threads wait for one another for ever");
    for (unsigned t = 0; t < threads; ++t) {
      if (fibers[t]->state == State::barrier) fibers[t]->state = State::ready;
    }
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z != 1) refuse("an empty grid");
  if (threads == 0 || threads > 1024 || (threads & (threads - 1)) != 0 || threads % kWarp != 0) {
    refuse("a block of " + std::to_string(threads) + " threads");
  }
  const char* name = getenv("NAPO_EMULATION_ORDER");
  const unsigned order = name == nullptr || strcmp(name, "up") == 0 ? 0 : strcmp(name, "down") == 0 ? 1 : 2;
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  for (auto& of_step : lanes) of_step.assign(threads, 0);
  body = [&] { kernel(arguments...); };
  grid_size = grid;
  block_size = dim3(threads);
  for (unsigned i = 0; i < grid.x * grid.y; ++i) {
    const unsigned block = order == 1 ? grid.x * grid.y - 1 - i : i;
    block_index = dim3(block % grid.x, block / grid.x);
    run_block(threads, order);
  }
}

// Gives a value to the warp, and is the values of its lanes once all have given theirs.
inline const uint32_t* exchange(unsigned mask, uint32_t mine) {
  if (mask != 0xffffffffu) abort();
  Fiber* self = current;
  std::vector<uint32_t>& values = lanes[self->ops++ % 2];  // the next operation may begin before all have read
  values[self->index.x] = mine;
  wait(State::warp, 0);
  return values.data() + self->index.x / kWarp * kWarp;
}

template <class T>
T shuffle_xor(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) == 4, "a shuffle of 4 bytes");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t lane = current->index.x % kWarp;
  bits = exchange(mask, bits)[lane ^ static_cast<uint32_t>(lane_mask)];
  memcpy(&value, &bits, 4);
  return value;
}

inline unsigned ballot(unsigned mask, bool vote) {
  const uint32_t* votes = exchange(mask, vote ? 1 : 0);
  unsigned result = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) result |= votes[lane] << lane;
  return result;
}

}  // namespace napo_emulation

#define threadIdx (::napo_emulation::current->index)
#define blockIdx (::napo_emulation::block_index)
#define blockDim (::napo_emulation::block_size)
#define gridDim (::napo_emulation::grid_size)
#define __syncthreads() ::napo_emulation::wait(::napo_emulation::State::barrier, __LINE__)
#define __shfl_xor_sync(mask, value, lane_mask) ::napo_emulation::shuffle_xor(mask, value, lane_mask)
#define __ballot_sync(mask, vote) ::napo_emulation::ballot(mask, vote)
#define __popc(x) __builtin_popcount(x)
#define NAPO_LAUNCH(kernel, grid, threads, stream, ...) \
  (static_cast<void>(stream), ::napo_emulation::launch(kernel, grid, static_cast<unsigned>(threads), __VA_ARGS__))

inline int32_t __float_as_int(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __int_as_float(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float __uint_as_float(uint32_t bits) { return __int_as_float(static_cast<int32_t>(bits)); }

// The lower word of high:low >> (shift modulo 32).
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
