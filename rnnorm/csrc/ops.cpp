// The schemas of the CPU operators; kernels are registered beside their code in cpu/.
#include <torch/library.h>

#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "names.h"

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
      "bool need_weight, bool need_bias, bool micro, int threads) -> Tensor[]");
  library.def("names() -> Dict(str, str[])", &rnnorm::all_names);
  library.def("has_micro_kernel() -> bool", [] { return rnnorm::micro_kernel_works(); });
}
