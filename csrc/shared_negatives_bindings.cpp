// shared_negatives for Python, on the CPU and on CUDA. Tensors come as addresses, 0 for None.
#include <pybind11/pybind11.h>

#include "cpu/shared_negatives.h"
#ifdef NAPO_WITH_CUDA
#include "cuda/shared_negatives.h"
#endif

namespace py = pybind11;

namespace napo {
namespace {

using Address = uintptr_t;

SelectArgs arguments(int64_t users, int64_t owners, int64_t k, int64_t pool_offset, Address groups, Address pool_groups,
                     Address share) {
  return {users,
          owners,
          k,
          pool_offset,
          pointer<const int64_t>(groups),
          pointer<const int64_t>(pool_groups),
          pointer<uint8_t>(share)};
}

void nearest(Address states, Address pool, int64_t width, int64_t users, int64_t owners, int64_t k, int64_t pool_offset,
             Address groups, Address pool_groups, Address share, int threads) {
  const SelectArgs args = arguments(users, owners, k, pool_offset, groups, pool_groups, share);
  NAPO_CALL_KERNEL(select_nearest, (args, pointer<const float>(states), pointer<const float>(pool), width, threads));
}

// On CUDA, from the similarities of a block of users.
void nearest_of_scores([[maybe_unused]] Address score, [[maybe_unused]] int64_t first_row,
                       [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t users, [[maybe_unused]] int64_t owners,
                       [[maybe_unused]] int64_t k, [[maybe_unused]] int64_t pool_offset,
                       [[maybe_unused]] Address groups, [[maybe_unused]] Address pool_groups,
                       [[maybe_unused]] Address share, [[maybe_unused]] uintptr_t stream) {
#ifdef NAPO_WITH_CUDA
  cuda::select_nearest(arguments(users, owners, k, pool_offset, groups, pool_groups, share),
                       pointer<const float>(score), first_row, rows, reinterpret_cast<void*>(stream));
#else
  fail("shared_negatives: this build has no CUDA kernels");
#endif
}

}  // namespace

void bind_shared_negatives(py::module_& m) {
  m.def("nearest", &nearest, py::call_guard<py::gil_scoped_release>());
  m.def("nearest_of_scores", &nearest_of_scores, py::call_guard<py::gil_scoped_release>());
}

}  // namespace napo
