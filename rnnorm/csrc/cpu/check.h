// Checks of operator arguments, which kernels read through unchecked pointers.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <string_view>

namespace rnnorm {

// The name of a tensor in errors: its role, such as "operand", and its own name.
struct Label {
  const char* role;
  std::string_view name;
};

inline std::ostream& operator<<(std::ostream& out, const Label& label) {
  return out << "rnnorm: " << label.role << ' ' << label.name;
}

inline void check_memory(const at::Tensor& tensor, Label label) {
  TORCH_CHECK(tensor.is_cpu() && tensor.layout() == at::kStrided && !tensor._is_zerotensor(), label,
              " must be a dense tensor on the CPU; got one of layout ", tensor.layout(), " on ", tensor.device());
}

inline void check_dtype(const at::Tensor& tensor, Label label, at::ScalarType dtype) {
  TORCH_CHECK(tensor.scalar_type() == dtype, label, " must have dtype ", dtype, "; got ", tensor.scalar_type());
}

inline void check_shape(const at::Tensor& tensor, Label label, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.sizes() == shape, label, " must have shape ", shape, "; got ", tensor.sizes());
}

inline void check_contiguous(const at::Tensor& tensor, Label label) {
  TORCH_CHECK(tensor.is_contiguous(), label, " must be contiguous; got strides ", tensor.strides());
}

inline void check_count(size_t found, size_t expected, const char* what) {
  TORCH_CHECK(found == expected, "rnnorm: there must be ", expected, ' ', what, "; got ", found);
}

// A contiguous tensor of float or double; an undefined one has no values.
inline bool all_finite(const at::Tensor& tensor) {
  const auto finite = [&]<typename T>(const T* values) {
    return std::all_of(values, values + tensor.numel(), [](T value) { return std::isfinite(value); });
  };
  if (!tensor.defined()) return true;
  return tensor.scalar_type() == at::kDouble ? finite(tensor.const_data_ptr<double>()) : finite(tensor.const_data_ptr<float>());
}

// OpenMP aborts the process if it cannot start the threads.
inline void check_threads(int64_t threads) {
  constexpr int64_t most = 1024;
  TORCH_CHECK(threads >= 0 && threads <= most, "rnnorm: threads must lie in 0..", most, "; got ", threads);
}

}  // namespace rnnorm
