// napo_loss for Python: a `NapoLoss` object holds the addresses of the problem's tensors (0 for None), its methods are
// the kernels. It keeps no tensor alive: the caller does.
#include <pybind11/pybind11.h>

#include "cpu/napo_loss.h"

namespace py = pybind11;

namespace napo {
namespace {

using Address = uintptr_t;
using Strides = int64_t[3];

class NapoLoss {
 public:
  NapoLoss(int64_t users, int64_t owners, int64_t n, float beta, Address rejected, Address margin, Address share,
           Address exclude_bounds, Address exclude_place, int threads)
      : loss_{users,
              owners,
              n,
              beta,
              pointer<const float>(rejected),
              pointer<const float>(margin),
              pointer<const uint8_t>(share),
              {pointer<const int64_t>(exclude_bounds), pointer<const int32_t>(exclude_place)}},
        threads_(threads) {
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
  void set_pair_margin(Address bias, float slope, float offset) {
    general_.bias = pointer<const float>(bias);
    general_.slope = slope;
    general_.offset = offset;
  }

  void owner_sums(Address m, Address rest) const {
    NAPO_CALL_KERNEL(napo_owner_sums, (loss_, pointer<float>(m), pointer<float>(rest), threads_));
  }
  void owner_gradient(Address owner_m, Address owner_rest, Address c, Address d_rejected) const {
    NAPO_CALL_KERNEL(napo_owner_gradient, (loss_, pointer<float>(owner_m), pointer<float>(owner_rest),
                                           pointer<float>(c), pointer<float>(d_rejected), threads_));
  }
  void separable_sums(Address owner_m, Address owner_rest, Address m, Address rest) const {
    NAPO_CALL_KERNEL(napo_separable_sums, (loss_, pointer<float>(owner_m), pointer<float>(owner_rest),
                                           pointer<float>(m), pointer<float>(rest), threads_));
  }
  void separable_gradient(Address owner_m, Address owner_rest, Address g, Address m, Address rest, Address c,
                          Address d_rejected) const {
    NAPO_CALL_KERNEL(napo_separable_gradient,
                     (loss_, pointer<float>(owner_m), pointer<float>(owner_rest), pointer<float>(g), pointer<float>(m),
                      pointer<float>(rest), pointer<float>(c), pointer<float>(d_rejected), threads_));
  }
  void general_sums(int64_t first_row, int64_t rows, Address score, Address m, Address rest) {
    const GeneralArgs args = block(first_row, rows, score);
    NAPO_CALL_KERNEL(napo_general_sums, (args, pointer<float>(m), pointer<float>(rest), threads_));
  }
  void general_gradient(int64_t first_row, int64_t rows, Address score, Address g, Address m, Address rest,
                        Address d_rejected) {
    const GeneralArgs args = block(first_row, rows, score);
    NAPO_CALL_KERNEL(napo_general_gradient, (args, pointer<float>(g), pointer<float>(m), pointer<float>(rest),
                                             pointer<float>(d_rejected), threads_));
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
  int threads_;
};

void index_triples(Address triples, int64_t count, int64_t users, int64_t owners, int64_t n, Address bounds,
                   Address place) {
  index_excluded(pointer<const int64_t>(triples), count, users, owners, n, pointer<int64_t>(bounds),
                 pointer<int32_t>(place));
}

}  // namespace

void bind_napo_loss(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("index_excluded", &index_triples, release());
  py::class_<NapoLoss>(m, "NapoLoss")
      .def(py::init<int64_t, int64_t, int64_t, float, Address, Address, Address, Address, Address, int>())
      .def("set_full_margin", &NapoLoss::set_full_margin)
      .def("set_full_keep", &NapoLoss::set_full_keep)
      .def("set_pair_margin", &NapoLoss::set_pair_margin)
      .def("owner_sums", &NapoLoss::owner_sums, release())
      .def("owner_gradient", &NapoLoss::owner_gradient, release())
      .def("separable_sums", &NapoLoss::separable_sums, release())
      .def("separable_gradient", &NapoLoss::separable_gradient, release())
      .def("general_sums", &NapoLoss::general_sums, release())
      .def("general_gradient", &NapoLoss::general_gradient, release());
}

}  // namespace napo
