// The compiled module napo_kernels._C: napo_kernels/_C.pyi says what it has.
#include "body.h"
#include "border.h"
#include "catalogue_sequence_logps.h"
#include "cpu/lib/parallel.h"
#include "linear_sequence_logps.h"
#include "masked_attention.h"
#include "napo_loss.h"
#include "sequence_logps.h"
#include "shared_negatives.h"

namespace py = pybind11;

namespace napo {
namespace {

template <class Args>
using CpuKernel = void (*)(const Args&, int);
template <class Args>
using CudaKernel = void (*)(const Args&, void*);

#ifdef NAPO_WITH_CUDA
#define NAPO_CUDA(name) &cuda::name
#else
#define NAPO_CUDA(name) nullptr
#endif
#ifndef NAPO_CUDA_ARCHITECTURES  // CMake's list of them
#define NAPO_CUDA_ARCHITECTURES ""
#endif

class Module {
 public:
  explicit Module(py::module_ m) : m_(m) {
    m_.attr("STRUCTS") = structs_;
    m_.attr("KERNELS") = kernels_;
  }

  // A function name(arguments, cuda, queue): `queue` is the number of threads on the CPU and the address of the stream
  // on CUDA.
  template <class Args>
  void add(const char* name, CpuKernel<Args> cpu, std::enable_if_t<true, CudaKernel<Args>> cuda) {
    kernels_[name] = border::type_of<Args>(structs_);
    m_.def(name, [name, cpu, cuda](py::handle arguments, bool on_cuda, uintptr_t queue) {
      NAPO_CHECK(on_cuda ? cuda != nullptr : cpu != nullptr, "%s: this build has no kernel for %s", name,
                 on_cuda ? "CUDA" : "the CPU");
      Args args;
      border::fill(args, name, arguments.ptr());
      const py::gil_scoped_release release;
      if (on_cuda) return cuda(args, reinterpret_cast<void*>(queue));
      cpu(args, static_cast<int>(queue));
    });
  }

 private:
  py::module_ m_;
  py::dict structs_, kernels_;
};

int64_t gradient_scratch([[maybe_unused]] int64_t users, [[maybe_unused]] int64_t terms) {
#ifdef NAPO_WITH_CUDA
  return cuda::gradient_scratch(users, terms);
#else
  fail("gradient_scratch: this build has no CUDA kernels");
#endif
}

py::dict build_config() {
  py::dict config;
  config["compiler"] = __VERSION__;
  config["cpu_isa"] = cpu_isa_name();
  config["cpu_threads"] = thread_pool_name();
#ifdef NAPO_WITH_CUDA
  config["cuda"] = true;
  config["cuda_architectures"] = NAPO_CUDA_ARCHITECTURES;
#else
  config["cuda"] = false;
#endif
  return config;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_config", &build_config);
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"));
  m.def("gradient_scratch", &gradient_scratch);
  m.attr("MASK_BLOCK") = kMaskBlock;

  Module kernels(m);
#define NAPO_ADD(name, cuda) kernels.add(#name, &cpu::name, cuda)
  NAPO_ADD(target_logits, NAPO_CUDA(target_logits));
  NAPO_ADD(softmax_rows_forward, NAPO_CUDA(softmax_rows_forward));
  NAPO_ADD(softmax_columns_forward, nullptr);
  NAPO_ADD(softmax_columns_add, nullptr);
  NAPO_ADD(softmax_rows_gradient, NAPO_CUDA(softmax_rows_gradient));
  NAPO_ADD(hidden_gradient, NAPO_CUDA(hidden_gradient));
  NAPO_ADD(token_logps_forward, NAPO_CUDA(token_logps_forward));
  NAPO_ADD(token_logps_backward, NAPO_CUDA(token_logps_backward));
  NAPO_ADD(index_excluded, nullptr);
  NAPO_ADD(napo_owner_sums, NAPO_CUDA(napo_owner_sums));
  NAPO_ADD(napo_owner_gradient, NAPO_CUDA(napo_owner_gradient));
  NAPO_ADD(napo_separable_sums, NAPO_CUDA(napo_separable_sums));
  NAPO_ADD(napo_separable_gradient, NAPO_CUDA(napo_separable_gradient));
  NAPO_ADD(napo_general_sums, NAPO_CUDA(napo_general_sums));
  NAPO_ADD(napo_general_gradient, NAPO_CUDA(napo_general_gradient));
  NAPO_ADD(napo_losses, NAPO_CUDA(napo_losses));
  NAPO_ADD(napo_chosen_gradient, NAPO_CUDA(napo_chosen_gradient));
  NAPO_ADD(select_nearest, nullptr);
  kernels.add<NearestOfScoresArgs>("select_nearest_of_scores", nullptr, NAPO_CUDA(select_nearest_of_scores));
  NAPO_ADD(attention_forward, nullptr);
  NAPO_ADD(attention_backward, nullptr);
  NAPO_ADD(rms_norm_forward, nullptr);
  NAPO_ADD(rms_norm_backward, nullptr);
  NAPO_ADD(silu_product_forward, nullptr);
  NAPO_ADD(silu_product_backward, nullptr);
  NAPO_ADD(rotate, nullptr);
  NAPO_ADD(allowed_forward, nullptr);
  NAPO_ADD(allowed_backward, nullptr);
}

}  // namespace napo
