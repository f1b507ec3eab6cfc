// A recurrent layer and direction over a whole sequence on the CPU: rnnorm_cpu::forward and rnnorm_cpu::backward.
//
// One parallel region spans the whole time loop. Each thread owns a range of hidden units with all their gates, so
// running statistics, norms and gates are local to it; threads synchronize once per step, when the new h is complete, and once
// more where a norm reduces over the units of a gate. The recurrent product runs on weights packed once per call, by the
// micro-kernel of gemm.h. Nothing is allocated or dispatched inside a step: the loop is a template over cell and norm, which are
// chosen once. Each type is compiled in a separate file, sequence_float.cpp and sequence_double.cpp.
#pragma once

#include <vector>

#include "call.h"

namespace rnnorm {

// Returns y, h, c, the four statistics in training, then the kept tensors.
template <typename T>
std::vector<Tensor> forward(const Call& call);

// Returns gradients in the order of rnnorm.ops.call.DIFFERENTIABLE, empty where they do not apply; updates u and v of the call.
template <typename T>
std::vector<Tensor> backward(const Call& call, const Gradient& grads, const Table<Kept>& kept, bool need_input,
                             bool need_weights);

}  // namespace rnnorm
