#include "call.h"

#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

#include "check.h"
#include "cores.h"
#include "gemm.h"
#include "pool.h"

namespace rnnorm {

Options::Options(std::string_view cell, std::string_view norm, std::string_view guard, at::ArrayRef<double> constants,
                 bool cell_norm, bool training, bool reverse, bool save, bool micro, int64_t threads)
    : cell(named<Cell>("cell", cell)), kind(named<Kind>("norm", norm)), guard(named<Guard>("guard", guard)),
      cell_norm(cell_norm), training(training), reverse(reverse), save(save), micro(micro && micro_kernel_works<float>()),
      half(micro && micro_kernel_works<Half>()), threads(threads) {
  check_count(constants.size(), names<Constants>.size(), "constants");
  static_assert(sizeof(Constants) == names<Constants>.size() * sizeof(double));
  std::memcpy(&this->constants, constants.data(), sizeof(Constants));
  TORCH_CHECK(this->guard == Guard::none || kind == Kind::online, "rnnorm: guard must be none with norm ", norm, "; got ",
              guard);
  TORCH_CHECK(!cell_norm || (traits[index(this->cell)].has_c && kind != Kind::none),
              "rnnorm: cell_norm must be false with cell ", cell, " and norm ", norm, "; got true");
  check_threads(threads);
}

namespace {

at::ScalarType dtype_of(const Tensors& operands) {
  check_count(operands.size(), Table<Operand>::size, "operands");
  const std::optional<Tensor> x = operands.get(index(Operand::x));
  TORCH_CHECK(x, "rnnorm: operand x must be a tensor; got None");
  return x->scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

Call::Call(const Tensors& operands, const Options& options)
    : options(options), cell(traits[index(options.cell)]), dtype(dtype_of(operands)), tensors([&] {
        Table<Operand> found;
        for (size_t k = 0; k < found.size; ++k) {
          const std::optional<Tensor> given = operands.get(k);
          if (given) found[static_cast<Operand>(k)] = *given;
        }
        return found;
      }()),
      walk(check_operands()) {}

// Raises for invalid operands, before anything is read through their pointers.
Walk Call::check_operands() {
  for (size_t k = 0; k < tensors.size; ++k) {
    const Operand which = static_cast<Operand>(k);
    Tensor& tensor = tensors[which];
    if (!tensor.defined()) continue;
    const bool mask = (which == Operand::zoneout_h || which == Operand::zoneout_c) && tensor.scalar_type() == at::kBool;
    if (which != Operand::lengths && which != Operand::reset && !mask) {
      const bool half = which == Operand::x && tensor.scalar_type() == at::kBFloat16 && options.half;
      tensor = ready(tensor, "operand", name_of(which), half ? at::kBFloat16 : dtype);
      continue;
    }
    check_memory(tensor, {"operand", name_of(which)});
    check_dtype(tensor, {"operand", name_of(which)}, which == Operand::lengths ? at::kLong : at::kBool);
    tensor = tensor.contiguous();
  }
  needed({Operand::x, Operand::h, Operand::weight_ih, Operand::weight_hh});
  const Tensor &x = tensors[Operand::x], &h = tensors[Operand::h], &weight = tensors[Operand::weight_ih];
  G = cell.gates;
  TORCH_CHECK(x.dim() == 3 && x.size(0) > 0, "rnnorm: operand x must have shape [T, N, I], T > 0; got ", x.sizes());
  TORCH_CHECK(h.dim() == 2 && h.size(1) > 0, "rnnorm: operand h must have shape [N, P], P > 0; got ", h.sizes());
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(0) % G == 0,
              "rnnorm: operand weight_ih must have shape [", G, "*H, I], H > 0; got ", weight.sizes());
  T = x.size(0);
  N = x.size(1);
  I = x.size(2);
  P = h.size(1);
  C = weight.size(0);
  H = C / G;
  for (size_t k = 0; k < tensors.size; ++k) {
    const Operand which = static_cast<Operand>(k);
    if (has(which)) check_shape(tensors[which], {"operand", name_of(which)}, shape(which));
  }
  TORCH_CHECK(H == P || has(Operand::weight_hr), "rnnorm: operand h must have H = ", H,
              " columns without weight_hr; got ", P);
  together(Operand::bias_ih, Operand::bias_hh);
  together(Operand::norm_scale, Operand::norm_shift);
  together(Operand::cell_norm_scale, Operand::cell_norm_shift);
  if (cell.has_c) needed({Operand::c});
  for (Operand which : {Operand::c, Operand::weight_hr, Operand::zoneout_c})
    TORCH_CHECK(cell.has_c || !has(which), "rnnorm: operand ", name_of(which), " must be None with cell ",
                name_of(options.cell), "; got a tensor");
  if (options.kind == Kind::online) {
    needed({Operand::norm_mean, Operand::norm_var});
    if (options.training) needed({Operand::norm_u, Operand::norm_v});
    if (options.cell_norm) needed({Operand::cell_norm_mean, Operand::cell_norm_var});
    if (options.cell_norm && options.training) needed({Operand::cell_norm_u, Operand::cell_norm_v});
  }
  return Walk(T, N, pointer<int64_t>(tensors[Operand::lengths]), pointer<bool>(tensors[Operand::reset]), options.reverse);
}

Tensor Call::ready(const Tensor& tensor, const char* role, std::string_view name, at::ScalarType wanted) const {
  if (tensor._is_zerotensor()) return ready(at::zeros(tensor.sizes(), tensor.options()), role, name, wanted);
  check_memory(tensor, {role, name});
  TORCH_CHECK(tensor.is_floating_point(), Label{role, name}, " must have a floating-point dtype; got ", tensor.scalar_type());
  return tensor.resolve_neg().to(wanted).contiguous();
}

Gradient Call::checked(const Tensors& grads) const {
  check_count(grads.size(), 3, "gradients, those of y, h and c");
  const auto one = [&](size_t k, const char* name, at::IntArrayRef shape) {
    const std::optional<Tensor> given = grads.get(k);
    if (!given) return Tensor();
    check_shape(*given, {"gradient of", name}, shape);
    return ready(*given, "gradient of", name);
  };
  return {one(0, "y", {T, N, P}), one(1, "h", {N, P}), one(2, "c", cell.has_c ? at::DimVector{N, H} : at::DimVector{0})};
}

at::DimVector Call::shape(Operand which) const {
  switch (which) {
    case Operand::x: return {T, N, I};
    case Operand::h: return {N, P};
    case Operand::c: return {N, H};
    case Operand::weight_ih: return {C, I};
    case Operand::weight_hh: return {C, P};
    case Operand::weight_hr: return {P, H};
    case Operand::lengths: return {N};
    case Operand::reset: return {T, N};
    case Operand::recurrent_mask: return {N, P};
    case Operand::zoneout_h: return {T, N, P};
    case Operand::zoneout_c: return {T, N, H};
    case Operand::cell_norm_scale: case Operand::cell_norm_shift: case Operand::cell_norm_mean:
    case Operand::cell_norm_var: case Operand::cell_norm_u: case Operand::cell_norm_v: return {H};
    default: return {C};
  }
}

void Call::needed(std::initializer_list<Operand> all) const {
  for (Operand which : all) TORCH_CHECK(has(which), "rnnorm: operand ", name_of(which), " must be a tensor; got None");
}

void Call::together(Operand one, Operand other) const {
  TORCH_CHECK(has(one) == has(other), "rnnorm: operands ", name_of(one), " and ", name_of(other),
              " must both be tensors or both None; got one of each");
}

// Shape [0] if it does not apply.
at::DimVector Call::shape(Kept which) const {
  const bool normed = options.kind != Kind::none, scaled = options.guard == Guard::scale;
  const bool online = options.kind == Kind::online, of_cell = options.cell_norm;
  // Including padding, so that shapes do not depend on the values of lengths.
  const auto rows = [this](bool applies, int64_t width) { return applies ? at::DimVector{T * N, width} : at::DimVector{0}; };
  switch (which) {
    case Kept::hidden: return rows(true, P);
    case Kept::cell_state: return rows(cell.has_c, H);
    case Kept::cell_new: return rows(has(Operand::zoneout_c), H);
    case Kept::apart: return rows(cell.apart, H);
    case Kept::y: return rows(true, C);
    case Kept::rstd: return rows(normed, online ? C : G);
    case Kept::scale: return rows(scaled, G);
    case Kept::cell_y: return rows(of_cell, H);
    case Kept::cell_rstd: return rows(of_cell, online ? H : 1);
    case Kept::cell_scale: return rows(of_cell && scaled, 1);
    case Kept::partition: return {1};  // the number of threads, whose blocks make up y, rstd, cell_y and cell_rstd
  }
  return {};
}

Table<Kept> Call::make_kept() const {
  Table<Kept> kept;
  for (size_t k = 0; k < kept.size && options.save; ++k) {
    const Kept which = static_cast<Kept>(k);
    kept[which] = which == Kept::partition ? at::empty(shape(which), at::kLong).fill_(1) : scratch(shape(which));
  }
  return kept;
}

Table<Kept> Call::checked(const std::vector<Tensor>& saved) const {
  Table<Kept> kept;
  check_count(saved.size(), kept.size, "kept tensors");
  for (size_t k = 0; k < kept.size; ++k) {
    const Kept which = static_cast<Kept>(k);
    const Label label{"kept tensor", name_of(which)};
    check_memory(saved[k], label);
    check_dtype(saved[k], label, which == Kept::partition ? at::kLong : dtype);
    check_shape(saved[k], label, shape(which));
    check_contiguous(saved[k], label);
    kept[which] = saved[k];
  }
  const int64_t threads = *kept[Kept::partition].data_ptr<int64_t>();
  TORCH_CHECK(threads >= 1 && threads <= H, "rnnorm: kept tensor partition must be a number of threads in 1..", H,
              "; got ", threads);
  return kept;
}

// Another thread pays off if it saves some microseconds per step and has a full vector of units.
int Call::threads() const {
  constexpr int64_t worthwhile = 500'000;  // multiplications in a step
  if (options.threads > 0) return static_cast<int>(std::min(options.threads, H));
  // Below four rows, loading the weights from the cache dominates: it takes as long as computing four rows.
  const int64_t useful = std::min(H / 16, 1 + std::max<int64_t>(N, 4) * P * C / worthwhile);
  return static_cast<int>(std::clamp<int64_t>(useful, 1, available_threads()));
}

Tensor Call::empty(at::IntArrayRef shape) const { return at::empty(shape, dtype); }
Tensor Call::zeros(at::IntArrayRef shape) const { return at::zeros(shape, dtype); }
Tensor Call::scratch(at::IntArrayRef shape) const { return pooled(shape, dtype); }

}  // namespace rnnorm
