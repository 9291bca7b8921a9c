#include "cuda/softmax_rows.cuh"
#include "sequence_logps.h"

namespace napo::cuda {
namespace {

// Calls f(k) where column c + k of c .. c + N - 1 is the label: one comparison a pack.
template <int N, class F>
__device__ __forceinline__ void at_label(int c, int label, F&& f) {
  const int k = label - c;
  if (k >= 0 && k < N) f(k);
}

// -inf at the label and outside the row.
template <int N, class Whole>
__device__ __forceinline__ void leave_out(float (&z)[N], int c, int label, int end, Whole) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (!Whole::value && (c + k < 0 || c + k >= end)) z[k] = -INFINITY;
  }
  at_label<N>(c, label, [&](int k) { set(z, k, -INFINITY); });
}

template <class T>
__global__ void __launch_bounds__(kThreads, NAPO_ROW_BLOCKS) token_forward_kernel(TokenForwardArgs args) {
  const int64_t i = blockIdx.x, tokens = args.logits.size[1], label = args.labels[i];
  if (label == args.ignore_index) {
    if (threadIdx.x == 0) args.logp[i] = args.row_max[i] = args.row_log_sum[i] = 0.0f;
    return;
  }
  const T* row =
      static_cast<const T*>(args.logits.data) + i / tokens * args.logits.stride[0] + i % tokens * args.logits.stride[1];
  const int lead = lead_of<kPack<T>>(row), end = static_cast<int>(args.logits.size[2]),
            column = static_cast<int>(label);

  // As in forward_kernel, one read and a shift from the first columns.
  const int count = sample_of<T>(end, lead);
  float m = -INFINITY, total;
  for_each_pack<Use::again, 1, false>(row, lead, count, [&](int c, auto& z, auto whole) {
    leave_out(z, c, column, count, whole);
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) m = fmaxf(m, z[k]);
  });
  float shift = finite(reduce<Max>(m));
  for (bool again = true; again;) {
    m = -INFINITY;
    total = 0.0f;
    for_each_pack<Use::once, kPacks<T, true>, false>(row, lead, end, [&](int c, auto& z, auto whole) {
      leave_out(z, c, column, end, whole);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        m = fmaxf(m, z[k]);
        z[k] = exponential<T>(z[k] - shift);
      }
      total += sum(z);
    });
    m = reduce<Max>(m);
    total = reduce<Sum>(total);
    again = m != -INFINITY && fabsf(m - shift) > kReach;
    if (again) shift = m;
  }
  if (threadIdx.x == 0) {
    const float z = to_float(row[label]), top = fmaxf(m, z);
    shift = origin_of(m, shift, top);
    args.logp[i] = log_p((shift - z) + logf(total), z);
    args.row_max[i] = top;
    args.row_log_sum[i] = logf(expf(shift - top) * total + expf(z - top));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, NAPO_ROW_BLOCKS) token_backward_kernel(TokenBackwardArgs args) {
  constexpr int N = kPack<T>;
  const TokenForwardArgs& forward = args.forward;
  const int64_t i = blockIdx.x, tokens = args.out.size[1], s = i / tokens, t = i % tokens, label = forward.labels[i];
  const bool counts = label != forward.ignore_index;
  if (!counts && args.out_is_zero) return;
  const T* row =
      static_cast<const T*>(forward.logits.data) + s * forward.logits.stride[0] + t * forward.logits.stride[1];
  T* out = static_cast<T*>(args.out.data) + s * args.out.stride[0] + t * args.out.stride[1];
  const int lead = lead_of<N>(out), end = static_cast<int>(args.out.size[2]), column = static_cast<int>(label);
  if (!counts) {
    const float zero[N] = {};
    for (int c = static_cast<int>(threadIdx.x) * N - lead; c < end; c += kThreads * N) {
      if (c >= 0 && c + N <= end) {
        store(out, c, end, zero, std::true_type());
      } else {
        store(out, c, end, zero, std::false_type());
      }
    }
    return;
  }
  const float grad = args.grad[s], m = forward.row_max[i], l = forward.row_log_sum[i];
  const float at_its_label = -grad * expm1f(forward.logp[i]);
  for_each_pack<Use::once, kPacks<T, true>>(row, lead, end, [&](int c, auto& a, auto whole) {
#pragma unroll
    for (int k = 0; k < N; ++k) a[k] = -grad * exponential<T>((a[k] - m) - l);
    at_label<N>(c, column, [&](int k) { set(a, k, at_its_label); });
    store(out, c, end, a, whole);
  });
}

}  // namespace

void token_logps_forward(const TokenForwardArgs& args, void* stream) {
  check_columns(args.logits.size[2]);
  with_cuda_dtype(args.logits.dtype, [&](auto* tag) {
    launch("token_logps_forward", &token_forward_kernel<typename Pointee<decltype(tag)>::type>,
           args.logits.size[0] * args.logits.size[1], 1, kThreads, stream, args);
  });
}

void token_logps_backward(const TokenBackwardArgs& args, void* stream) {
  check_columns(args.out.size[2]);
  with_cuda_dtype(args.out.dtype, [&](auto* tag) {
    launch("token_logps_backward", &token_backward_kernel<typename Pointee<decltype(tag)>::type>,
           args.out.size[0] * args.out.size[1], 1, kThreads, stream, args);
  });
}

}  // namespace napo::cuda
