// shared_negatives for Python. Tensors come as addresses, 0 for None.
#include <pybind11/pybind11.h>

#include "cpu/shared_negatives.h"

namespace py = pybind11;

namespace napo {
namespace {

using Address = uintptr_t;

void select(Address score, int64_t first_row, int64_t rows, int64_t owners, int64_t k, int64_t pool_offset,
            Address groups, Address pool_groups, Address share, int threads) {
  const SelectArgs args{pointer<const float>(score),
                        first_row,
                        rows,
                        owners,
                        k,
                        pool_offset,
                        pointer<const int64_t>(groups),
                        pointer<const int64_t>(pool_groups),
                        pointer<uint8_t>(share)};
  NAPO_CALL_KERNEL(select_nearest, (args, threads));
}

}  // namespace

void bind_shared_negatives(py::module_& m) {
  m.def("select_nearest", &select, py::call_guard<py::gil_scoped_release>());
}

}  // namespace napo
