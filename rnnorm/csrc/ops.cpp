// The schemas of the CPU operators; kernels are registered beside their code in cpu/.
#include <torch/library.h>

#include "cpu/gemm.h"

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
  library.def("has_micro_kernel() -> bool", [] { return rnnorm::micro_kernel_works(); });
}
