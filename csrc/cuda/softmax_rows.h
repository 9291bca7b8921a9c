// The row kernel on CUDA: the functions and arguments of cpu/softmax_rows.h, with the stream to run on.
#pragma once

#include "cpu/softmax_rows.h"

namespace napo::cuda {

void target_logits(const TargetLogitsArgs& args, void* stream);
void softmax_rows_forward(const ForwardArgs& args, void* stream);
void softmax_rows_gradient(const GradientArgs& args, void* stream);
void hidden_gradient(const HiddenGradientArgs& args, void* stream);
void token_logps_forward(const TokenForwardArgs& args, void* stream);
void token_logps_backward(const TokenBackwardArgs& args, void* stream);

}  // namespace napo::cuda
