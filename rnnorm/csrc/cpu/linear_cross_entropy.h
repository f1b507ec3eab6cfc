// A linear decoder and its cross entropy on the CPU, with gradients, without storing all logits.
//
// Each thread owns a slice of the vocabulary and processes the rows block by block. In a block it computes tile by tile the
// logits (transposed, [tile, rows], so that weights and gradients are used in their own layout), their exponentials relative
// to a reference that is chosen before the maximum is known, and the product of these with the weights. After a barrier the
// sums give the log-sum-exp, and the kept exponentials give the gradients of weight and bias; the factor that converts them
// to probabilities is applied to the narrow operand, hidden.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace rnnorm {

// nats [M] float64, and the gradients of their weighted sum; those that are not needed are empty. All tensors are contiguous;
// hidden [M, E], weight [V, E], bias [V] and the rows' weights [M] of one dtype, float32 or float64; targets [M] int64.
// With `half`, products of float32 run in bfloat16 where the processor can; sums, exponentials and gradients stay in float32.
std::vector<at::Tensor> linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                             const std::optional<at::Tensor>& bias, const at::Tensor& targets,
                                             const std::optional<at::Tensor>& weights, bool need_hidden, bool need_weight,
                                             bool need_bias, bool micro, bool half, int64_t threads);

}  // namespace rnnorm
