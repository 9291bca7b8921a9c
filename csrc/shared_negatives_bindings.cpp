// shared_negatives for Python, on the CPU and on CUDA. Tensors come as addresses, 0 for None; `queue` is the number of
// threads on the CPU and the address of the stream on CUDA.
#include <pybind11/pybind11.h>

#include "cpu/shared_negatives.h"
#ifdef NAPO_WITH_CUDA
#include "cuda/shared_negatives.h"
#endif

namespace py = pybind11;

namespace napo {
namespace {

using Address = uintptr_t;

void select(Address score, int64_t first_row, int64_t rows, int64_t owners, int64_t k, int64_t pool_offset,
            Address groups, Address pool_groups, Address share, bool cuda, uintptr_t queue) {
  const SelectArgs args{pointer<const float>(score),
                        first_row,
                        rows,
                        owners,
                        k,
                        pool_offset,
                        pointer<const int64_t>(groups),
                        pointer<const int64_t>(pool_groups),
                        pointer<uint8_t>(share)};
#ifdef NAPO_WITH_CUDA
  if (cuda) return cuda::select_nearest(args, reinterpret_cast<void*>(queue));
#endif
  NAPO_CHECK(!cuda, "shared_negatives: this build has no CUDA kernels");
  NAPO_CALL_KERNEL(select_nearest, (args, static_cast<int>(queue)));
}

}  // namespace

void bind_shared_negatives(py::module_& m) {
  m.def("select_nearest", &select, py::call_guard<py::gil_scoped_release>());
}

}  // namespace napo
