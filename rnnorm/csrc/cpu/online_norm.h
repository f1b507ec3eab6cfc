// Online normalization of C independent channels on the CPU, with the affine map and the guard, forward and backward.
//
// Samples of a channel are processed in order. A sample of a channel is D values: they are read
// once for the sums, and once more, from the cache, for the result. Nothing is kept for the backward pass but the input and
// the statistics before the call: it repeats the forward recurrence beside its own.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace rnnorm {

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The output, of the shape, strides and dtype of `x` [N, C, *], and the new mean and var [C]: those before the call if any
// would not be finite. `weight` and `bias` [C] have the dtype of the statistics; both or neither.
Three online_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                  const at::Tensor& mean, const at::Tensor& var, std::string_view guard, at::ArrayRef<double> constants,
                  int64_t threads);

// The gradients of `x`, `weight` and `bias`; empty without an affine map. `mean` and `var` are those before the forward call.
// Updates `u` and `v` in place, unless they would not be finite. Without `need_input` the control process does not run.
Three online_norm_backward(const at::Tensor& grad, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                           const std::optional<at::Tensor>& bias, const at::Tensor& mean, const at::Tensor& var, at::Tensor u,
                           at::Tensor v, std::string_view guard, at::ArrayRef<double> constants, bool need_input,
                           int64_t threads);

// As `online_norm`, recorded by autograd: moves `mean` and `var` in place, and the backward pass `u` and `v`. All tensors have
// the dtypes that they have in the module. For calls that no mode, tracer or transform observes.
at::Tensor online_norm_recorded(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& bias, const at::Tensor& mean, const at::Tensor& var,
                                const at::Tensor& u, const at::Tensor& v, std::string_view guard,
                                at::ArrayRef<double> constants, int64_t threads);

}  // namespace rnnorm
