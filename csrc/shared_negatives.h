// Selection of the most similar owners of each user (docs/design.md 4.3).
#pragma once

#include "kernels.h"

namespace napo {

struct SelectArgs {
  int64_t users, owners;
  int64_t k;                   // neighbours
  int64_t pool_offset;         // row u is column pool_offset + u
  const int64_t* groups;       // (B,) or null: owners of the user's group are not eligible
  const int64_t* pool_groups;  // (owners,)
  uint8_t* share;              // (B, owners) out, 0 or 1
  NAPO_FIELDS(SelectArgs, users, owners, k, pool_offset, groups, pool_groups, share)
};

// By the products of the states.
struct NearestArgs {
  SelectArgs select;
  const float* states;  // (B, width)
  const float* pool;    // (owners, width)
  int64_t width;
  NAPO_FIELDS(NearestArgs, select, states, pool, width)
};

// By the similarities of a block of users.
struct NearestOfScoresArgs {
  SelectArgs select;
  const float* score;  // (rows, owners), of the users from first_row on
  int64_t first_row, rows;
  NAPO_FIELDS(NearestOfScoresArgs, select, score, first_row, rows)
};

}  // namespace napo

NAPO_CPU_KERNEL(select_nearest, NearestArgs)
NAPO_CUDA_KERNEL(select_nearest_of_scores, NearestOfScoresArgs)
