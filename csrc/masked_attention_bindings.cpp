// masked_attention for Python. A tensor of heads comes as (address, stride of a row, of a head, of a token), strides in
// elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/masked_attention.h"

namespace py = pybind11;

namespace napo {
namespace {

using Heads = std::array<int64_t, 4>;

HeadsOf heads_of(const Heads& x) { return {pointer<void>(static_cast<uintptr_t>(x[0])), x[1], x[2], x[3]}; }

AttentionArgs arguments(int dtype, int64_t rows, int64_t heads, int64_t key_heads, int64_t length, int64_t width,
                        const Heads& query, const Heads& key, const Heads& value, uintptr_t mask, float scale) {
  return {static_cast<DType>(dtype),
          rows,
          heads,
          key_heads,
          length,
          width,
          heads_of(query),
          heads_of(key),
          heads_of(value),
          pointer<const uint8_t>(mask),
          scale};
}

void forward(int dtype, int64_t rows, int64_t heads, int64_t key_heads, int64_t length, int64_t width,
             const Heads& query, const Heads& key, const Heads& value, uintptr_t mask, float scale, const Heads& out,
             uintptr_t lse, int threads) {
  const AttentionArgs args = arguments(dtype, rows, heads, key_heads, length, width, query, key, value, mask, scale);
  NAPO_CALL_KERNEL_BF16(attention_forward, (args, heads_of(out), pointer<float>(lse), threads));
}

void backward(int dtype, int64_t rows, int64_t heads, int64_t key_heads, int64_t length, int64_t width,
              const Heads& query, const Heads& key, const Heads& value, uintptr_t mask, float scale, const Heads& grad,
              uintptr_t lse, const Heads& d_query, const Heads& d_key, const Heads& d_value, int threads) {
  const AttentionArgs args = arguments(dtype, rows, heads, key_heads, length, width, query, key, value, mask, scale);
  NAPO_CALL_KERNEL_BF16(attention_backward, (args, heads_of(grad), pointer<const float>(lse), heads_of(d_query),
                                             heads_of(d_key), heads_of(d_value), threads));
}

}  // namespace

void bind_masked_attention(py::module_& m) {
  m.attr("MASK_BLOCK") = kMaskBlock;
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("attention_forward", &forward, py::arg("dtype"), py::arg("rows"), py::arg("heads"), py::arg("key_heads"),
        py::arg("length"), py::arg("width"), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("mask"),
        py::arg("scale"), py::kw_only(), py::arg("out"), py::arg("lse"), py::arg("threads"), release);
  m.def("attention_backward", &backward, py::arg("dtype"), py::arg("rows"), py::arg("heads"), py::arg("key_heads"),
        py::arg("length"), py::arg("width"), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("mask"),
        py::arg("scale"), py::kw_only(), py::arg("grad"), py::arg("lse"), py::arg("d_query"), py::arg("d_key"),
        py::arg("d_value"), py::arg("threads"), release);
}

}  // namespace napo
