#include "sequence_logps.h"

#include "cpu/lib/parallel.h"
#include "cpu/softmax_rows.h"

namespace napo {
namespace NAPO_ISA {
namespace {

constexpr LogitMap kNoMap = {1.0f, nullptr, 0.0f};

template <class T>
void token_forward_row(const TokenForwardArgs& args, int64_t s, int64_t t) {
  const int64_t at = s * args.logits.size[1] + t, label = args.labels[at];
  if (label == args.ignore_index) {
    args.logp[at] = args.row_max[at] = args.row_log_sum[at] = 0.0f;
    return;
  }
  const T* row = static_cast<const T*>(args.logits.data) + s * args.logits.stride[0] + t * args.logits.stride[1];
  float m = -INFINITY;
  between(&label, 1, 0, args.logits.size[2],
          [&](int64_t begin, int64_t end) NAPO_LAMBDA { m = stretch_max<true>(row, begin, end, kNoMap, m); });
  const float shift = m == -INFINITY ? 0.0f : m;
  double total = 0.0;  // the row is in the second-level cache by now
  between(&label, 1, 0, args.logits.size[2], [&](int64_t begin, int64_t end) NAPO_LAMBDA {
    total += stretch_sum<true, false>(row, static_cast<T*>(nullptr), begin, end, kNoMap, shift, 1.0f);
  });
  const float z = to_float(row[label]);
  const RowEnd end = finish_row(m, total, &z, 1, args.logp + at);
  args.row_max[at] = end.m;
  args.row_log_sum[at] = end.l;
}

template <class T>
void token_backward_row(const TokenBackwardArgs& args, int64_t s, int64_t t) {
  const TokenForwardArgs& forward = args.forward;
  const Tensor<3>& logits = forward.logits;
  const int64_t at = s * logits.size[1] + t, label = forward.labels[at], columns = logits.size[2];
  T* out = static_cast<T*>(args.out.data) + s * args.out.stride[0] + t * args.out.stride[1];
  if (label == forward.ignore_index) {
    if (!args.out_is_zero) memset(out, 0, columns * sizeof(T));
    return;
  }
  const T* row = static_cast<const T*>(logits.data) + s * logits.stride[0] + t * logits.stride[1];
  const float grad = args.grad[s], m = forward.row_max[at], l = forward.row_log_sum[at];
  between(&label, 1, 0, columns, [&](int64_t begin, int64_t end) NAPO_LAMBDA {
    stretch_gradient<true>(row, out, begin, end, kNoMap, m, l, -grad);
  });
  from_float(static_cast<float>(target_coefficient(forward.logp[at], grad, grad)), out + label);
}

}  // namespace

void token_logps_forward(const TokenForwardArgs& args, int threads) {
  const int64_t tokens = args.logits.size[1];
  with_dtype(args.logits.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    parallel_for(args.logits.size[0] * tokens, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) token_forward_row<T>(args, i / tokens, i % tokens);
    });
  });
}

void token_logps_backward(const TokenBackwardArgs& args, int threads) {
  const int64_t tokens = args.out.size[1];
  with_dtype(args.out.dtype, [&](auto* tag) {
    using T = typename Pointee<decltype(tag)>::type;
    parallel_for(args.out.size[0] * tokens, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) token_backward_row<T>(args, i / tokens, i % tokens);
    });
  });
}

}  // namespace NAPO_ISA
}  // namespace napo
