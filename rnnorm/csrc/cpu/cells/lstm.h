// Long short-term memory: i, f, o = sigmoid(.), g = tanh(.), c' = f c + i g, normalized with cell_norm, h' = o tanh(c').
#pragma once

#include "../math.h"
#include "../step.h"

namespace rnnorm::cells {

struct lstm {
  static constexpr int gates = 4;
  static constexpr bool apart = false, has_c = true, reads_h = false;

  template <typename T, Kind kind>
  static void forward(const ForwardStep<T, kind>& at) {
    const int64_t u = at.units();
    if constexpr (kind == Kind::none) return fused(at);
    at.normalize(0, 4);
    for (int64_t i = 0; i < at.count(); ++i) {
      const T* __restrict q = at.pre(i);
      const T* __restrict c = at.c_before(i);
      T* __restrict now = at.spare(i);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j)
        now[j] = sigmoid(q[u + j]) * c[j] + sigmoid(q[j]) * tanh(q[2 * u + j]);
    }
    at.normalize_cell(at.spare);
    for (int64_t i = 0; i < at.count(); ++i) {
      const T* __restrict q = at.pre(i) + 3 * u;
      const T* __restrict now = at.spare(i);
      T* __restrict c = at.c(i);
      T* __restrict h = at.h(i);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        c[j] = now[j];
        h[j] = sigmoid(q[j]) * tanh(now[j]);
      }
    }
  }

  template <typename T, Kind kind>
  static void backward(const BackwardStep<T, kind>& at) {
    const int64_t u = at.units();
    if constexpr (kind == Kind::none) return fused(at);
    for (int64_t i = 0; i < at.count(); ++i) {
      at.recompute(i);
      const T* __restrict c = at.c(i);
      const T* __restrict later = at.dc_carried(i);
      const T* __restrict o = at.q(i) + 3 * u;
      const T* __restrict dh = at.dh(i);
      T* __restrict d_o = at.d.at(i, 3);
      T* __restrict dc = at.dc(i);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T gate = sigmoid(o[j]), t = tanh(c[j]);
        d_o[j] = dh[j] * t * gate * (1 - gate);
        dc[j] = later[j] + dh[j] * gate * (1 - t * t);
      }
      if (at.projected.data == nullptr) continue;
      T* __restrict projected = at.projected(i);
      for (int64_t j = 0; j < u; ++j) projected[j] = sigmoid(o[j]) * tanh(c[j]);
    }
    at.normalize_cell(at.dc);
    for (int64_t i = 0; i < at.count(); ++i) {
      const T* __restrict c = at.c_before(i);
      const T* __restrict q = at.q(i);
      const T* __restrict dc = at.dc(i);
      T* __restrict d = at.d.at(i, 0);
      T* __restrict earlier = at.dc_carried(i);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T in = sigmoid(q[j]), forget = sigmoid(q[u + j]), g = tanh(q[2 * u + j]);
        d[j] = dc[j] * g * in * (1 - in);
        d[u + j] = dc[j] * c[j] * forget * (1 - forget);
        d[2 * u + j] = dc[j] * in * (1 - g * g);
        earlier[j] = dc[j] * forget;
      }
    }
    at.normalize(0, 4);
  }

 private:
  // Without a norm one pass over the units is enough, and the gates are kept instead of their pre-activations.
  template <typename T>
  static void fused(const ForwardStep<T, Kind::none>& at) {
    const int64_t u = at.units();
    for (int64_t i = 0; i < at.count(); ++i) {
      const T *q = at.pre(i), *bias = at.bias, *before = at.c_before(i);
      T *kept = at.kept(i), *gates = kept != nullptr ? kept : at.pre(i), *c = at.c(i), *h = at.h(i);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T in = sigmoid(q[j] + bias[j]), forget = sigmoid(q[u + j] + bias[u + j]);
        const T g = tanh(q[2 * u + j] + bias[2 * u + j]), o = sigmoid(q[3 * u + j] + bias[3 * u + j]);
        const T now = forget * before[j] + in * g;
        gates[j] = in;
        gates[u + j] = forget;
        gates[2 * u + j] = g;
        gates[3 * u + j] = o;
        c[j] = now;
        h[j] = o * tanh(now);
      }
    }
  }

  template <typename T>
  static void fused(const BackwardStep<T, Kind::none>& at) {
    const int64_t u = at.units();
    for (int64_t i = 0; i < at.count(); ++i) {
      const T* __restrict gates = at.kept(i);
      const T* __restrict now = at.c(i);
      const T* __restrict before = at.c_before(i);
      const T* __restrict dh = at.dh(i);
      T* __restrict d = at.d.at(i, 0);
      T* __restrict carried = at.dc_carried(i);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T in = gates[j], forget = gates[u + j], g = gates[2 * u + j], o = gates[3 * u + j], t = tanh(now[j]);
        const T dc = carried[j] + dh[j] * o * (1 - t * t);
        d[j] = dc * g * in * (1 - in);
        d[u + j] = dc * before[j] * forget * (1 - forget);
        d[2 * u + j] = dc * in * (1 - g * g);
        d[3 * u + j] = dh[j] * t * o * (1 - o);
        carried[j] = dc * forget;
      }
      if (at.projected.data == nullptr) continue;
      T* __restrict projected = at.projected(i);
      for (int64_t j = 0; j < u; ++j) projected[j] = gates[3 * u + j] * tanh(now[j]);
    }
  }
};

}  // namespace rnnorm::cells
