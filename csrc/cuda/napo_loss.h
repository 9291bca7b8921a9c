// napo_loss on CUDA: the functions and arguments of cpu/napo_loss.h, with the stream to run on.
#pragma once

#include "cpu/napo_loss.h"

namespace napo::cuda {

// Excluded triples (user, owner, negative) as sorted numbers, those of a group together: for the sums by user,
// (user * B' + owner) * N + negative, for the gradients by owner, (owner * B + user) * N + negative. Those of group i
// are key[bounds[i]] ... key[bounds[i + 1] - 1]; twice the same does no harm. LossArgs.excluded is not used.
struct SortedTriples {
  const int64_t* bounds;  // (B + 1,) or (B' + 1,), null where nothing is excluded
  const int64_t* key;     // (E,)
};

// Floats of scratch that a gradient over so many users and terms (owners in the separable form, negatives in the
// general one) needs: one sum a slab of users and term.
int64_t gradient_scratch(int64_t users, int64_t terms);

void napo_owner_sums(const LossArgs& args, float* m, float* rest, void* stream);
void napo_owner_gradient(const LossArgs& args, const float* owner_m, const float* owner_rest, const float* c,
                         float* d_rejected, void* stream);
void napo_separable_sums(const LossArgs& args, const SortedTriples& by_user, const float* owner_m,
                         const float* owner_rest, float* m, float* rest, void* stream);
void napo_separable_gradient(const LossArgs& args, const SortedTriples& by_owner, const float* owner_m,
                             const float* owner_rest, const float* g, const float* m, const float* rest, float* scratch,
                             float* c, float* d_rejected, void* stream);
void napo_general_sums(const GeneralArgs& args, const SortedTriples& by_user, float* m, float* rest, void* stream);
void napo_general_gradient(const GeneralArgs& args, const SortedTriples& by_owner, const float* g, const float* m,
                           const float* rest, float* scratch, float* d_rejected, void* stream);

}  // namespace napo::cuda
