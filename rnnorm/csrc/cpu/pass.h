// What the forward and the backward pass over a sequence share.
#pragma once

#include <algorithm>
#include <vector>

#include "call.h"
#include "gemm.h"
#include "norm.h"
#include "step.h"

namespace rnnorm {

template <typename T>
struct Pass {
  const Call& call;
  const Walk& walk;
  const int64_t N, I, P, G, H, C, S;  // S samples without padding
  Gemm<T> gemm;
  Table<Kept> kept;
  Matrix<T> samples;          // [S, I]
  std::vector<T> ones, zeros;  // [C], at least [P], in place of missing factors, summands or a zero state
  Tensor stays_h, stays_c;    // [S, P], [S, H] share of the old state that is kept, bool or T; or undefined
  Norm<T> norm, cell_norm;

  Pass(const Call& call, const Table<Kept>& kept)
      : call(call), walk(call.walk), N(call.N), I(call.I), P(call.P), G(call.G), H(call.H), C(call.C), S(walk.S),
        gemm{call.options.micro, call.half()}, kept(kept), samples(make_samples()), ones(std::max(C, P), T(1)), zeros(std::max(C, P), T(0)),
        stays_h(compact(Operand::zoneout_h, P)), stays_c(compact(Operand::zoneout_c, H)),
        norm(make_norm(false)), cell_norm(make_norm(true)) {
    set_kept();
  }
  Pass(const Pass&) = delete;

  T* get(Operand which) const { return pointer<T>(call.tensors[which]); }
  T* get(Kept which) const { return pointer<T>(kept[which]); }

  // The number of gates whose recurrent part is added to the input part directly.
  int64_t joined_gates() const { return G - call.cell.apart; }

  // True if the recurrent product reads the state in place: the batch is dense, without resets, a mask or rounding.
  bool enters_as_it_is() const {
    return walk.dense && !gemm.half && !call.has(Operand::reset) && !call.has(Operand::recurrent_mask);
  }

  // Write h before sample s as it enters the recurrent product to a row of `to`; `spare` is [P].
  void enter(const States<T>& h, int64_t s, const Matrix<T>& to, int64_t row, std::vector<T>& spare) const {
    const T* from = h.before(s);
    if (const T* mask = get(Operand::recurrent_mask); mask != nullptr) {
      const T* factor = mask + walk.row[s] * P;
#pragma omp simd
      for (int64_t j = 0; j < P; ++j) spare[j] = from[j] * factor[j];
      from = spare.data();
    }
    to.write(row, 0, from, P);
  }

  // Call `function` with the values of a tensor of bool, as bytes, whose conversion to T the compiler vectorizes, or of T.
  template <typename Function>
  static void with_values(const Tensor& tensor, const Function& function) {
    if (tensor.scalar_type() == at::kBool) function(reinterpret_cast<uint8_t*>(tensor.template data_ptr<bool>()));
    else function(tensor.template data_ptr<T>());
  }

  template <typename V>
  static void gather(const V* rows, int64_t width, const std::vector<int64_t>& index, V* out) {
    for (size_t s = 0; s < index.size(); ++s) std::copy_n(rows + index[s] * width, width, out + s * width);
  }

  // Point the norms to the tensors in `kept`.
  void set_kept() {
    norm.y = get(Kept::y), norm.rstd = get(Kept::rstd), norm.scale = get(Kept::scale);
    cell_norm.y = get(Kept::cell_y), cell_norm.rstd = get(Kept::cell_rstd), cell_norm.scale = get(Kept::cell_scale);
  }

 private:
  Matrix<T> make_samples() const {
    const Tensor& x = call.tensors[Operand::x];
    if (walk.dense && gemm.depth(I) == I) return {gemm, x.view({S, I})};
    const Matrix<T> made(gemm, S, I);
    const auto write = [&]<typename V>(const V* rows) {
      for (int64_t s = 0; s < S; ++s) made.write(s, 0, rows + walk.position[s] * I, I);
    };
    if (gemm.half) write(x.template data_ptr<Half>());
    else write(x.template data_ptr<T>());
    return made;
  }

  // An operand [T, N, width] by sample.
  Tensor compact(Operand which, int64_t width) const {
    const Tensor& given = call.tensors[which];
    if (!given.defined() || walk.dense) return given;
    const Tensor rows = pooled({S, width}, given.scalar_type());
    with_values(given, [&]<typename V>(V* values) { gather(values, width, walk.position, static_cast<V*>(rows.data_ptr())); });
    return rows;
  }

  Norm<T> make_norm(bool of_cell) const {
    const Options& options = call.options;
    const Constants& constants = options.constants;
    Norm<T> norm;
    norm.kind = of_cell && !options.cell_norm ? Kind::none : options.kind;
    norm.guard = norm.kind == Kind::none ? Guard::none : options.guard;
    norm.training = options.training;
    norm.constants = constants.to<T>();
    norm.rest_fwd = 1 - constants.alpha_fwd;
    norm.rest_bwd = 1 - constants.alpha_bwd;
    norm.G = of_cell ? 1 : G;
    norm.H = H;
    norm.S = S;
    const T* weight = get(of_cell ? Operand::cell_norm_scale : Operand::norm_scale);
    const T* bias = get(of_cell ? Operand::cell_norm_shift : Operand::norm_shift);
    norm.weight = weight != nullptr ? weight : ones.data();
    norm.bias = bias != nullptr ? bias : zeros.data();
    norm.u = get(of_cell ? Operand::cell_norm_u : Operand::norm_u);
    norm.v = get(of_cell ? Operand::cell_norm_v : Operand::norm_v);
    return norm;
  }
};

}  // namespace rnnorm
