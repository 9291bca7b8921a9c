// napo_loss for Python, on the CPU and on CUDA: a `LossKernels` object holds the addresses of the problem's tensors (0
// for None), its methods are the kernels. It keeps no tensor alive: the caller does.
#include <pybind11/pybind11.h>

#include "cpu/napo_loss.h"
#ifdef NAPO_WITH_CUDA
#include "cuda/napo_loss.h"
#endif

namespace py = pybind11;

namespace napo {
namespace {

using Address = uintptr_t;
using Strides = int64_t[3];

#ifdef NAPO_WITH_CUDA
#define NAPO_RUN(name, cuda_arguments, cpu_arguments) \
  if (cuda_) return cuda::name cuda_arguments;        \
  NAPO_CALL_KERNEL(name, cpu_arguments)
#else
#define NAPO_RUN(name, cuda_arguments, cpu_arguments) NAPO_CALL_KERNEL(name, cpu_arguments)
#endif

// `queue` is the number of threads on the CPU and the address of the stream on CUDA. The excluded triples come as
// `bounds` and `index`: cpu/napo_loss.h says what they are on the CPU, cuda/napo_loss.h what they are on CUDA.
class LossKernels {
 public:
  LossKernels(int64_t users, int64_t owners, int64_t n, float beta, Address rejected, Address margin, Address share,
              Address bounds, Address index, bool cuda, uintptr_t queue)
      : loss_{users,
              owners,
              n,
              beta,
              pointer<const float>(rejected),
              pointer<const float>(margin),
              pointer<const uint8_t>(share),
              {}},
        cuda_(cuda),
        threads_(static_cast<int>(queue)) {
#ifdef NAPO_WITH_CUDA
    stream_ = reinterpret_cast<void*>(queue);
    if (cuda) sorted_ = {pointer<const int64_t>(bounds), pointer<const int64_t>(index)};
#else
    NAPO_CHECK(!cuda, "napo_loss: this build has no CUDA kernels");
#endif
    if (!cuda) loss_.excluded = {pointer<const int64_t>(bounds), pointer<const int32_t>(index)};
    general_.loss = loss_;
  }

  void set_full_margin(Address margin, int64_t user_stride, int64_t owner_stride, int64_t negative_stride) {
    general_.full_margin = pointer<const float>(margin);
    set(general_.margin_stride, user_stride, owner_stride, negative_stride);
  }
  void set_full_keep(Address keep, int64_t user_stride, int64_t owner_stride, int64_t negative_stride) {
    general_.full_keep = pointer<const uint8_t>(keep);
    set(general_.keep_stride, user_stride, owner_stride, negative_stride);
  }
  void set_pair_margin(Address states, Address items, int64_t width, Address bias, Address line) {
    general_.states = pointer<const float>(states);
    general_.items = pointer<const float>(items);
    general_.width = width;
    general_.bias = pointer<const float>(bias);
    general_.line = pointer<const float>(line);
  }

  // Floats that a gradient wants as `scratch`, over a block of `users` and so many terms: owners or negatives.
  int64_t gradient_scratch(int64_t users, int64_t terms) const {
#ifdef NAPO_WITH_CUDA
    if (cuda_) return cuda::gradient_scratch(users, terms);
#endif
    return 0;
  }

  void owner_sums(Address m, Address rest) const {
    NAPO_RUN(napo_owner_sums, (loss_, pointer<float>(m), pointer<float>(rest), stream_),
             (loss_, pointer<float>(m), pointer<float>(rest), threads_));
  }
  void owner_gradient(Address owner_m, Address owner_rest, Address c, Address d_rejected) const {
    const float *m = pointer<float>(owner_m), *rest = pointer<float>(owner_rest);
    NAPO_RUN(napo_owner_gradient, (loss_, m, rest, pointer<float>(c), pointer<float>(d_rejected), stream_),
             (loss_, m, rest, pointer<float>(c), pointer<float>(d_rejected), threads_));
  }
  void separable_sums(Address owner_m, Address owner_rest, Address m, Address rest) const {
    const float *of_owner = pointer<float>(owner_m), *of_owner_rest = pointer<float>(owner_rest);
    NAPO_RUN(napo_separable_sums,
             (loss_, sorted_, of_owner, of_owner_rest, pointer<float>(m), pointer<float>(rest), stream_),
             (loss_, of_owner, of_owner_rest, pointer<float>(m), pointer<float>(rest), threads_));
  }
  void separable_gradient(Address owner_m, Address owner_rest, Address g, Address m, Address rest,
                          [[maybe_unused]] Address scratch, Address c, Address d_rejected) const {
    const float *of_owner = pointer<float>(owner_m), *of_owner_rest = pointer<float>(owner_rest);
    NAPO_RUN(napo_separable_gradient,
             (loss_, sorted_, of_owner, of_owner_rest, pointer<float>(g), pointer<float>(m), pointer<float>(rest),
              pointer<float>(scratch), pointer<float>(c), pointer<float>(d_rejected), stream_),
             (loss_, of_owner, of_owner_rest, pointer<float>(g), pointer<float>(m), pointer<float>(rest),
              pointer<float>(c), pointer<float>(d_rejected), threads_));
  }
  void general_sums(int64_t first_row, int64_t rows, Address score, Address m, Address rest) const {
    const GeneralArgs args = block(first_row, rows, score);
    NAPO_RUN(napo_general_sums, (args, sorted_, pointer<float>(m), pointer<float>(rest), stream_),
             (args, pointer<float>(m), pointer<float>(rest), threads_));
  }
  void general_gradient(int64_t first_row, int64_t rows, Address score, Address g, Address m, Address rest,
                        [[maybe_unused]] Address scratch, Address d_rejected) const {
    const GeneralArgs args = block(first_row, rows, score);
    NAPO_RUN(napo_general_gradient,
             (args, sorted_, pointer<float>(g), pointer<float>(m), pointer<float>(rest), pointer<float>(scratch),
              pointer<float>(d_rejected), stream_),
             (args, pointer<float>(g), pointer<float>(m), pointer<float>(rest), pointer<float>(d_rejected), threads_));
  }

 private:
  static void set(Strides& strides, int64_t user, int64_t owner, int64_t negative) {
    strides[0] = user;
    strides[1] = owner;
    strides[2] = negative;
  }
  GeneralArgs block(int64_t first_row, int64_t rows, Address score) const {
    GeneralArgs args = general_;
    args.first_row = first_row;
    args.rows = rows;
    args.score = pointer<const float>(score);
    return args;
  }

  LossArgs loss_;
  GeneralArgs general_{};
  bool cuda_;
  int threads_;
#ifdef NAPO_WITH_CUDA
  cuda::SortedTriples sorted_{};
  void* stream_;
#endif
};

UserArgs users_of(int64_t users, float beta, Address chosen, Address margin, Address m, Address rest) {
  return {users,
          beta,
          pointer<const float>(chosen),
          pointer<const float>(margin),
          pointer<const float>(m),
          pointer<const float>(rest)};
}

void losses(int64_t users, float beta, Address chosen, Address margin, Address m, Address rest, Address out,
            int threads) {
  const UserArgs args = users_of(users, beta, chosen, margin, m, rest);
  NAPO_CALL_KERNEL(napo_losses, (args, pointer<float>(out), threads));
}

void chosen_gradient(int64_t users, float beta, Address chosen, Address margin, Address m, Address rest, Address grad,
                     Address g, Address d_chosen, int threads) {
  const UserArgs args = users_of(users, beta, chosen, margin, m, rest);
  NAPO_CALL_KERNEL(napo_chosen_gradient,
                   (args, pointer<const float>(grad), pointer<float>(g), pointer<float>(d_chosen), threads));
}

void index_triples(Address triples, int64_t count, int64_t users, int64_t owners, int64_t n, Address bounds,
                   Address place) {
  index_excluded(pointer<const int64_t>(triples), count, users, owners, n, pointer<int64_t>(bounds),
                 pointer<int32_t>(place));
}

}  // namespace

void bind_napo_loss(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("index_excluded", &index_triples, release());
  m.def("losses", &losses, release());
  m.def("chosen_gradient", &chosen_gradient, release());
  py::class_<LossKernels>(m, "LossKernels")
      .def(py::init<int64_t, int64_t, int64_t, float, Address, Address, Address, Address, Address, bool, uintptr_t>())
      .def("set_full_margin", &LossKernels::set_full_margin)
      .def("set_full_keep", &LossKernels::set_full_keep)
      .def("set_pair_margin", &LossKernels::set_pair_margin)
      .def("gradient_scratch", &LossKernels::gradient_scratch)
      .def("owner_sums", &LossKernels::owner_sums, release())
      .def("owner_gradient", &LossKernels::owner_gradient, release())
      .def("separable_sums", &LossKernels::separable_sums, release())
      .def("separable_gradient", &LossKernels::separable_gradient, release())
      .def("general_sums", &LossKernels::general_sums, release())
      .def("general_gradient", &LossKernels::general_gradient, release());
}

}  // namespace napo
