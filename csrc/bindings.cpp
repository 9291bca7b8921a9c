// The compiled module napo_kernels._C: raw addresses and sizes in, nothing of torch, so one build serves every version.
#include <pybind11/pybind11.h>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace napo {
void bind_shared_negatives(py::module_& m);
void bind_napo_loss(py::module_& m);
void bind_softmax_rows(py::module_& m);
void bind_masked_attention(py::module_& m);
void bind_body(py::module_& m);
}  // namespace napo

PYBIND11_MODULE(_C, m) {
  m.def("build_config", [] {
    py::dict config;
    config["compiler"] = __VERSION__;
    config["cpu_isa"] = napo::cpu_isa_name();
    config["cpu_threads"] = napo::thread_pool_name();
#ifdef NAPO_WITH_CUDA
    config["cuda"] = true;
#else
    config["cuda"] = false;
#endif
    return config;
  });
  m.def("set_cpu_isa", &napo::set_cpu_isa, py::arg("name"),
        "portable, avx2, avx512 or avx512_bf16: for tests and benchmarks");
  napo::bind_shared_negatives(m);
  napo::bind_napo_loss(m);
  napo::bind_softmax_rows(m);
  napo::bind_masked_attention(m);
  napo::bind_body(m);
}
