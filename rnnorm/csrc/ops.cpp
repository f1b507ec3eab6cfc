// The CPU operators: schemas and kernels. Operands are checked and the type is chosen here.
#include <torch/library.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "cpu/check.h"
#include "cpu/gemm.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/online_norm.h"
#include "cpu/sequence.h"

namespace rnnorm {
namespace {

c10::Dict<std::string, std::vector<std::string>> all_names() {
  c10::Dict<std::string, std::vector<std::string>> all;
  const auto add = [&all](const char* list, const auto& names) {
    all.insert(list, std::vector<std::string>(names.begin(), names.end()));
  };
  add("operands", names<Operand>);
  add("kept", names<Kept>);
  add("constants", names<Constants>);
  add("cells", names<Cell>);
  add("norms", names<Kind>);
  add("guards", names<Guard>);
  return all;
}

// The dtypes of products that have a micro-kernel.
std::vector<std::string> micro_kernels() {
  std::vector<std::string> found;
  if (micro_kernel_works<float>()) found.push_back("float32");
  if (micro_kernel_works<Half>()) found.push_back("bfloat16");
  return found;
}

constexpr Operand statistics[] = {Operand::norm_mean, Operand::norm_var, Operand::cell_norm_mean, Operand::cell_norm_var};
constexpr Operand control[] = {Operand::norm_u, Operand::norm_v, Operand::cell_norm_u, Operand::cell_norm_v};

std::vector<Tensor> run_forward(const Tensors& operands, std::string_view cell, std::string_view norm,
                                std::string_view guard, at::ArrayRef<double> constants, bool cell_norm, bool training,
                                bool reverse, bool save, bool micro, int64_t threads) {
  const Call call(operands, {cell, norm, guard, constants, cell_norm, training, reverse, save, micro, threads});
  std::vector<Tensor> found = call.dtype == at::kDouble ? forward<double>(call) : forward<float>(call);
  const std::optional<Tensor> given[] = {operands.get(index(Operand::x)), operands.get(index(Operand::h)),
                                         operands.get(index(Operand::c))};
  for (int k = 0; k < 3; ++k)  // y, h and c
    if (given[k]) found[k] = found[k].to(given[k]->scalar_type());
  // All new statistics, or none.
  if (!std::all_of(found.begin() + 3, found.begin() + 7, all_finite))
    for (int k = 0; k < 4; ++k)
      if (found[3 + k].numel() > 0) found[3 + k].copy_(call.tensors[statistics[k]]);
  return found;
}

std::vector<Tensor> run_backward(const Tensors& grads, const Tensors& operands, const std::vector<Tensor>& kept,
                                 std::string_view cell, std::string_view norm, std::string_view guard,
                                 at::ArrayRef<double> constants, bool cell_norm, bool training, bool reverse, bool micro,
                                 int64_t threads, bool need_input, bool need_weights) {
  const Call call(operands, {cell, norm, guard, constants, cell_norm, training, reverse, true, micro, threads});
  const auto pass = call.dtype == at::kDouble ? &backward<double> : &backward<float>;
  std::vector<Tensor> before;
  for (Operand which : control) before.push_back(call.has(which) ? call.tensors[which].clone() : Tensor());
  const auto restore = [&] {
    for (int k = 0; k < 4; ++k)
      if (before[k].defined()) call.tensors[control[k]].copy_(before[k]);
  };
  std::vector<Tensor> found;
  try {
    found = pass(call, call.checked(grads), call.checked(kept), need_input, need_weights);
  } catch (...) {  // one thread may have written its part before another failed
    restore();
    throw;
  }
  // All new values of u and v, or none.
  if (!std::all_of(std::begin(control), std::end(control), [&](Operand which) { return all_finite(call.tensors[which]); }))
    restore();
  const auto given = [&](Operand which) { return std::optional<Tensor>(operands.get(index(which))); };
  for (Operand which : control)
    if (auto moved = given(which); moved && !moved->is_same(call.tensors[which]))  // a copy, for its dtype or strides
      moved->copy_(call.tensors[which]);
  for (size_t k = 0; k < found.size(); ++k)
    if (auto operand = given(static_cast<Operand>(k))) found[k] = found[k].to(operand->scalar_type());
  return found;
}

}  // namespace
}  // namespace rnnorm

TORCH_LIBRARY(rnnorm_cpu, library) {
  library.def(
      "forward(Tensor?[] operands, str cell, str norm, str guard, float[] constants, bool cell_norm, bool training, "
      "bool reverse, bool save, bool micro, int threads) -> Tensor[]");
  library.def(
      "backward(Tensor?[] grads, Tensor?[] operands, Tensor[] kept, str cell, str norm, str guard, float[] constants, "
      "bool cell_norm, bool training, bool reverse, bool micro, int threads, bool need_input, bool need_weights) -> Tensor[]");
  library.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? weights, bool need_hidden, "
      "bool need_weight, bool need_bias, bool micro, bool half, int threads) -> Tensor[]");
  library.def(
      "online_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, str guard, float[] constants, int threads) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "online_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor(a!) u, "
      "Tensor(b!) v, str guard, float[] constants, bool need_input, int threads) -> (Tensor, Tensor, Tensor)");
  library.def(
      "online_norm_recorded(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) mean, Tensor(b!) var, Tensor u, Tensor v, "
      "str guard, float[] constants, int threads) -> Tensor",
      &rnnorm::online_norm_recorded);
  library.def("names() -> Dict(str, str[])", &rnnorm::all_names);
  library.def("micro_kernels() -> str[]", &rnnorm::micro_kernels);
}

TORCH_LIBRARY_IMPL(rnnorm_cpu, CPU, library) {
  library.impl("forward", &rnnorm::run_forward);
  library.impl("backward", &rnnorm::run_backward);
  library.impl("linear_cross_entropy", &rnnorm::linear_cross_entropy);
  library.impl("online_norm", &rnnorm::online_norm);
  library.impl("online_norm_backward", &rnnorm::online_norm_backward);
}
