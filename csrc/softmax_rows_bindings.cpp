// softmax_rows for Python: the same functions for the CPU and for CUDA. Tensors come as addresses, 0 for None; `queue`
// is the number of threads on the CPU and the address of the stream on CUDA.
#include <pybind11/pybind11.h>

#include "cpu/softmax_rows.h"
#ifdef NAPO_WITH_CUDA
#include "cuda/softmax_rows.h"
#endif

namespace py = pybind11;

namespace napo {
namespace {

using Address = uintptr_t;

#ifdef NAPO_WITH_CUDA
#define NAPO_RUN(name, args)                                         \
  if (cuda) return cuda::name(args, reinterpret_cast<void*>(queue)); \
  NAPO_CALL_KERNEL_BF16(name, (args, static_cast<int>(queue)))
#else
#define NAPO_RUN(name, args)                                   \
  NAPO_CHECK(!cuda, #name ": this build has no CUDA kernels"); \
  NAPO_CALL_KERNEL_BF16(name, (args, static_cast<int>(queue)))
#endif

LogitMap logit_map(float scale, Address bias, float softcap) {
  NAPO_CHECK(softcap >= 0.0f, "softcap: expected 0 for none or a positive number, got %g", softcap);
  return {scale, pointer<const float>(bias), softcap};
}

void target_logits(int dtype, Address hidden, int64_t hidden_stride, Address weight, int64_t weight_stride,
                   int64_t rows, int64_t width, Address low, int64_t low_stride, Address lora_b, int64_t lora_b_stride,
                   int64_t rank, float lora_scale, Address start, Address columns, float scale, Address bias,
                   float softcap, Address z, Address slope, bool cuda, uintptr_t queue) {
  const TargetLogitsArgs args{static_cast<DType>(dtype),
                              pointer<void>(hidden),
                              hidden_stride,
                              pointer<void>(weight),
                              weight_stride,
                              rows,
                              width,
                              pointer<void>(low),
                              pointer<void>(lora_b),
                              low_stride,
                              lora_b_stride,
                              rank,
                              lora_scale,
                              {pointer<int64_t>(start), pointer<int64_t>(columns)},
                              logit_map(scale, bias, softcap),
                              pointer<float>(z),
                              pointer<float>(slope)};
  NAPO_RUN(target_logits, args);
}

ForwardArgs forward_args(int dtype, Address logits, int64_t logits_stride, Address out, int64_t out_stride,
                         int out_dtype, int64_t first_row, int64_t rows, int64_t columns, Address start,
                         Address target_columns, float scale, Address bias, float softcap, Address target_z,
                         Address target_logp, Address row_max, Address row_log_sum, Address store_rescale,
                         float store_scale) {
  NAPO_CHECK(store_scale > 0.0f, "store_scale: expected a positive number, got %g", store_scale);
  return {static_cast<DType>(dtype),
          pointer<void>(logits),
          logits_stride,
          static_cast<DType>(out_dtype),
          pointer<void>(out),
          out_stride,
          first_row,
          rows,
          columns,
          {pointer<int64_t>(start), pointer<int64_t>(target_columns)},
          logit_map(scale, bias, softcap),
          pointer<float>(target_z),
          pointer<float>(target_logp),
          pointer<float>(row_max),
          pointer<float>(row_log_sum),
          pointer<float>(store_rescale),
          store_scale};
}

void softmax_rows_forward(int dtype, Address logits, int64_t logits_stride, Address out, int64_t out_stride,
                          int out_dtype, int64_t first_row, int64_t rows, int64_t columns, Address start,
                          Address target_columns, float scale, Address bias, float softcap, Address target_z,
                          Address target_logp, Address row_max, Address row_log_sum, Address store_rescale,
                          float store_scale, bool cuda, uintptr_t queue) {
  const ForwardArgs args = forward_args(dtype, logits, logits_stride, out, out_stride, out_dtype, first_row, rows,
                                        columns, start, target_columns, scale, bias, softcap, target_z, target_logp,
                                        row_max, row_log_sum, store_rescale, store_scale);
  NAPO_RUN(softmax_rows_forward, args);
}

// For the CPU alone.
void softmax_columns_forward(int dtype, Address logits, int64_t logits_stride, Address out, int64_t out_stride,
                             int out_dtype, int64_t first_row, int64_t rows, int64_t columns, Address start,
                             Address target_columns, float scale, Address bias, float softcap, Address target_z,
                             Address target_logp, Address row_max, Address row_log_sum, Address store_rescale,
                             float store_scale, int64_t first_column, int64_t vocabulary, Address carried_max,
                             Address carried_sum, Address keep, Address gain, int threads) {
  const ColumnsArgs args{forward_args(dtype, logits, logits_stride, out, out_stride, out_dtype, first_row, rows,
                                      columns, start, target_columns, scale, bias, softcap, target_z, target_logp,
                                      row_max, row_log_sum, store_rescale, store_scale),
                         first_column,
                         vocabulary,
                         pointer<float>(carried_max),
                         pointer<double>(carried_sum),
                         pointer<float>(keep),
                         pointer<float>(gain)};
  NAPO_CALL_KERNEL_BF16(softmax_columns_forward, (args, threads));
}

void softmax_columns_add(int dtype, Address total, Address product, int64_t rows, int64_t width, Address keep,
                         Address gain, int threads) {
  const ColumnsAddArgs args{static_cast<DType>(dtype), pointer<float>(total), pointer<void>(product), rows, width,
                            pointer<float>(keep),      pointer<float>(gain)};
  NAPO_CALL_KERNEL_BF16(softmax_columns_add, (args, threads));
}

void softmax_rows_gradient(int dtype, Address logits, int64_t logits_stride, Address out, int64_t out_stride,
                           int out_dtype, int64_t rows, int64_t first_column, int64_t columns, Address start,
                           Address target_columns, float scale, Address bias, float softcap, Address row_max,
                           Address row_log_sum, Address target_logp, Address target_slope, Address target_grad,
                           bool cuda, uintptr_t queue) {
  const GradientArgs args{static_cast<DType>(dtype),
                          pointer<void>(logits),
                          logits_stride,
                          static_cast<DType>(out_dtype),
                          pointer<void>(out),
                          out_stride,
                          rows,
                          first_column,
                          columns,
                          {pointer<int64_t>(start), pointer<int64_t>(target_columns)},
                          logit_map(scale, bias, softcap),
                          pointer<float>(row_max),
                          pointer<float>(row_log_sum),
                          pointer<float>(target_logp),
                          pointer<float>(target_slope),
                          pointer<float>(target_grad)};
  NAPO_RUN(softmax_rows_gradient, args);
}

void hidden_gradient(int dtype, Address weight, int64_t weight_stride, Address context, int64_t rows, int64_t width,
                     Address start, Address columns, Address store_rescale, Address target_logp, Address target_slope,
                     Address target_grad, float scale, int out_dtype, Address out, bool cuda, uintptr_t queue) {
  NAPO_CHECK(out_dtype == dtype || out_dtype == static_cast<int>(DType::f32),
             "out_dtype: expected float32 or the dtype of weight, got code %d", out_dtype);
  const HiddenGradientArgs args{static_cast<DType>(dtype),
                                pointer<void>(weight),
                                weight_stride,
                                pointer<void>(context),
                                rows,
                                width,
                                {pointer<int64_t>(start), pointer<int64_t>(columns)},
                                pointer<float>(store_rescale),
                                pointer<float>(target_logp),
                                pointer<float>(target_slope),
                                pointer<float>(target_grad),
                                scale,
                                static_cast<DType>(out_dtype),
                                pointer<void>(out)};
  NAPO_RUN(hidden_gradient, args);
}

void token_logps_forward(int dtype, Address logits, int64_t stride_s, int64_t stride_t, int64_t sequences,
                         int64_t tokens, int64_t columns, Address labels, int64_t ignore_index, Address logp,
                         Address row_max, Address row_log_sum, bool cuda, uintptr_t queue) {
  const TokenForwardArgs args{static_cast<DType>(dtype),
                              pointer<void>(logits),
                              stride_s,
                              stride_t,
                              sequences,
                              tokens,
                              columns,
                              pointer<int64_t>(labels),
                              ignore_index,
                              pointer<float>(logp),
                              pointer<float>(row_max),
                              pointer<float>(row_log_sum)};
  NAPO_RUN(token_logps_forward, args);
}

void token_logps_backward(int dtype, Address logits, int64_t stride_s, int64_t stride_t, int64_t sequences,
                          int64_t tokens, int64_t columns, Address labels, int64_t ignore_index, Address logp,
                          Address row_max, Address row_log_sum, Address grad, Address out, int64_t out_stride_s,
                          int64_t out_stride_t, bool out_is_zero, bool cuda, uintptr_t queue) {
  const TokenBackwardArgs args{static_cast<DType>(dtype),
                               pointer<void>(logits),
                               stride_s,
                               stride_t,
                               sequences,
                               tokens,
                               columns,
                               pointer<int64_t>(labels),
                               ignore_index,
                               pointer<float>(logp),
                               pointer<float>(row_max),
                               pointer<float>(row_log_sum),
                               pointer<float>(grad),
                               pointer<void>(out),
                               out_stride_s,
                               out_stride_t,
                               out_is_zero};
  NAPO_RUN(token_logps_backward, args);
}

}  // namespace

void bind_softmax_rows(py::module_& m) {
  const auto free = py::call_guard<py::gil_scoped_release>();
  using py::arg;
  m.def("target_logits", &target_logits, free, arg("dtype"), arg("hidden"), arg("hidden_stride"), arg("weight"),
        arg("weight_stride"), arg("rows"), arg("width"), arg("low"), arg("low_stride"), arg("lora_b"),
        arg("lora_b_stride"), arg("rank"), arg("lora_scale"), arg("start"), arg("columns"), arg("scale"), arg("bias"),
        arg("softcap"), arg("z"), arg("slope"), arg("cuda"), arg("queue"));
  m.def("softmax_rows_forward", &softmax_rows_forward, free, arg("dtype"), arg("logits"), arg("logits_stride"),
        arg("out"), arg("out_stride"), arg("out_dtype"), arg("first_row"), arg("rows"), arg("columns"), arg("start"),
        arg("target_columns"), arg("scale"), arg("bias"), arg("softcap"), arg("target_z"), arg("target_logp"),
        arg("row_max"), arg("row_log_sum"), arg("store_rescale"), arg("store_scale"), arg("cuda"), arg("queue"));
  m.def("softmax_columns_forward", &softmax_columns_forward, free, arg("dtype"), arg("logits"), arg("logits_stride"),
        arg("out"), arg("out_stride"), arg("out_dtype"), arg("first_row"), arg("rows"), arg("columns"), arg("start"),
        arg("target_columns"), arg("scale"), arg("bias"), arg("softcap"), arg("target_z"), arg("target_logp"),
        arg("row_max"), arg("row_log_sum"), arg("store_rescale"), arg("store_scale"), arg("first_column"),
        arg("vocabulary"), arg("carried_max"), arg("carried_sum"), arg("keep"), arg("gain"), arg("threads"));
  m.def("softmax_columns_add", &softmax_columns_add, free, arg("dtype"), arg("total"), arg("product"), arg("rows"),
        arg("width"), arg("keep"), arg("gain"), arg("threads"));
  m.def("softmax_rows_gradient", &softmax_rows_gradient, free, arg("dtype"), arg("logits"), arg("logits_stride"),
        arg("out"), arg("out_stride"), arg("out_dtype"), arg("rows"), arg("first_column"), arg("columns"), arg("start"),
        arg("target_columns"), arg("scale"), arg("bias"), arg("softcap"), arg("row_max"), arg("row_log_sum"),
        arg("target_logp"), arg("target_slope"), arg("target_grad"), arg("cuda"), arg("queue"));
  m.def("hidden_gradient", &hidden_gradient, free, arg("dtype"), arg("weight"), arg("weight_stride"), arg("context"),
        arg("rows"), arg("width"), arg("start"), arg("columns"), arg("store_rescale"), arg("target_logp"),
        arg("target_slope"), arg("target_grad"), arg("scale"), arg("out_dtype"), arg("out"), arg("cuda"), arg("queue"));
  m.def("token_logps_forward", &token_logps_forward, free, arg("dtype"), arg("logits"), arg("stride_s"),
        arg("stride_t"), arg("sequences"), arg("tokens"), arg("columns"), arg("labels"), arg("ignore_index"),
        arg("logp"), arg("row_max"), arg("row_log_sum"), arg("cuda"), arg("queue"));
  m.def("token_logps_backward", &token_logps_backward, free, arg("dtype"), arg("logits"), arg("stride_s"),
        arg("stride_t"), arg("sequences"), arg("tokens"), arg("columns"), arg("labels"), arg("ignore_index"),
        arg("logp"), arg("row_max"), arg("row_log_sum"), arg("grad"), arg("out"), arg("out_stride_s"),
        arg("out_stride_t"), arg("out_is_zero"), arg("cuda"), arg("queue"));
}

}  // namespace napo
