// One call of rnnorm_cpu::forward or backward: its options, operands and sizes, and the tensors kept between the two.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "cells.h"
#include "walk.h"

namespace rnnorm {

using at::Tensor;
using Tensors = c10::List<std::optional<Tensor>>;

struct Options {
  Options(std::string_view cell, std::string_view norm, std::string_view guard, at::ArrayRef<double> constants,
          bool cell_norm, bool training, bool reverse, bool save, bool micro, int64_t threads);

  Cell cell;
  Kind kind;
  Guard guard;
  Constants constants;
  bool cell_norm, training, reverse, save;
  bool micro, half;  // use the micro-kernels for products of float32 and of bfloat16
  int64_t threads;  // 0: chosen by the size of the problem
};

struct Gradient {
  Tensor y, h, c;
};

// One tensor for each member of an enum; undefined if absent.
template <typename Enum>
class Table {
 public:
  Tensor& operator[](Enum which) { return tensors_[index(which)]; }
  const Tensor& operator[](Enum which) const { return tensors_[index(which)]; }

  static constexpr size_t size = names<Enum>.size();

 private:
  std::array<Tensor, size> tensors_;
};

template <typename T>
T* pointer(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.data_ptr<T>() : nullptr;
}

// The constructor checks the arguments; kernels rely on that.
class Call {
 public:
  Call(const Tensors& operands, const Options& options);

  // The gradients of y, h and c, contiguous and of the call's dtype; undefined if absent.
  Gradient checked(const Tensors& grads) const;
  Table<Kept> make_kept() const;
  Table<Kept> checked(const std::vector<Tensor>& kept) const;
  // The number of threads to use.
  int threads() const;

  // True if products run in bfloat16.
  bool half() const { return tensors[Operand::x].scalar_type() == at::kBFloat16; }
  bool has(Operand which) const { return tensors[which].defined(); }
  Tensor empty(at::IntArrayRef shape) const;
  Tensor zeros(at::IntArrayRef shape) const;
  Tensor scratch(at::IntArrayRef shape) const;  // uninitialized, for temporaries and kept tensors

  Options options;
  Traits cell;
  at::ScalarType dtype;     // of the computation
  Table<Operand> tensors;   // contiguous and, except lengths, reset, bool masks and bfloat16's x, of that dtype
  int64_t T, N, I, P, G, H, C;
  Walk walk;

 private:
  Walk check_operands();
  Tensor ready(const Tensor& tensor, const char* role, std::string_view name) const { return ready(tensor, role, name, dtype); }
  Tensor ready(const Tensor& tensor, const char* role, std::string_view name, at::ScalarType wanted) const;
  at::DimVector shape(Operand which) const;
  at::DimVector shape(Kept which) const;
  void needed(std::initializer_list<Operand> all) const;
  void together(Operand one, Operand other) const;
};

}  // namespace rnnorm
