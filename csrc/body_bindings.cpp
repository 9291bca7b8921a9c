// body for Python. Tensors come as addresses.
#include <pybind11/pybind11.h>

#include "cpu/body.h"

namespace py = pybind11;

namespace napo {
namespace {

using Address = uintptr_t;

RmsNormArgs norm_args(int dtype, int64_t rows, int64_t width, Address x, Address weight) {
  return {static_cast<DType>(dtype), rows, width, pointer<const void>(x), pointer<const void>(weight)};
}

void norm_forward(int dtype, int64_t rows, int64_t width, Address x, Address weight, float eps, Address out, Address r,
                  int threads) {
  const RmsNormArgs args = norm_args(dtype, rows, width, x, weight);
  NAPO_CALL_KERNEL(rms_norm_forward, (args, eps, pointer<void>(out), pointer<float>(r), threads));
}

void norm_backward(int dtype, int64_t rows, int64_t width, Address x, Address weight, Address r, Address grad,
                   Address dx, int threads) {
  const RmsNormArgs args = norm_args(dtype, rows, width, x, weight);
  NAPO_CALL_KERNEL(rms_norm_backward,
                   (args, pointer<const float>(r), pointer<const void>(grad), pointer<void>(dx), threads));
}

void product_forward(int dtype, int64_t n, Address gate, Address up, Address out, int threads) {
  NAPO_CALL_KERNEL(silu_product_forward, (static_cast<DType>(dtype), n, pointer<const void>(gate),
                                          pointer<const void>(up), pointer<void>(out), threads));
}

void product_backward(int dtype, int64_t n, Address gate, Address up, Address grad, Address d_gate, Address d_up,
                      int threads) {
  NAPO_CALL_KERNEL(silu_product_backward,
                   (static_cast<DType>(dtype), n, pointer<const void>(gate), pointer<const void>(up),
                    pointer<const void>(grad), pointer<void>(d_gate), pointer<void>(d_up), threads));
}

}  // namespace

void bind_body(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("rms_norm_forward", &norm_forward, py::arg("dtype"), py::arg("rows"), py::arg("width"), py::arg("x"),
        py::arg("weight"), py::arg("eps"), py::arg("out"), py::arg("r"), py::arg("threads"), release);
  m.def("rms_norm_backward", &norm_backward, py::arg("dtype"), py::arg("rows"), py::arg("width"), py::arg("x"),
        py::arg("weight"), py::arg("r"), py::arg("grad"), py::arg("dx"), py::arg("threads"), release);
  m.def("silu_product_forward", &product_forward, py::arg("dtype"), py::arg("n"), py::arg("gate"), py::arg("up"),
        py::arg("out"), py::arg("threads"), release);
  m.def("silu_product_backward", &product_backward, py::arg("dtype"), py::arg("n"), py::arg("gate"), py::arg("up"),
        py::arg("grad"), py::arg("d_gate"), py::arg("d_up"), py::arg("threads"), release);
}

}  // namespace napo
