// The forward pass over a sequence.
#pragma once

#include <cmath>
#include <vector>

#include "pass.h"
#include "sequence.h"
#include "team.h"

namespace rnnorm {

template <typename T>
struct Forward : Pass<T> {
  using Pass<T>::call, Pass<T>::walk, Pass<T>::N, Pass<T>::I, Pass<T>::P, Pass<T>::G, Pass<T>::H, Pass<T>::C, Pass<T>::S;
  using Pass<T>::gemm, Pass<T>::kept, Pass<T>::norm, Pass<T>::cell_norm, Pass<T>::get;

  Tensor y;                              // [T, N, P]
  Tensor hidden, cell_state, cell_new, projected;  // [S, P], [S, H], [S, H] before zoneout, [S, H] before the projection
  States<T> h, c;
  std::vector<T> frozen, cell_frozen;
  std::vector<Tensor> statistics;        // mean, var, cell mean, cell var; copies in training

  explicit Forward(const Call& call)
      : Pass<T>(call, call.make_kept()), y(walk.dense ? call.empty({call.T, N, P}) : call.zeros({call.T, N, P})),
        hidden(call.options.save ? kept[Kept::hidden] : walk.dense ? y : call.scratch({S, P})),
        cell_state(call.options.save ? kept[Kept::cell_state] : call.scratch({call.cell.has_c ? S : 0, H})),
        cell_new(!call.has(Operand::zoneout_c) ? cell_state : call.options.save ? kept[Kept::cell_new] : call.scratch({S, H})),
        projected(call.has(Operand::weight_hr) ? call.scratch({S, H}) : Tensor()),
        h{get(Operand::h), hidden.data_ptr<T>(), P, walk, this->zeros.data()},
        c{get(Operand::c), cell_state.data_ptr<T>(), H, walk, this->zeros.data()} {
    for (Operand which : {Operand::norm_mean, Operand::norm_var, Operand::cell_norm_mean, Operand::cell_norm_var}) {
      const Tensor& statistic = call.tensors[which];
      statistics.push_back(statistic.defined() && call.options.training ? statistic.clone() : statistic);
    }
    norm.mean = pointer<T>(statistics[0]);
    norm.var = pointer<T>(statistics[1]);
    cell_norm.mean = pointer<T>(statistics[2]);
    cell_norm.var = pointer<T>(statistics[3]);
    freeze(norm, C, frozen);
    freeze(cell_norm, H, cell_frozen);
  }

  static void freeze(Norm<T>& norm, int64_t channels, std::vector<T>& frozen) {
    if (norm.kind != Kind::online || norm.training) return;
    for (int64_t c = 0; c < channels; ++c) frozen.push_back(1 / std::sqrt(norm.var[c] + norm.constants.eps));
    norm.frozen = frozen.data();
  }

  std::vector<Tensor> run() {
    using Work = void (Forward::*)(int, Team&, Exchange<T>&);
    const Work work = choose(call.options.cell, call.options.kind,
                             []<typename Chosen, Kind kind>() -> Work { return &Forward::work<Chosen, kind>; });
    const int threads = call.threads();
    Exchange<T> exchange(threads, 2 * N * G);
    if (S > 0) Team::run(threads, [&](int id, Team& team) { (this->*work)(id, team, exchange); });
    return results();
  }

  template <typename Chosen, Kind kind>
  void work(int id, Team& team, Exchange<T>& exchange) {
    const Range units = part_of(H, id, team.size()), outputs = part_of(P, id, team.size());
    if (id == 0 && call.options.save) *kept[Kept::partition].template data_ptr<int64_t>() = team.size();
    const int64_t u = units.size(), W = G * u;
    Worker<T> me(id, team, exchange, units, norm, cell_norm, 2 * N * G);

    InputPart input(*this, units);
    const bool projects = projected.defined();
    Panels<T> joined(gemm, P, this->joined_gates() * u), apart(gemm, P, Chosen::apart ? u : 0);
    Panels<T> projection(gemm, H, projects ? outputs.size() : 0);
    for (int64_t g = 0; g < G; ++g) {
      const T* rows = get(Operand::weight_hh) + (g * H + units.begin) * P;
      if (Chosen::apart && g == G - 1) apart.pack_rows(0, u, rows, P);
      else joined.pack_rows(g * u, u, rows, P);
    }
    if (projects) projection.pack_rows(0, outputs.size(), get(Operand::weight_hr) + outputs.begin * H, H);

    const Matrix<T> gathered(gemm, this->enters_as_it_is() ? 0 : N, P), rounded(gemm, projects && gemm.half ? N : 0, H);
    std::vector<T> spare_h(P), apart_part(Chosen::apart ? N * u : 0), spare(N * u);
    T* const out = (projects ? projected : hidden).template data_ptr<T>();
    for (const Step& step : walk.steps) {
      if (step.count == 0) continue;
      const Left<T> before = state_before(step, gathered, spare_h);
      ForwardStep<T, kind> at(me, step, h, c, cell_new.data_ptr<T>());
      at.pre = {input.of(step), 0, W};
      at.bias = input.bias();
      at.apart = {apart_part.data(), 0, u};
      at.spare = {spare.data(), 0, u};
      at.h = {out, step.first * H + units.begin, H};
      at.zeros = this->zeros.data();
      joined.multiply(step.count, before, at.pre.data, W, true);
      if constexpr (Chosen::apart) {
        apart.multiply(step.count, before, at.apart.data, u, false);
        finish_apart(step, units, at.apart);
      }
      Chosen::forward(at);
      zoneout(step, units, c, this->stays_c, cell_new);
      if (!projects) zoneout(step, units, h, this->stays_h, hidden);
      team.wait();
      if (projects) {
        Left<T> rows{out + step.first * H, nullptr, H};
        if (gemm.half) {
          for (int64_t i = 0; i < step.count; ++i) rounded.write(i, 0, rows.values + i * H, H);
          rows = rounded.left();
        }
        projection.multiply(step.count, rows, h.history + step.first * P + outputs.begin, P, false);
        zoneout(step, outputs, h, this->stays_h, hidden);
        team.wait();
      }
    }
    publish(part_of(S, id, team.size()));
    gemm.release();
  }

  // Add the bias to the last gate's recurrent part, and copy it to the kept tensor.
  void finish_apart(const Step& step, Range units, Rows<T> rows) const {
    const T* bias = get(Operand::bias_hh);
    T* keep = get(Kept::apart);
    for (int64_t i = 0; i < step.count; ++i) {
      T* __restrict part = rows(i);
      if (bias != nullptr) {
        const T* b = bias + (G - 1) * H + units.begin;
#pragma omp simd
        for (int64_t j = 0; j < units.size(); ++j) part[j] += b[j];
      }
      if (keep != nullptr) std::copy_n(part, units.size(), keep + (step.first + i) * H + units.begin);
    }
  }

  // Write these columns of the state after a step, from the new values and the state before it.
  void zoneout(const Step& step, Range columns, const States<T>& state, const Tensor& stays, const Tensor& values) const {
    if (!stays.defined()) return;
    this->with_values(stays, [&]<typename V>(const V* shares) {
      for (int64_t s = step.first; s < step.first + step.count; ++s) {
        const int64_t at = s * state.width + columns.begin;
        const V* __restrict share = shares + at;
        const T* __restrict before = state.before(s) + columns.begin;
        const T* from = values.data_ptr<T>() + at;
        T* to = state.history + at;
#pragma omp simd
        for (int64_t j = 0; j < columns.size(); ++j) to[j] = T(share[j]) * before[j] + (1 - T(share[j])) * from[j];
      }
    });
  }

  // Copy h of these samples to y, which shares no memory with kept tensors, since the caller may modify it in place.
  void publish(Range samples) const {
    T* const to = y.data_ptr<T>();
    if (h.history == to) return;
    for (int64_t s = samples.begin; s < samples.end; ++s) std::copy_n(h.history + s * P, P, to + walk.position[s] * P);
  }

  // The input part of this thread's units, computed for many samples at once: enough for an efficient product, few enough to
  // remain in the cache until used.
  class InputPart {
   public:
    InputPart(const Forward& pass, Range units)
        : pass_(pass), W_(pass.G * units.size()), panels_(pass.gemm, pass.I, W_), bias_(W_),
          capacity_(std::min(std::max<int64_t>(256, pass.N), pass.S)), part_(capacity_ * W_) {
      const T *bias = pass.get(Operand::bias_ih), *hidden_bias = pass.get(Operand::bias_hh);
      const int64_t u = units.size();
      for (int64_t g = 0; g < pass.G; ++g) {
        const int64_t channel = g * pass.H + units.begin;
        panels_.pack_rows(g * u, u, pass.get(Operand::weight_ih) + channel * pass.I, pass.I);
        // A separate recurrent part has its own bias.
        for (int64_t j = 0; j < u && bias != nullptr; ++j)
          bias_[g * u + j] = bias[channel + j] + (g < pass.joined_gates() ? hidden_bias[channel + j] : T(0));
      }
    }

    // Returns [count, W] for the samples of a step; the caller may overwrite it.
    T* of(const Step& step) {
      if (step.first < first_ || step.first + step.count > end_) {
        // In a reverse direction the following samples precede this step in memory.
        first_ = pass_.call.options.reverse ? std::max<int64_t>(0, step.first + step.count - capacity_) : step.first;
        end_ = std::min(first_ + capacity_, pass_.S);
        panels_.multiply(end_ - first_, pass_.samples.left(first_), part_.data(), W_, false);
      }
      return part_.data() + (step.first - first_) * W_;
    }

    // [W], to be added to the sum of both products.
    const T* bias() const { return bias_.data(); }

   private:
    const Forward& pass_;
    int64_t W_;
    Panels<T> panels_;
    std::vector<T> bias_;
    int64_t capacity_, first_ = 0, end_ = 0;
    Array<T> part_;
  };

  // h of the step's rows before it, as it enters the recurrent product, [count, P].
  Left<T> state_before(const Step& step, const Matrix<T>& gathered, std::vector<T>& spare) const {
    if (this->enters_as_it_is()) return {h.before(step.first), nullptr, P};
    for (int64_t i = 0; i < step.count; ++i) this->enter(h, step.first + i, gathered, i, spare);
    return gathered.left();
  }

  // y [T, N, P], h [N, P], c [N, H], the four statistics in training, then the kept tensors.
  std::vector<Tensor> results() {
    const Tensor last_h = call.empty({N, P}), last_c = call.cell.has_c ? call.empty({N, H}) : call.empty({0});
    this->gather(h.history, P, walk.last, last_h.data_ptr<T>());
    if (call.cell.has_c) this->gather(c.history, H, walk.last, last_c.data_ptr<T>());
    std::vector<Tensor> out{y, last_h, last_c};
    const bool moved = call.options.training && call.options.kind == Kind::online;
    for (const Tensor& statistic : statistics)
      out.push_back(moved && statistic.defined() ? statistic : call.empty({0}));
    for (size_t k = 0; k < kept.size && call.options.save; ++k) out.push_back(kept[static_cast<Kept>(k)]);
    return out;
  }
};

template <typename T>
std::vector<Tensor> forward(const Call& call) {
  return Forward<T>(call).run();
}

}  // namespace rnnorm
