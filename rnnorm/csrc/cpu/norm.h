// One step of a normalization for the units of one thread, forward and backward.
// Channels are independent in a stream, so loops run over blocks of channels outside, samples inside.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../cell.h"
#include "team.h"

namespace rnnorm {

inline constexpr int64_t block = 64;  // channels whose stream states stay in registers and the nearest cache

template <typename T>
struct Norm {
  Kind kind = Kind::none;
  Guard guard = Guard::none;
  bool training = false;
  T eps = 0, alpha_fwd = 1, alpha_bwd = 1, scale_eps = 0, limit = 0;
  int64_t G = 0, H = 0;
  const T *weight = nullptr, *bias = nullptr;                      // [C] or null
  T *mean = nullptr, *var = nullptr, *u = nullptr, *v = nullptr;  // [C], moved in place
  T *y = nullptr, *rstd = nullptr, *scale = nullptr;              // kept: [S, C], [S, C] or [S, G], [S, G]; null: not kept
  T *grad_weight = nullptr, *grad_bias = nullptr;                 // [C], added to

  bool per_gate() const { return kind == Kind::layer || kind == Kind::rms; }
  bool reduces() const { return per_gate() || guard == Guard::scale; }
};

// What one thread needs to work on its units: who it is, and the exchange of partial sums with the others.
template <typename T>
struct Worker {
  int id;
  Team& team;
  Exchange<T>& exchange;
  Range units;
  std::vector<T> total;  // as many values as one exchange holds
  int turn = 0;

  T* partial() { return exchange.mine(id, turn); }
  // After all have written `count` partial values: the sum of each over the threads, in a fixed order.
  const T* sum(int64_t count) {
    team.wait();
    std::fill_n(total.data(), count, T(0));
    for (int t = 0; t < team.size(); ++t) {
      const T* theirs = exchange.mine(t, turn);
      for (int64_t i = 0; i < count; ++i) total[i] += theirs[i];
    }
    ++turn;
    return total.data();
  }
};

// Affine map and clamp for one row of channels; returns the sum of squares where the guard wants it.
template <typename T>
inline T finish_row(const Norm<T>& norm, int64_t channel, int64_t count, const T* __restrict y, T* __restrict q) {
  if (norm.weight != nullptr) {
    const T *w = norm.weight + channel, *b = norm.bias + channel;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) q[j] = w[j] * y[j] + b[j];
  } else {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) q[j] = y[j];
  }
  T squares = 0;
  if (norm.guard == Guard::clamp) {
    const T limit = norm.limit;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      // Comparisons, not min and max: a NaN stays one.
      const T low = q[j] < -limit ? -limit : q[j];
      q[j] = low > limit ? limit : low;
    }
  } else if (norm.guard == Guard::scale) {
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < count; ++j) squares += q[j] * q[j];
  }
  return squares;
}

// The online stream of a block of channels over the n samples of a step, in order.
template <typename T>
void stream_forward(const Norm<T>& norm, int64_t channel, int64_t count, int64_t sample, int64_t n, T* q, int64_t ld,
                    T* squares, int64_t squares_ld) {
  T mean[block], var[block], y_row[block];
  std::copy_n(norm.mean + channel, count, mean);
  std::copy_n(norm.var + channel, count, var);
  const int64_t C = norm.G * norm.H;
  const T eps = norm.eps, alpha = norm.alpha_fwd, rest = 1 - alpha;
  const bool moves = norm.training;
  for (int64_t i = 0; i < n; ++i) {
    T* __restrict x = q + i * ld;
    T* __restrict y = norm.y != nullptr ? norm.y + (sample + i) * C + channel : y_row;
    if (moves) {
      if (norm.rstd != nullptr) {
        T* __restrict rstd = norm.rstd + (sample + i) * C + channel;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          const T d = x[j] - mean[j], r = 1 / std::sqrt(var[j] + eps);
          rstd[j] = r;
          y[j] = d * r;
          var[j] = alpha * (var[j] + rest * d * d);
          mean[j] += rest * d;
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          const T d = x[j] - mean[j];
          y[j] = d / std::sqrt(var[j] + eps);
          var[j] = alpha * (var[j] + rest * d * d);
          mean[j] += rest * d;
        }
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) y[j] = (x[j] - mean[j]) / std::sqrt(var[j] + eps);
      if (norm.rstd != nullptr) {
        T* rstd = norm.rstd + (sample + i) * C + channel;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) rstd[j] = 1 / std::sqrt(var[j] + eps);
      }
    }
    const T sum = finish_row(norm, channel, count, y, x);
    if (squares != nullptr) squares[i * squares_ld] += sum;
  }
  if (moves) {
    std::copy_n(mean, count, norm.mean + channel);
    std::copy_n(var, count, norm.var + channel);
  }
}

// Layer and RMS normalization: moments over the H units of a gate, gathered from all threads.
// Means and squares about them combine exactly, so no digits are lost as with sums of squares.
template <typename T>
void moments_forward(const Norm<T>& norm, Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, T* q, int64_t ld) {
  const int64_t u = me.units.size(), C = norm.G * norm.H, gates = g1 - g0, cells = n * gates;
  T* mine = me.partial();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t g = 0; g < gates; ++g) {
      const T* x = q + i * ld + g * u;
      T sum = 0, squares = 0;
      if (norm.kind == Kind::layer) {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < u; ++j) sum += x[j];
      }
      const T own = u > 0 ? sum / u : 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t j = 0; j < u; ++j) squares += (x[j] - own) * (x[j] - own);
      mine[(i * gates + g) * 2] = own;
      mine[(i * gates + g) * 2 + 1] = squares;
    }
  me.team.wait();
  for (int64_t k = 0; k < cells; ++k) {
    T mean = 0, squares = 0;
    for (int t = 0; t < me.team.size(); ++t)
      mean += me.exchange.mine(t, me.turn)[2 * k] * part_of(norm.H, t, me.team.size()).size();
    mean /= norm.H;
    for (int t = 0; t < me.team.size(); ++t) {
      const T* theirs = me.exchange.mine(t, me.turn) + 2 * k;
      squares += theirs[1] + part_of(norm.H, t, me.team.size()).size() * (theirs[0] - mean) * (theirs[0] - mean);
    }
    const T r = 1 / std::sqrt(squares / norm.H + norm.eps);
    const int64_t i = k / gates, g = k % gates, channel = (g0 + g) * norm.H + me.units.begin;
    T* __restrict x = q + i * ld + g * u;
#pragma omp simd
    for (int64_t j = 0; j < u; ++j) x[j] = (x[j] - mean) * r;
    if (norm.y != nullptr) {
      std::copy_n(x, u, norm.y + (sample + i) * C + channel);
      if (me.id == 0) norm.rstd[(sample + i) * norm.G + g0 + g] = r;
    }
    if (norm.weight != nullptr) {
      const T *w = norm.weight + channel, *b = norm.bias + channel;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) x[j] = w[j] * x[j] + b[j];
    }
  }
  ++me.turn;
}

// Without a norm, what is kept for the backward are the pre-activations themselves.
template <typename T>
void keep_plain(const Norm<T>& norm, const Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, const T* q,
                int64_t ld) {
  if (norm.y == nullptr) return;
  const int64_t u = me.units.size(), C = norm.G * norm.H;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t g = 0; g < g1 - g0; ++g)
      std::copy_n(q + i * ld + g * u, u, norm.y + (sample + i) * C + (g0 + g) * norm.H + me.units.begin);
}

// Normalize the pre-activations `q` [n, gates * units] (row stride `ld`) of gates g0..g1 of a step, in place.
template <typename T>
void norm_forward(const Norm<T>& norm, Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, T* q, int64_t ld) {
  if (norm.kind == Kind::none) return keep_plain(norm, me, g0, g1, sample, n, q, ld);
  if (norm.per_gate()) return moments_forward(norm, me, g0, g1, sample, n, q, ld);
  const int64_t u = me.units.size(), gates = g1 - g0;
  T* squares = norm.guard == Guard::scale ? me.partial() : nullptr;
  if (squares != nullptr) std::fill_n(squares, n * gates, T(0));
  for (int64_t g = 0; g < gates; ++g)
    for (int64_t j = 0; j < u; j += block)
      stream_forward(norm, (g0 + g) * norm.H + me.units.begin + j, std::min(block, u - j), sample, n,
                     q + g * u + j, ld, squares == nullptr ? nullptr : squares + g, gates);
  if (squares == nullptr) return;
  const T* total = me.sum(n * gates);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t g = 0; g < gates; ++g) {
      const T factor = 1 / std::sqrt(total[i * gates + g] / norm.H + norm.scale_eps);
      if (norm.scale != nullptr && me.id == 0) norm.scale[(sample + i) * norm.G + g0 + g] = factor;
      T* x = q + i * ld + g * u;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) x[j] *= factor;
    }
}

// The guarded values `q` of gates g0..g1 again, from what was kept.
template <typename T>
void norm_recompute(const Norm<T>& norm, const Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, T* q,
                    int64_t ld) {
  const int64_t u = me.units.size(), C = norm.G * norm.H;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t g = 0; g < g1 - g0; ++g) {
      const int64_t channel = (g0 + g) * norm.H + me.units.begin;
      T* x = q + i * ld + g * u;
      finish_row(norm, channel, u, norm.y + (sample + i) * C + channel, x);
      if (norm.guard == Guard::scale) {
        const T factor = norm.scale[(sample + i) * norm.G + g0 + g];
#pragma omp simd
        for (int64_t j = 0; j < u; ++j) x[j] *= factor;
      }
    }
}

// The control process of a block of channels over the n samples of a step, in order.
template <typename T>
void stream_backward(const Norm<T>& norm, int64_t channel, int64_t count, int64_t sample, int64_t n, T* g, int64_t ld) {
  T u[block], v[block];
  std::copy_n(norm.u + channel, count, u);
  std::copy_n(norm.v + channel, count, v);
  const int64_t C = norm.G * norm.H;
  const T rest = 1 - norm.alpha_bwd;
  for (int64_t i = 0; i < n; ++i) {
    T* __restrict d = g + i * ld;
    const T *y = norm.y + (sample + i) * C + channel, *rstd = norm.rstd + (sample + i) * C + channel;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const T e = d[j] - rest * v[j] * y[j];
      v[j] += e * y[j];
      const T dx = e * rstd[j] - rest * u[j];
      u[j] += dx;
      d[j] = dx;
    }
  }
  std::copy_n(u, count, norm.u + channel);
  std::copy_n(v, count, norm.v + channel);
}

// Through the affine map of one row: gradients of weight and bias are added, `g` becomes that of y.
template <typename T>
inline void affine_backward(const Norm<T>& norm, int64_t channel, int64_t count, const T* __restrict y,
                            T* __restrict g) {
  if (norm.weight == nullptr) return;
  const T* w = norm.weight + channel;
  T *__restrict gw = norm.grad_weight + channel, *__restrict gb = norm.grad_bias + channel;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    gw[j] += g[j] * y[j];
    gb[j] += g[j];
    g[j] *= w[j];
  }
}

// Through the guard of all rows: `g` becomes the gradient of the affine map's output; `q` are the guarded values.
template <typename T>
void guard_backward(const Norm<T>& norm, Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, const T* q,
                    int64_t q_ld, T* g, int64_t ld) {
  const int64_t u = me.units.size(), gates = g1 - g0, C = norm.G * norm.H;
  if (norm.guard == Guard::clamp) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < gates; ++k) {
        const int64_t channel = (g0 + k) * norm.H + me.units.begin;
        const T* y = norm.y + (sample + i) * C + channel;
        T* d = g + i * ld + k * u;
        for (int64_t j = 0; j < u; ++j) {
          const T z = norm.weight != nullptr ? norm.weight[channel + j] * y[j] + norm.bias[channel + j] : y[j];
          d[j] = std::fabs(z) <= norm.limit ? d[j] : 0;
        }
      }
    return;
  }
  if (norm.guard != Guard::scale) return;
  T* mine = me.partial();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < gates; ++k) {
      const T *a = q + i * q_ld + k * u, *d = g + i * ld + k * u;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < u; ++j) sum += a[j] * d[j];
      mine[i * gates + k] = sum;
    }
  const T* total = me.sum(n * gates);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < gates; ++k) {
      const T mean = total[i * gates + k] / norm.H, factor = norm.scale[(sample + i) * norm.G + g0 + k];
      const T* a = q + i * q_ld + k * u;
      T* __restrict d = g + i * ld + k * u;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) d[j] = factor * (d[j] - a[j] * mean);
    }
}

template <typename T>
void moments_backward(const Norm<T>& norm, Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, T* g, int64_t ld) {
  const int64_t u = me.units.size(), gates = g1 - g0, C = norm.G * norm.H;
  T* mine = me.partial();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < gates; ++k) {
      const T *d = g + i * ld + k * u, *y = norm.y + (sample + i) * C + (g0 + k) * norm.H + me.units.begin;
      T sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
      for (int64_t j = 0; j < u; ++j) {
        sum += d[j];
        product += d[j] * y[j];
      }
      mine[(i * gates + k) * 2] = sum;
      mine[(i * gates + k) * 2 + 1] = product;
    }
  const T* total = me.sum(2 * n * gates);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < gates; ++k) {
      const T mean = norm.kind == Kind::layer ? total[(i * gates + k) * 2] / norm.H : 0;
      const T product = total[(i * gates + k) * 2 + 1] / norm.H, r = norm.rstd[(sample + i) * norm.G + g0 + k];
      const T* y = norm.y + (sample + i) * C + (g0 + k) * norm.H + me.units.begin;
      T* __restrict d = g + i * ld + k * u;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) d[j] = r * (d[j] - mean - y[j] * product);
    }
}

// `g`, the gradient of the guarded values `q` of a step, becomes that of the pre-activations, in place.
template <typename T>
void norm_backward(const Norm<T>& norm, Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, const T* q,
                   int64_t q_ld, T* g, int64_t ld) {
  if (norm.kind == Kind::none) return;
  const int64_t u = me.units.size(), C = norm.G * norm.H;
  guard_backward(norm, me, g0, g1, sample, n, q, q_ld, g, ld);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < g1 - g0; ++k) {
      const int64_t channel = (g0 + k) * norm.H + me.units.begin;
      T* d = g + i * ld + k * u;
      affine_backward(norm, channel, u, norm.y + (sample + i) * C + channel, d);
      if (norm.kind == Kind::online && !norm.training) {
        const T* rstd = norm.rstd + (sample + i) * C + channel;
#pragma omp simd
        for (int64_t j = 0; j < u; ++j) d[j] *= rstd[j];
      }
    }
  if (norm.per_gate()) return moments_backward(norm, me, g0, g1, sample, n, g, ld);
  if (!norm.training) return;
  for (int64_t k = 0; k < g1 - g0; ++k)
    for (int64_t j = 0; j < u; j += block)
      stream_backward(norm, (g0 + k) * norm.H + me.units.begin + j, std::min(block, u - j), sample, n,
                      g + k * u + j, ld);
}

}  // namespace rnnorm
