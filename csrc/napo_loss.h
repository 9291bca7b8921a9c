// The log-sums of the users' negative sets and the gradient of the negatives (docs/design.md 4.4).
//
// A log-sum is a pair (m, rest) that stands for beta * m + rest, m in the units of the log-probabilities; an empty one
// is (-inf, -inf), one of negatives without any probability (-inf, 0). A margin of -inf leaves its negative out,
// whatever its log-probability is; any other NaN, or infinity above 0, is a rest of NaN.
#pragma once

#include "kernels.h"

namespace napo {

// Excluded triples (user, owner, negative), sorted; all null where nothing is excluded.
//
// On the CPU, of user u: the places owner * N + negative in place[bounds[2u]] ... place[bounds[2u + 1] - 1], ascending
// and distinct. On CUDA, of group i: the numbers key[bounds[i]] ... key[bounds[i + 1] - 1]; for the sums the groups are
// the users and numbers are (user * B' + owner) * N + negative, for the gradients the groups are the owners and numbers
// are (owner * B + user) * N + negative; twice the same does no harm.
struct Excluded {
  const int64_t* bounds;  // (B, 2), on CUDA (B + 1,) or (B' + 1,)
  const int32_t* place;   // (E,), the CPU's
  const int64_t* key;     // (E,), CUDA's
  NAPO_FIELDS(Excluded, bounds, place, key)
};

// Sorts the triples into the CPU's form; those with a negative number are padding.
struct IndexExcludedArgs {
  const int64_t* triples;  // (count, 3)
  int64_t count, users, owners, n;
  int64_t* bounds;  // (B, 2) out
  int32_t* place;   // (count,) out
  NAPO_FIELDS(IndexExcludedArgs, triples, count, users, owners, n, bounds, place)
};

struct LossArgs {
  int64_t users, owners, n;
  float beta;
  const float* rejected;  // (B', N)
  const float* margin;    // (B', N), -inf where masked
  const uint8_t* share;   // (B, B'), 0 for no; null where every user is its only owner
  Excluded excluded;
  NAPO_FIELDS(LossArgs, users, owners, n, beta, rejected, margin, share, excluded)
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
  const float* states;
  const float* items;
  int64_t width;      // D
  const float* bias;  // (B', N) or null
  const float* line;  // (2,) slope and offset
  NAPO_FIELDS(GeneralArgs, loss, first_row, rows, full_margin, margin_stride, full_keep, keep_stride, score, states,
              items, width, bias, line)
};

// b_v: the log-sum of each owner's own negatives.
struct OwnerSumsArgs {
  LossArgs loss;
  float* m;     // (B') out
  float* rest;  // (B') out
  NAPO_FIELDS(OwnerSumsArgs, loss, m, rest)
};

// ds_vn = beta * c_v * exp(beta * s_vn + gamma_vn - b_v), added to what d_rejected holds.
struct OwnerGradientArgs {
  LossArgs loss;
  const float* owner_m;     // (B')
  const float* owner_rest;  // (B')
  const float* c;           // (B')
  float* d_rejected;        // (B', N) in and out
  NAPO_FIELDS(OwnerGradientArgs, loss, owner_m, owner_rest, c, d_rejected)
};

// lse_u from the owners' log-sums.
struct SeparableSumsArgs {
  LossArgs loss;
  const float* owner_m;
  const float* owner_rest;
  float* m;     // (B) out
  float* rest;  // (B) out
  NAPO_FIELDS(SeparableSumsArgs, loss, owner_m, owner_rest, m, rest)
};

// c_v = sum_u share_uv g_u exp(b_v - lse_u) over the pairs without an exclusion; what the others contribute is added to
// d_rejected.
struct SeparableGradientArgs {
  LossArgs loss;
  const float* owner_m;
  const float* owner_rest;
  const float* g;     // (B)
  const float* m;     // (B)
  const float* rest;  // (B)
  float* scratch;     // gradient_scratch(B, B') floats, on CUDA
  float* c;           // (B') out
  float* d_rejected;  // (B', N) in and out
  NAPO_FIELDS(SeparableGradientArgs, loss, owner_m, owner_rest, g, m, rest, scratch, c, d_rejected)
};

// lse_u of the rows of a block with any margin.
struct GeneralSumsArgs {
  GeneralArgs general;
  float* m;     // (B) out, at those rows
  float* rest;  // (B) out, at those rows
  NAPO_FIELDS(GeneralSumsArgs, general, m, rest)
};

// Adds those rows' beta * g_u * exp(beta * s_vn + gamma_uvn - lse_u) to d_rejected.
struct GeneralGradientArgs {
  GeneralArgs general;
  const float* g;
  const float* m;
  const float* rest;
  float* scratch;     // gradient_scratch(rows, B' N) floats, on CUDA
  float* d_rejected;  // (B', N) in and out
  NAPO_FIELDS(GeneralGradientArgs, general, g, m, rest, scratch, d_rejected)
};

// Numbers of the users after their negatives have been summed, (B) each.
struct UserArgs {
  int64_t users;
  float beta;
  const float* chosen;
  const float* margin;
  const float* m;
  const float* rest;
  NAPO_FIELDS(UserArgs, users, beta, chosen, margin, m, rest)
};

// softplus(t_u), t_u = lse_u + margin_u - beta * chosen_u.
struct LossesArgs {
  UserArgs user;
  float* losses;  // (B) out
  NAPO_FIELDS(LossesArgs, user, losses)
};

// g_u = grad_u sigmoid(t_u) and ds+_u = -beta g_u.
struct ChosenGradientArgs {
  UserArgs user;
  const float* grad;  // (B)
  float* g;           // (B) out
  float* d_chosen;    // (B) out
  NAPO_FIELDS(ChosenGradientArgs, user, grad, g, d_chosen)
};

}  // namespace napo

namespace napo::cpu {
void index_excluded(const IndexExcludedArgs& args, int threads);  // by one thread
}
NAPO_CPU_KERNEL(napo_owner_sums, OwnerSumsArgs)
NAPO_CPU_KERNEL(napo_owner_gradient, OwnerGradientArgs)
NAPO_CPU_KERNEL(napo_separable_sums, SeparableSumsArgs)
NAPO_CPU_KERNEL(napo_separable_gradient, SeparableGradientArgs)
NAPO_CPU_KERNEL(napo_general_sums, GeneralSumsArgs)
NAPO_CPU_KERNEL(napo_general_gradient, GeneralGradientArgs)
NAPO_CPU_KERNEL(napo_losses, LossesArgs)
NAPO_CPU_KERNEL(napo_chosen_gradient, ChosenGradientArgs)

NAPO_CUDA_KERNEL(napo_owner_sums, OwnerSumsArgs)
NAPO_CUDA_KERNEL(napo_owner_gradient, OwnerGradientArgs)
NAPO_CUDA_KERNEL(napo_separable_sums, SeparableSumsArgs)
NAPO_CUDA_KERNEL(napo_separable_gradient, SeparableGradientArgs)
NAPO_CUDA_KERNEL(napo_general_sums, GeneralSumsArgs)
NAPO_CUDA_KERNEL(napo_general_gradient, GeneralGradientArgs)
NAPO_CUDA_KERNEL(napo_losses, LossesArgs)
NAPO_CUDA_KERNEL(napo_chosen_gradient, ChosenGradientArgs)

namespace napo::cuda {
// Floats of scratch that a gradient over so many users and terms (owners in the separable form, negatives in the
// general one) needs: one sum a slab of users and term.
int64_t gradient_scratch(int64_t users, int64_t terms);
}  // namespace napo::cuda
