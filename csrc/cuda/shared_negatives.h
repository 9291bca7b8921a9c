// The selection on CUDA: arguments of cpu/shared_negatives.h, similarities as a matmul left them, and the stream to run
// on.
#pragma once

#include "cpu/shared_negatives.h"

namespace napo::cuda {

// `score` (rows, owners) are those of the users from first_row on.
void select_nearest(const SelectArgs& args, const float* score, int64_t first_row, int64_t rows, void* stream);

}  // namespace napo::cuda
