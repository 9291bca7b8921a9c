// Selection of the most similar owners of each user (DESIGN.md 4.3).
#pragma once

#include "cpu/dispatch.h"

namespace napo {

struct SelectArgs {
  int64_t users, owners;
  int64_t k;                   // neighbours
  int64_t pool_offset;         // row u is column pool_offset + u
  const int64_t* groups;       // (B,) or null: owners of the user's group are not eligible
  const int64_t* pool_groups;  // (owners,)
  uint8_t* share;              // (B, owners) out, 0 or 1
};

}  // namespace napo

// By the products of `states` (B, width) with `pool` (owners, width).
NAPO_DECLARE_KERNEL(select_nearest,
                    (const SelectArgs& args, const float* states, const float* pool, int64_t width, int threads))
