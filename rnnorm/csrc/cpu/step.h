// The arguments of a cell's step: the samples of one time step, and the hidden units of one thread.
#pragma once

#include <cstdint>

#include "norm.h"
#include "walk.h"

namespace rnnorm {

// A row for each sample of the step, from the thread's first unit on.
template <typename T>
struct Rows {
  T* data = nullptr;  // null if the cell has no such rows
  int64_t ld = 0;

  Rows() = default;
  Rows(T* all, int64_t offset, int64_t ld) : data(all == nullptr ? nullptr : all + offset), ld(ld) {}

  T* operator()(int64_t i) const { return data + i * ld; }
};

// A state h or c [*, width] over time.
template <typename T>
struct States {
  const T* initial;  // [N, width]
  T* history;        // [S, width]
  int64_t width;
  const Walk& walk;
  const T* zeros;    // [width]

  // Before the step of sample s.
  const T* before(int64_t s) const {
    const int64_t previous = walk.before[s];
    if (previous == Walk::zero) return zeros;
    return previous == Walk::initial ? initial + walk.row[s] * width : history + previous * width;
  }
};

template <typename T>
struct RowsBefore {
  const States<T>& states;
  int64_t first, unit;

  const T* operator()(int64_t i) const { return states.before(first + i) + unit; }
};

template <typename T>
struct StepOf {
  Worker<T>& me;
  Step step;
  RowsBefore<T> h_before, c_before;
  Rows<T> c;  // after the step

  // `new_c` [S, H] receives the new c: the history of c itself, or with zoneout the values before it.
  StepOf(Worker<T>& me, const Step& step, const States<T>& h, const States<T>& c, T* new_c)
      : me(me), step(step), h_before{h, step.first, me.units.begin}, c_before{c, step.first, me.units.begin},
        c(new_c, step.first * c.width + me.units.begin, c.width) {}

  int64_t count() const { return step.count; }
  int64_t units() const { return me.units.size(); }
};

// `kind` is that of the norms.
template <typename T, Kind kind>
struct ForwardStep : StepOf<T> {
  using StepOf<T>::StepOf, StepOf<T>::me, StepOf<T>::step;

  Rows<T> pre;               // [gates * units] sums of both products, without biases; may be overwritten
  const T* bias = nullptr;   // [gates * units]
  Rows<T> apart;             // [units] if apart: the last gate's recurrent part with its bias, which `pre` lacks
  Rows<T> spare;             // [units] scratch
  Rows<T> h;                 // [units] the new h, or the projection's input
  const T* zeros = nullptr;  // [units]

  // Add the biases to the pre-activations of gates g0..g1 and normalize them, in place.
  void normalize(int g0, int g1) const {
    const int64_t begin = g0 * me.units.size();
    norm_forward<kind>(me.norm, me, g0, g1, step.first, step.count, pre.data + begin, pre.ld, bias + begin);
  }

  // The same for values of c, if cell_norm is on.
  void normalize_cell(Rows<T> values) const {
    if (me.cell_norm.kind == Kind::none) return;
    norm_forward<kind>(me.cell_norm, me, 0, 1, step.first, step.count, values.data, values.ld, zeros);
  }

  // The [gates * units] values that the norm keeps for row i; null if nothing is kept.
  T* kept(int64_t i) const {
    return me.norm.y == nullptr ? nullptr : me.norm.y + me.norm.place(me.units, step.first + i, 0);
  }
};

template <typename T, Kind kind>
struct BackwardStep : StepOf<T> {
  using StepOf<T>::StepOf, StepOf<T>::me, StepOf<T>::step;

  Rows<const T> dh;      // [units] gradient of the new h, or of the projection's input
  Rows<T> q;             // [gates * units] scratch for the inputs of the nonlinearities
  Gradients<T> d;        // by gate: gradients of the pre-activations, the result
  Rows<T> dc;            // [units] scratch
  Rows<T> direct;        // [units] if reads_h: gradient of h before the step other than through its product; a result
  Rows<const T> apart;   // [units] as in the forward pass
  Rows<T> projected;     // [units] the projection's input, recomputed; null without a projection
  T* carried = nullptr;  // [N, units] if has_c: gradient of c after the step, replaced by that before it

  T* dc_carried(int64_t i) const { return carried + me.units.size() * this->c_before.states.walk.row[step.first + i]; }

  const T* kept(int64_t i) const { return me.norm.y + me.norm.place(me.units, step.first + i, 0); }

  // Write the inputs of the nonlinearities of row i to `q`.
  void recompute(int64_t i) const { norm_recompute<kind>(me.norm, me, step.first + i, q(i)); }

  // Turn the gradients of the nonlinearities' inputs of gates g0..g1 into those of their pre-activations, in place.
  void normalize(int g0, int g1) const {
    norm_backward<kind>(me.norm, me, g0, g1, step.first, step.count, q.data + g0 * me.units.size(), q.ld,
                        Gradients<T>{d.at(0, g0), d.ld, d.gate});
  }

  // The same for c, if cell_norm is on.
  void normalize_cell(Rows<T> gradients) const {
    if (me.cell_norm.kind == Kind::none) return;
    norm_backward<kind>(me.cell_norm, me, 0, 1, step.first, step.count, this->c.data, this->c.ld,
                        Gradients<T>{gradients.data, gradients.ld, gradients.ld});
  }
};

}  // namespace rnnorm
