// Online normalization as a node of autograd, for calls that nothing but autograd observes: the same from Python takes three
// times as long as a small call itself.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstddef>
#include <tuple>

#include "../names.h"
#include "online_norm.h"

namespace rnnorm {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;

struct Rest {
  const Tensor &mean, &var, &u, &v;
  std::string_view guard;
  at::ArrayRef<double> constants;
  int64_t threads;
  Tensor new_mean{}, new_var{};  // moved once the call is recorded: saving its tensors may raise
};

std::optional<Tensor> like(const Tensor& statistic, const std::optional<Tensor>& parameter) {
  return parameter ? std::optional(parameter->to(statistic.scalar_type())) : std::nullopt;
}

// As in rnnorm.ops.library.begin_backward.
void begin_backward(AutogradContext* ctx, const Tensor& grad, bool need_input, bool repeatable) {
  using at::DispatchKey;
  constexpr at::DispatchKeySet transformed({DispatchKey::Batched, DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper});
  TORCH_CHECK(!(grad.defined() && (grad.key_set().has_any(transformed) || grad._fw_grad(0).defined())) &&
                  !c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode),
              RNNORM_TRANSFORM);
  TORCH_CHECK(!at::GradMode::is_enabled(), need_input ? RNNORM_DOUBLE_BACKWARD : RNNORM_FUSED_DOUBLE_BACKWARD);
  at::IValue& spent = ctx->saved_data["spent"];
  TORCH_CHECK(repeatable || !spent.toBool(), RNNORM_SECOND_BACKWARD);
  spent = true;
}

}  // namespace

// Users see its name in the output's grad_fn.
struct OnlineNormBackward : torch::autograd::Function<OnlineNormBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, Rest& rest) {
    const Tensor mean = rest.mean.clone(), var = rest.var.clone();
    Tensor y;
    std::tie(y, rest.new_mean, rest.new_var) = online_norm(x.resolve_neg(), like(mean, weight), like(mean, bias), mean, var,
                                                           rest.guard, rest.constants, rest.threads);
    ctx->save_for_backward({x, weight.value_or(Tensor()), bias.value_or(Tensor()), mean, var});
    ctx->saved_data = {{"u", rest.u}, {"v", rest.v}, {"guard", std::string(rest.guard)}, {"constants", rest.constants.vec()},
                       {"threads", rest.threads}, {"need_input", x.requires_grad()}, {"spent", false}};
    // A second backward pass is the same only where no control state moves.
    const double alpha_bwd = rest.constants[offsetof(Constants, alpha_bwd) / sizeof(double)];
    ctx->saved_data["repeatable"] = !x.requires_grad() || alpha_bwd == 1;
    ctx->set_materialize_grads(false);
    return y;
  }

  static torch::autograd::variable_list backward(AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    const auto saved = [&](const char* name) -> const at::IValue& { return ctx->saved_data.at(name); };
    const bool need_input = saved("need_input").toBool();
    const std::vector<double> constants = saved("constants").toDoubleVector();
    begin_backward(ctx, grads[0], need_input, saved("repeatable").toBool());
    const auto tensors = ctx->get_saved_variables();
    const Tensor &x = tensors[0], &mean = tensors[3], &var = tensors[4];
    const auto given = [&](int k) { return tensors[k].defined() ? std::optional(tensors[k]) : std::nullopt; };
    const std::optional<Tensor> weight = given(1), bias = given(2);
    const bool zero = !grads[0].defined() || grads[0]._is_zerotensor();
    const Tensor grad = zero ? at::zeros_like(x) : grads[0].to(x.scalar_type()).resolve_neg();
    Three found;
    if (c10::impl::TorchDispatchModeTLS::any_modes_set() || grad.key_set().has(at::DispatchKey::Python)) {
      static const auto observed = c10::Dispatcher::singleton().findSchemaOrThrow("rnnorm::online_norm_backward", "");
      std::vector<at::IValue> stack{grad, x, weight, bias, mean, var, saved("u"), saved("v"), saved("guard"), constants, "cpu", need_input};
      observed.callBoxed(stack);
      found = {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor()};
    } else {
      found = online_norm_backward(grad, x.resolve_neg(), like(mean, weight), like(mean, bias), mean, var, saved("u").toTensor(), saved("v").toTensor(),
                                   saved("guard").toStringView(), constants, need_input, saved("threads").toInt());
    }
    const auto& [dx, of_weight, of_bias] = found;
    const auto of = [&](const Tensor& gradient, const std::optional<Tensor>& parameter) {
      return parameter ? gradient.to(parameter->scalar_type()) : Tensor();
    };
    return {need_input ? dx : Tensor(), of(of_weight, weight), of(of_bias, bias), Tensor()};
  }
};

Tensor online_norm_recorded(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                            const Tensor& mean, const Tensor& var, const Tensor& u, const Tensor& v, std::string_view guard,
                            at::ArrayRef<double> constants, int64_t threads) {
  const bool affine = weight && bias;
  Rest rest{mean, var, u, v, guard, constants, threads};
  const Tensor y = OnlineNormBackward::apply(x, affine ? weight : std::nullopt, affine ? bias : std::nullopt, rest);
  mean.copy_(rest.new_mean);
  var.copy_(rest.new_var);
  return y;
}

}  // namespace rnnorm
