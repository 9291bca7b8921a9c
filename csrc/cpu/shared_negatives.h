// Selection of the most similar owners of each user (DESIGN.md 4.3).
#pragma once

#include "cpu/dispatch.h"

namespace napo {

// Rows [first_row, first_row + rows) of the (B, B') similarities, as a matmul left them.
struct SelectArgs {
  const float* score;  // (rows, owners)
  int64_t first_row, rows, owners;
  int64_t k;                   // neighbours
  int64_t pool_offset;         // row u is column pool_offset + u
  const int64_t* groups;       // (B,) or null: owners of the user's group are not eligible
  const int64_t* pool_groups;  // (owners,)
  uint8_t* share;              // (B, owners) out, 0 or 1
};

}  // namespace napo

NAPO_DECLARE_KERNEL(select_nearest, (const SelectArgs& args, int threads))
