// Gated recurrent unit: r, z = sigmoid(.), n = tanh(input part + r * recurrent part), h' = (1 - z) n + z h.
#pragma once

#include "../math.h"
#include "../step.h"

namespace rnnorm::cells {

struct gru {
  static constexpr int gates = 3;
  static constexpr bool apart = true, has_c = false, reads_h = true;

  template <typename T, Kind kind>
  static void forward(const ForwardStep<T, kind>& at) {
    const int64_t u = at.units();
    at.normalize(0, 2);
    for (int64_t i = 0; i < at.count(); ++i) {
      T* __restrict q = at.pre(i);
      const T* __restrict part = at.apart(i);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) q[2 * u + j] += sigmoid(q[j]) * part[j];
    }
    at.normalize(2, 3);
    for (int64_t i = 0; i < at.count(); ++i) {
      const T* __restrict q = at.pre(i);
      const T* __restrict before = at.h_before(i);
      T* __restrict h = at.h(i);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T n = tanh(q[2 * u + j]);
        h[j] = n + sigmoid(q[u + j]) * (before[j] - n);
      }
    }
  }

  template <typename T, Kind kind>
  static void backward(const BackwardStep<T, kind>& at) {
    const int64_t u = at.units();
    for (int64_t i = 0; i < at.count(); ++i) {
      at.recompute(i);
      const T* __restrict q = at.q(i);
      const T* __restrict dh = at.dh(i);
      T* __restrict dn = at.d.at(i, 2);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T n = tanh(q[2 * u + j]);
        dn[j] = dh[j] * (1 - sigmoid(q[u + j])) * (1 - n * n);
      }
    }
    at.normalize(2, 3);
    for (int64_t i = 0; i < at.count(); ++i) {
      const T* __restrict q = at.q(i);
      const T* __restrict dh = at.dh(i);
      const T* __restrict h = at.h_before(i);
      const T* __restrict part = at.apart(i);
      T* __restrict d = at.d.at(i, 0);
      T* __restrict direct = at.direct(i);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T r = sigmoid(q[j]), z = sigmoid(q[u + j]), n = tanh(q[2 * u + j]);
        direct[j] = dh[j] * z;
        d[j] = d[2 * u + j] * part[j] * r * (1 - r);
        d[u + j] = dh[j] * (h[j] - n) * z * (1 - z);
      }
    }
    at.normalize(0, 2);
  }

  template <typename T, Kind kind>
  static void recurrent_gradient(const BackwardStep<T, kind>& at) {
    const int64_t u = at.units();
    for (int64_t i = 0; i < at.count(); ++i) {
      const T* __restrict q = at.q(i);
      T* __restrict dn = at.d.at(i, 2);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) dn[j] *= sigmoid(q[j]);
    }
  }
};

}  // namespace rnnorm::cells
