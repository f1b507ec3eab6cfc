// One step of a normalization for the units of one thread, forward and backward.
// Samples are processed one by one, in order; loops over channels, which are independent in online normalization, are vectorized.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "../names.h"
#include "math.h"
#include "team.h"

// Not inlined, so that all cells share one copy: otherwise sums over units would be vectorized, and rounded, differently in each.
#if defined(__clang__)
#define RNNORM_ONE_COPY __attribute__((noinline))
#else
#define RNNORM_ONE_COPY __attribute__((noinline, noclone))
#endif

namespace rnnorm {

// One sample moves the running statistics of a channel: `d` is its mean less the running mean, `w` its own variance. `V` is T,
// or lanes of it.
template <typename V, typename T>
RNNORM_INLINE void move_statistics(V& mean, V& var, V d, V w, T alpha, T rest) {
  var += rest * (alpha * d * d - (var - w));
  mean += rest * d;
}

// One sample moves the control state v of a channel: `gy` and `yy` are its means of gradient times y and of y times y.
template <typename V, typename T>
RNNORM_INLINE void move_control(V& v, V gy, V yy, T rest, T floor) {
  const V carry = 1 - rest * yy, least = V{} + floor;
  v = (carry < least ? least : carry) * v + gy;
}

// The offset of some units' values in `y` and, if each unit has one, in `rstd`: a block [S, G, units] for each thread, so that
// a thread accesses memory in order, without false sharing.
inline int64_t kept_place(int64_t S, int64_t G, const Range& units, int64_t sample, int64_t gate) {
  return G * (units.begin * S + sample * units.size()) + gate * units.size();
}

// Copy values from the blocks of `from` threads to those of `to` threads.
template <typename T>
void repartition(const T* old, T* values, int64_t S, int64_t G, int64_t H, int from, int to) {
  for (int a = 0; a < from; ++a)
    for (int b = 0; b < to; ++b) {
      const Range source = part_of(H, a, from), target = part_of(H, b, to);
      const int64_t begin = std::max(source.begin, target.begin), end = std::min(source.end, target.end);
      if (begin >= end) continue;
      for (int64_t s = 0; s < S; ++s)
        for (int64_t g = 0; g < G; ++g)
          std::copy_n(old + kept_place(S, G, source, s, g) + begin - source.begin, end - begin,
                      values + kept_place(S, G, target, s, g) + begin - target.begin);
    }
}

template <typename T>
struct Norm {
  Kind kind = Kind::none;
  Guard guard = Guard::none;
  bool training = false;
  ConstantsOf<T> constants{};
  T rest_fwd = 0, rest_bwd = 0;  // 1 - alpha, formed in double
  int64_t G = 0, H = 0, S = 0;
  const T *weight = nullptr, *bias = nullptr;                      // [C]; 1 and 0 without an affine map
  const T* frozen = nullptr;                                       // [C] 1 / sqrt(var + eps) in evaluation
  T *mean = nullptr, *var = nullptr, *u = nullptr, *v = nullptr;  // [C], updated in place; in a worker's copy [G, units]
  T *y = nullptr, *rstd = nullptr, *scale = nullptr;              // kept for the backward pass, or null; `scale` is [S, G]
  T *grad_weight = nullptr, *grad_bias = nullptr;                 // [C], accumulated; in a worker's copy [G, units]

  int64_t place(const Range& units, int64_t sample, int64_t gate) const { return kept_place(S, G, units, sample, gate); }
};

// A thread's copies [G, units] of its part of arrays [G * H] that change with every sample, written back at the end. Updating
// the arrays in place would cause false sharing at the boundaries between threads.
template <typename T>
class Own {
 public:
  Own(int64_t G, int64_t H, Range units) : G_(G), H_(H), units_(units) {}
  Own(const Own&) = delete;
  ~Own() {
    for (const auto& [array, copy, back] : copies_)
      for (int64_t g = 0; g < G_ && back; ++g)
        std::copy_n(copy.get() + line + g * units_.size(), units_.size(), array + g * H_ + units_.begin);
  }

  // Copy the thread's part of `array`, and make `array` point to the copy.
  void take(T*& array, bool back) {
    if (array == nullptr) return;
    std::unique_ptr<T[]> copy(new T[G_ * units_.size() + 2 * line]);
    for (int64_t g = 0; g < G_; ++g)
      std::copy_n(array + g * H_ + units_.begin, units_.size(), copy.get() + line + g * units_.size());
    T* const own = copy.get() + line;
    copies_.push_back({array, std::move(copy), back});
    array = own;
  }

  void take(Norm<T>& norm) {
    for (T** moved : {&norm.mean, &norm.var, &norm.u, &norm.v}) take(*moved, norm.training);
    for (T** sum : {&norm.grad_weight, &norm.grad_bias}) take(*sum, true);
  }

 private:
  static constexpr int64_t line = 16;
  struct Copy {
    T* array;
    std::unique_ptr<T[]> values;
    bool back;
  };
  int64_t G_, H_;
  Range units_;
  std::vector<Copy> copies_;
};

// The state of one thread: its units, its norms, and the exchange of partial sums with other threads.
template <typename T>
struct Worker {
  int id;
  Team& team;
  Exchange<T>& exchange;
  Range units;
  Norm<T> norm, cell_norm;
  std::vector<T> total;  // size: the number of values in one exchange
  std::vector<T> spare;  // two rows, written if nothing is kept
  Own<T> own, cell_own;
  int turn = 0;

  Worker(int id, Team& team, Exchange<T>& exchange, Range units, const Norm<T>& norm, const Norm<T>& cell_norm, int64_t values)
      : id(id), team(team), exchange(exchange), units(units), norm(norm), cell_norm(cell_norm), total(values),
        spare(2 * units.size()), own(norm.G, norm.H, units), cell_own(1, norm.H, units) {
    own.take(this->norm);
    cell_own.take(this->cell_norm);
  }

  T* partial() { return exchange.mine(id, turn); }
  // Wait until every thread has written `count` partial values; returns their sums over the threads, in a fixed order.
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

template <typename T>
inline void clamp_row(const Norm<T>& norm, int64_t count, T* __restrict q) {
  const T limit = norm.constants.clamp_limit;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    // Comparisons instead of min and max propagate NaN.
    const T low = q[j] < -limit ? -limit : q[j];
    q[j] = low > limit ? limit : low;
  }
}

// Add the biases `b` to one sample `x`, normalize it online and apply the affine map; returns the sum of squares of the result.
template <bool moves, typename T>
inline T online_row(const Norm<T>& norm, Worker<T>& me, int64_t gate, int64_t sample, T* __restrict x,
                    const T* __restrict b) {
  const int64_t count = me.units.size(), channel = gate * norm.H + me.units.begin, row = norm.place(me.units, sample, gate);
  const bool kept = norm.y != nullptr;
  T* __restrict y = kept ? norm.y + row : me.spare.data();
  T* __restrict rstd = kept ? norm.rstd + row : me.spare.data() + count;
  const T* __restrict w = norm.weight + channel;
  const T* __restrict shift = norm.bias + channel;
  T* __restrict mean = norm.mean + gate * count;
  T* __restrict var = norm.var + gate * count;
  const T eps = norm.constants.eps, alpha = norm.constants.alpha_fwd, rest = norm.rest_fwd;
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < count; ++j) {
    const T d = x[j] + b[j] - mean[j], r = moves ? 1 / std::sqrt(var[j] + eps) : norm.frozen[channel + j];
    const T normed = d * r, z = w[j] * normed + shift[j];
    y[j] = normed;
    rstd[j] = r;
    if (moves) {
      move_statistics(mean[j], var[j], d, T(0), alpha, rest);
    }
    squares += z * z;
    x[j] = z;
  }
  return squares;
}

// Layer and RMS normalization: moments over the H units of a gate, combined from each thread's mean and sum of squared
// deviations, which avoids cancellation.
template <bool centred, typename T>
void moments_forward(const Norm<T>& norm, Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, T* q, int64_t ld,
                     const T* bias) {
  const int64_t u = me.units.size(), gates = g1 - g0, cells = n * gates;
  T* mine = me.partial();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t g = 0; g < gates; ++g) {
      T* __restrict x = q + i * ld + g * u;
      const T* __restrict b = bias + g * u;
      T sum = 0, squares = 0;
      if constexpr (centred) {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < u; ++j) sum += x[j] += b[j];
      }
      const T own = u > 0 ? sum / u : 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t j = 0; j < u; ++j) {
        if constexpr (!centred) x[j] += b[j];
        squares += (x[j] - own) * (x[j] - own);
      }
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
    const T r = 1 / std::sqrt(squares / norm.H + norm.constants.eps);
    const int64_t i = k / gates, g = k % gates, channel = (g0 + g) * norm.H + me.units.begin;
    if (norm.y != nullptr && me.id == 0) norm.rstd[(sample + i) * norm.G + g0 + g] = r;
    T* __restrict x = q + i * ld + g * u;
    T* __restrict y = norm.y != nullptr ? norm.y + norm.place(me.units, sample + i, g0 + g) : me.spare.data();
    const T *__restrict w = norm.weight + channel, *__restrict b = norm.bias + channel;
#pragma omp simd
    for (int64_t j = 0; j < u; ++j) {
      y[j] = (x[j] - mean) * r;
      x[j] = w[j] * y[j] + b[j];
    }
  }
  ++me.turn;
}

// Without a norm: add the biases, and keep the pre-activations for the backward pass.
template <typename T>
void plain_forward(const Norm<T>& norm, const Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, T* q, int64_t ld,
                   const T* bias) {
  const int64_t u = me.units.size();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t g = 0; g < g1 - g0; ++g) {
      T* __restrict x = q + i * ld + g * u;
      const T* __restrict b = bias + g * u;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) x[j] += b[j];
      if (norm.y != nullptr) std::copy_n(x, u, norm.y + norm.place(me.units, sample + i, g0 + g));
    }
}

template <typename T>
void online_forward(const Norm<T>& norm, Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, T* q, int64_t ld,
                    const T* bias) {
  const int64_t u = me.units.size(), gates = g1 - g0;
  const auto row = norm.training ? &online_row<true, T> : &online_row<false, T>;
  T* squares = norm.guard == Guard::scale ? me.partial() : nullptr;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t g = 0; g < gates; ++g) {
      T* x = q + i * ld + g * u;
      const T sum = row(norm, me, g0 + g, sample + i, x, bias + g * u);
      if (squares != nullptr) squares[i * gates + g] = sum;
      if (norm.guard == Guard::clamp) clamp_row(norm, u, x);
    }
  if (squares == nullptr) return;
  const T* total = me.sum(n * gates);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t g = 0; g < gates; ++g) {
      const T factor = 1 / std::sqrt(total[i * gates + g] / norm.H + norm.constants.scale_eps);
      if (norm.scale != nullptr && me.id == 0) norm.scale[(sample + i) * norm.G + g0 + g] = factor;
      T* x = q + i * ld + g * u;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) x[j] *= factor;
    }
}

// Add the biases [gates * units] to the pre-activations `q` [n, gates * units] (row stride `ld`) of gates g0..g1 of a step and
// normalize them, in place.
template <Kind kind, typename T>
RNNORM_ONE_COPY void norm_forward(const Norm<T>& norm, Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, T* q, int64_t ld,
                  const T* bias) {
  if constexpr (kind == Kind::none) plain_forward(norm, me, g0, g1, sample, n, q, ld, bias);
  else if constexpr (kind == Kind::online) online_forward(norm, me, g0, g1, sample, n, q, ld, bias);
  else moments_forward<kind == Kind::layer>(norm, me, g0, g1, sample, n, q, ld, bias);
}

// Recompute the guarded values `q` [gates * units] of one sample from the kept values.
template <Kind kind, typename T>
void norm_recompute(const Norm<T>& norm, const Worker<T>& me, int64_t sample, T* q) {
  const int64_t u = me.units.size();
  for (int64_t g = 0; g < norm.G; ++g) {
    const int64_t channel = g * norm.H + me.units.begin;
    const T* __restrict y = norm.y + norm.place(me.units, sample, g);
    T* __restrict x = q + g * u;
    if constexpr (kind == Kind::none) {
      std::copy_n(y, u, x);
      continue;
    }
    const T* __restrict w = norm.weight + channel;
    const T* __restrict b = norm.bias + channel;
    const T factor = norm.guard == Guard::scale ? norm.scale[sample * norm.G + g] : T(1);
#pragma omp simd
    for (int64_t j = 0; j < u; ++j) x[j] = factor * (w[j] * y[j] + b[j]);
    if (norm.guard == Guard::clamp) clamp_row(norm, u, x);
  }
}

// The gradients of a step, by row (stride `ld`) and gate (stride `gate`).
template <typename T>
struct Gradients {
  T* data = nullptr;
  int64_t ld = 0, gate = 0;

  T* at(int64_t row, int64_t g) const { return data + row * ld + g * gate; }
};

// For one sample and gate, go back through the guard `scale` (`mean` is that of gradient times guarded value `a`), the affine
// map and, by the control process, online normalization.
template <bool scaled, typename T>
inline void online_row_backward(const Norm<T>& norm, const Worker<T>& me, int64_t gate, int64_t sample,
                                const T* __restrict a, T* __restrict d, T mean) {
  const int64_t count = me.units.size(), channel = gate * norm.H + me.units.begin;
  const int64_t row = norm.place(me.units, sample, gate);
  const T* __restrict y = norm.y + row;
  const T* __restrict rstd = norm.rstd + row;
  const T* __restrict w = norm.weight + channel;
  T* __restrict u = norm.u + gate * count;
  T* __restrict v = norm.v + gate * count;
  T* __restrict grad_weight = norm.grad_weight + gate * count;
  T* __restrict grad_bias = norm.grad_bias + gate * count;
  const T rest = norm.rest_bwd, floor = norm.constants.control_floor;
  const T factor = scaled ? norm.scale[sample * norm.G + gate] : T(1);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const T z = scaled ? factor * (d[j] - a[j] * mean) : d[j];
    grad_weight[j] += z * y[j];
    grad_bias[j] += z;
    const T g = w[j] * z, e = g - rest * v[j] * y[j];
    move_control(v[j], g * y[j], y[j] * y[j], rest, floor);
    const T dx = e * rstd[j] - rest * u[j];
    u[j] += dx;
    d[j] = dx;
  }
}

// Go back through the affine map of one row: accumulates the gradients of weight and bias; `g` becomes the gradient of y.
// Returns the sums of the latter, and of it times y.
template <typename T>
inline std::pair<T, T> affine_backward(const Norm<T>& norm, const Worker<T>& me, int64_t gate, const T* __restrict y,
                                       T* __restrict g) {
  const int64_t u = me.units.size();
  const T* __restrict w = norm.weight + gate * norm.H + me.units.begin;
  T *__restrict gw = norm.grad_weight + gate * u, *__restrict gb = norm.grad_bias + gate * u;
  T sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t j = 0; j < u; ++j) {
    const T scaled = g[j] * w[j];
    gw[j] += g[j] * y[j];
    gb[j] += g[j];
    g[j] = scaled;
    sum += scaled;
    product += scaled * y[j];
  }
  return {sum, product};
}

// Go back through the guard `clamp` of all rows: `g` becomes the gradient of the affine map's output.
template <typename T>
void clamp_backward(const Norm<T>& norm, const Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, Gradients<T> g) {
  const int64_t u = me.units.size();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < g1 - g0; ++k) {
      const int64_t channel = (g0 + k) * norm.H + me.units.begin;
      const T* y = norm.y + norm.place(me.units, sample + i, g0 + k);
      T* d = g.at(i, k);
      for (int64_t j = 0; j < u; ++j) {
        const T z = norm.weight[channel + j] * y[j] + norm.bias[channel + j];
        d[j] = std::fabs(z) <= norm.constants.clamp_limit ? d[j] : 0;
      }
    }
}

// For the guard `scale`: for each row and gate, the sum over all units of gradient times guarded value.
template <typename T>
const T* scale_sums(Worker<T>& me, int64_t gates, int64_t n, const T* q, int64_t q_ld, Gradients<T> g) {
  const int64_t u = me.units.size();
  T* mine = me.partial();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < gates; ++k) {
      const T *a = q + i * q_ld + k * u, *d = g.at(i, k);
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < u; ++j) sum += a[j] * d[j];
      mine[i * gates + k] = sum;
    }
  return me.sum(n * gates);
}

// Go back through the guard `scale` of all rows, as with clamp; `q` are the guarded values.
template <typename T>
void scale_backward(const Norm<T>& norm, const Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, const T* q,
                    int64_t q_ld, Gradients<T> g, const T* sums) {
  const int64_t u = me.units.size(), gates = g1 - g0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < gates; ++k) {
      const T mean = sums[i * gates + k] / norm.H, factor = norm.scale[(sample + i) * norm.G + g0 + k];
      const T* a = q + i * q_ld + k * u;
      T* __restrict d = g.at(i, k);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) d[j] = factor * (d[j] - a[j] * mean);
    }
}

// Go back through the affine map and layer or RMS normalization.
template <bool centred, typename T>
void moments_backward(const Norm<T>& norm, Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, Gradients<T> g) {
  const int64_t u = me.units.size(), gates = g1 - g0;
  T* mine = me.partial();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < gates; ++k) {
      const T* y = norm.y + norm.place(me.units, sample + i, g0 + k);
      std::tie(mine[(i * gates + k) * 2], mine[(i * gates + k) * 2 + 1]) = affine_backward(norm, me, g0 + k, y, g.at(i, k));
    }
  const T* total = me.sum(2 * n * gates);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < gates; ++k) {
      const T mean = centred ? total[(i * gates + k) * 2] / norm.H : 0;
      const T product = total[(i * gates + k) * 2 + 1] / norm.H, r = norm.rstd[(sample + i) * norm.G + g0 + k];
      const T* y = norm.y + norm.place(me.units, sample + i, g0 + k);
      T* __restrict d = g.at(i, k);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) d[j] = r * (d[j] - mean - y[j] * product);
    }
}

template <typename T>
void online_backward(const Norm<T>& norm, Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, const T* q,
                     int64_t q_ld, Gradients<T> g) {
  const int64_t u = me.units.size(), gates = g1 - g0;
  const bool scaled = norm.guard == Guard::scale;
  if (norm.guard == Guard::clamp) clamp_backward(norm, me, g0, g1, sample, n, g);
  const T* sums = scaled ? scale_sums(me, gates, n, q, q_ld, g) : nullptr;
  if (norm.training) {
    const auto row = scaled ? &online_row_backward<true, T> : &online_row_backward<false, T>;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < gates; ++k)
        row(norm, me, g0 + k, sample + i, q + i * q_ld + k * u, g.at(i, k), scaled ? sums[i * gates + k] / norm.H : T(0));
    return;
  }
  if (scaled) scale_backward(norm, me, g0, g1, sample, n, q, q_ld, g, sums);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < gates; ++k) {
      T* d = g.at(i, k);
      const int64_t row = norm.place(me.units, sample + i, g0 + k);
      affine_backward(norm, me, g0 + k, norm.y + row, d);
      const T* rstd = norm.rstd + row;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) d[j] *= rstd[j];
    }
}

// Convert `g`, the gradient of a step's guarded values `q`, to that of its pre-activations, in place.
template <Kind kind, typename T>
RNNORM_ONE_COPY void norm_backward(const Norm<T>& norm, Worker<T>& me, int g0, int g1, int64_t sample, int64_t n, const T* q,
                   int64_t q_ld, Gradients<T> g) {
  if constexpr (kind == Kind::online) {
    online_backward(norm, me, g0, g1, sample, n, q, q_ld, g);
  } else if constexpr (kind != Kind::none) {
    moments_backward<kind == Kind::layer>(norm, me, g0, g1, sample, n, g);
  }
}

}  // namespace rnnorm
