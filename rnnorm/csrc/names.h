// The lists of names that Python and C++ share; that of the cells is in cpu/cells.h. The operator rnnorm_cpu::names returns
// all lists, and a test compares names and order with Python's.
#pragma once

#include <c10/util/Exception.h>

#include <array>
#include <cstddef>
#include <string_view>

// rnnorm.ops.call.Operands
#define RNNORM_OPERANDS(_)                                                                                \
  _(x) _(h) _(c) _(weight_ih) _(weight_hh) _(bias_ih) _(bias_hh) _(weight_hr) _(norm_scale) _(norm_shift) \
  _(cell_norm_scale) _(cell_norm_shift) _(lengths) _(reset) _(recurrent_mask) _(zoneout_h) _(zoneout_c)   \
  _(norm_mean) _(norm_var) _(norm_u) _(norm_v) _(cell_norm_mean) _(cell_norm_var) _(cell_norm_u) _(cell_norm_v)

// What the forward pass keeps for the backward pass: rnnorm.ops.native.widths
#define RNNORM_KEPT(_) \
  _(hidden) _(cell_state) _(cell_new) _(apart) _(y) _(rstd) _(scale) _(cell_y) _(cell_rstd) _(cell_scale) _(partition)

// rnnorm.norms.Constants
#define RNNORM_CONSTANTS(_) _(eps) _(alpha_fwd) _(alpha_bwd) _(scale_eps) _(clamp_limit) _(control_floor)

// rnnorm.norms.KINDS and GUARDS
#define RNNORM_NORMS(_) _(none) _(online) _(layer) _(rms)
#define RNNORM_GUARDS(_) _(none) _(scale) _(clamp)

#define RNNORM_MEMBER(name) name,
#define RNNORM_STRING(name) #name,
#define RNNORM_FIELD(name) T name;
#define RNNORM_CAST(name) static_cast<To>(name),
#define RNNORM_NAMES(LIST) std::to_array<std::string_view>({LIST(RNNORM_STRING)})
#define RNNORM_ENUM(Enum, LIST)            \
  enum class Enum { LIST(RNNORM_MEMBER) }; \
  template <>                              \
  inline constexpr auto names<Enum> = RNNORM_NAMES(LIST);

namespace rnnorm {

template <typename Names>
inline constexpr auto names = nullptr;

RNNORM_ENUM(Operand, RNNORM_OPERANDS)
RNNORM_ENUM(Kept, RNNORM_KEPT)
RNNORM_ENUM(Kind, RNNORM_NORMS)
RNNORM_ENUM(Guard, RNNORM_GUARDS)

template <typename T>
struct ConstantsOf {
  RNNORM_CONSTANTS(RNNORM_FIELD)

  template <typename To>
  ConstantsOf<To> to() const {
    return {RNNORM_CONSTANTS(RNNORM_CAST)};
  }
};
using Constants = ConstantsOf<double>;
template <>
inline constexpr auto names<Constants> = RNNORM_NAMES(RNNORM_CONSTANTS);

template <typename Enum>
constexpr size_t index(Enum member) {
  return static_cast<size_t>(member);
}

template <typename Enum>
constexpr std::string_view name_of(Enum member) {
  return names<Enum>[index(member)];
}

template <typename Enum>
Enum named(const char* what, std::string_view name) {
  for (size_t i = 0; i < names<Enum>.size(); ++i)
    if (names<Enum>[i] == name) return static_cast<Enum>(i);
  TORCH_CHECK(false, "rnnorm: ", what, " must be one of ", at::ArrayRef(names<Enum>), "; got ", name);
}

}  // namespace rnnorm
