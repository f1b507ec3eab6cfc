// Elman network: h' = tanh(.) or relu(.).
#pragma once

#include "../math.h"
#include "../step.h"

namespace rnnorm::cells {

template <bool is_tanh>
struct rnn {
  static constexpr int gates = 1;
  static constexpr bool apart = false, has_c = false, reads_h = false;

  template <typename T, Kind kind>
  static void forward(const ForwardStep<T, kind>& at) {
    const int64_t u = at.units();
    at.normalize(0, 1);
    for (int64_t i = 0; i < at.count(); ++i) {
      const T* __restrict q = at.pre(i);
      T* __restrict h = at.h(i);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) h[j] = is_tanh ? tanh(q[j]) : q[j] < 0 ? T(0) : q[j];
    }
  }

  template <typename T, Kind kind>
  static void backward(const BackwardStep<T, kind>& at) {
    const int64_t u = at.units();
    for (int64_t i = 0; i < at.count(); ++i) {
      at.recompute(i);
      const T* __restrict q = at.q(i);
      const T* __restrict dh = at.dh(i);
      T* __restrict d = at.d.at(i, 0);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        if constexpr (is_tanh) {
          const T h = tanh(q[j]);
          d[j] = dh[j] * (1 - h * h);
        } else {
          d[j] = q[j] > 0 ? dh[j] : T(0);
        }
      }
    }
    at.normalize(0, 1);
  }
};

using rnn_tanh = rnn<true>;
using rnn_relu = rnn<false>;

}  // namespace rnnorm::cells
