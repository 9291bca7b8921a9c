// The log-sums of the users' negative sets and the gradient of the negatives (DESIGN.md 4.4).
//
// A log-sum is a pair (m, rest) that stands for beta * m + rest, m in the units of the log-probabilities; an empty one
// is (-inf, -inf). A margin of -inf leaves its negative out.
#pragma once

#include "cpu/dispatch.h"

namespace napo {

// Excluded negatives of user u: the places owner * N + negative in place[bounds[2u]] ... place[bounds[2u + 1] - 1],
// ascending and distinct.
struct Excluded {
  const int64_t* bounds;  // (B, 2), null where nothing is excluded
  const int32_t* place;   // (E,)
};

// Sorts the triples (user, owner, negative) into that form; those with a negative number are padding.
void index_excluded(const int64_t* triples, int64_t count, int64_t users, int64_t owners, int64_t n, int64_t* bounds,
                    int32_t* place);

struct LossArgs {
  int64_t users, owners, n;
  float beta;
  const float* rejected;  // (B', N)
  const float* margin;    // (B', N), -inf where masked
  const uint8_t* share;   // (B, B'), 0 or 1
  Excluded excluded;
};

// What is known of the users when their negatives have been summed, (B) each.
struct UserArgs {
  int64_t users;
  float beta;
  const float *chosen, *margin, *m, *rest;
};

// The parts of a margin that depend on user and negative both, for the rows of one block.
struct GeneralArgs {
  LossArgs loss;
  int64_t first_row, rows;
  const float* full_margin;  // (1 or B, 1 or B', 1 or N) with strides, 0 where it is 1; null where absent
  int64_t margin_stride[3];
  const uint8_t* full_keep;  // likewise
  int64_t keep_stride[3];
  // The pair margin max(0, offset + slope * (state . item + bias)); null where absent. On CUDA the products come as
  // `score` (rows, B' N), on the CPU they are computed from the states (B, D) and the items (B', N, D).
  const float* score;
  const float *states, *items;
  int64_t width;      // D
  const float* bias;  // (B', N) or null
  const float* line;  // (2,) slope and offset
};

}  // namespace napo

// b_v: the log-sum of each owner's own negatives. Out: m, rest (B').
NAPO_DECLARE_KERNEL(napo_owner_sums, (const LossArgs& args, float* m, float* rest, int threads))
// ds_vn = beta * c_v * exp(beta * s_vn + gamma_vn - b_v), added to what d_rejected (B', N) holds.
NAPO_DECLARE_KERNEL(napo_owner_gradient, (const LossArgs& args, const float* owner_m, const float* owner_rest,
                                          const float* c, float* d_rejected, int threads))
// lse_u from the owners' log-sums. Out: m, rest (B).
NAPO_DECLARE_KERNEL(napo_separable_sums, (const LossArgs& args, const float* owner_m, const float* owner_rest, float* m,
                                          float* rest, int threads))
// c_v = sum_u share_uv g_u exp(b_v - lse_u) (B') over the pairs without an exclusion; what the others contribute is
// added to d_rejected (B', N).
NAPO_DECLARE_KERNEL(napo_separable_gradient,
                    (const LossArgs& args, const float* owner_m, const float* owner_rest, const float* g,
                     const float* m, const float* rest, float* c, float* d_rejected, int threads))
// loss_u = softplus(t_u), t_u = beta * (m_u - chosen_u) + (rest_u + margin_u), from the users' log-sums. Out: (B).
NAPO_DECLARE_KERNEL(napo_losses, (const UserArgs& args, float* losses, int threads))
// g_u = grad_u sigmoid(t_u) and ds+_u = -beta g_u. Out: (B) each.
NAPO_DECLARE_KERNEL(napo_chosen_gradient,
                    (const UserArgs& args, const float* grad, float* g, float* d_chosen, int threads))
// lse_u of the rows of a block with any margin. Out: m, rest (B), at those rows.
NAPO_DECLARE_KERNEL(napo_general_sums, (const GeneralArgs& args, float* m, float* rest, int threads))
// Adds those rows' beta * g_u * exp(beta * s_vn + gamma_uvn - lse_u) to d_rejected (B', N).
NAPO_DECLARE_KERNEL(napo_general_gradient, (const GeneralArgs& args, const float* g, const float* m, const float* rest,
                                            float* d_rejected, int threads))
