// The selection on CUDA: arguments of cpu/shared_negatives.h, with the stream to run on.
#pragma once

#include "cpu/shared_negatives.h"

namespace napo::cuda {

void select_nearest(const SelectArgs& args, void* stream);

}  // namespace napo::cuda
