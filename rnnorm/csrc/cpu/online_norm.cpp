#include "online_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "check.h"
#include "cores.h"
#include "lanes.h"
#include "norm.h"
#include "pool.h"
#include "team.h"

namespace rnnorm {
namespace {

using at::Tensor;

// Channels that are processed together if they are neighbours in memory, so that the values of a sample stay in the cache.
constexpr int64_t widest = 64;
// Channels that are not divided between threads: a cache line of float32.
constexpr int64_t line = 16;
// Samples for which the states of some channels stay in registers, where a sample is one value.
constexpr int64_t together = 64;
// Values for each additional thread: with fewer, starting it takes longer than it saves.
constexpr int64_t worthwhile = 16'384;
// Values that are added up one after another in their own precision; sums of these are of double precision, since the rounding of
// a long float32 sum of equal values adds up too.
constexpr int64_t terms = 128;
// Values of a block of samples that one thread processes before another takes over their channels.
constexpr int64_t block_values = 131'072;

// What one run over the samples does: normalize; go back; or, before these, sum what the guard `scale` needs of each sample.
enum class Pass { forward, backward, squares, products };

template <typename X, typename T>
struct Problem {
  int64_t N, C, D;
  bool channels_last;                         // neighbours in memory are channels; else the values of a sample
  const X *x, *grad;                          // [N, C, D] in this order of memory; grad: null in the forward pass
  X* out;                                     // the output or the gradient of x, or null
  const T *weight, *bias, *mean, *var;        // weight and bias: null without an affine map
  T *new_mean, *new_var;                      // null in the backward pass
  T *u, *v, *grad_weight, *grad_bias;         // null in the forward pass
  ConstantsOf<T> constants;
  T rest_fwd, rest_bwd, part;                 // part: 1 / D

  int64_t unit() const { return channels_last ? line : 1; }
  int64_t units() const { return (C + unit() - 1) / unit(); }
};

// The guard of one sample as a function of z, the output of the affine map.
template <Guard guard, typename T>
struct Guarded {
  T limit, factor = 1, pull = 0;  // guard `scale`: factor * z, and the gradient factor * g - pull * z

  // `V` is T, or lanes of it.
  template <typename V>
  RNNORM_INLINE V forward(V z) const {
    if constexpr (guard == Guard::none) return z;
    if constexpr (guard == Guard::scale) return factor * z;
    // Comparisons instead of min and max propagate NaN.
    const V most = V{} + limit, low = z < -most ? -most : z;
    return low > most ? most : low;
  }

  template <typename V>
  RNNORM_INLINE V backward(V g, V z) const {
    if constexpr (guard == Guard::scale) return factor * g - pull * z;
    if constexpr (guard == Guard::clamp) {
      const V most = V{} + limit;
      return (z >= -most) & (z <= most) ? g : V{};
    }
    return g;
  }
};

// A copy of the states of a range of channels, each in lines of its own: threads would share those of the tensors.
template <typename T>
class States {
 public:
  template <typename X>
  States(const Problem<X, T>& p, Range channels)
      : channels_(channels), stride_((channels.size() + line - 1) / line * line), values_(count * stride_) {
    reset(p);
  }

  template <typename X>
  void reset(const Problem<X, T>& p) const {
    const T* const from[count] = {p.mean, p.var, p.weight, p.bias, p.u, p.v, nullptr, nullptr};
    for (int k = 0; k < count; ++k) {
      T* const to = values_.data() + k * stride_;
      std::fill_n(to, stride_, T(k == weights ? 1 : 0));
      if (from[k] != nullptr) std::copy_n(from[k] + channels_.begin, channels_.size(), to);
    }
  }

  template <typename X>
  void store(const Problem<X, T>& p) const {
    T* const to[count] = {p.new_mean, p.new_var, nullptr, nullptr, p.u, p.v, p.grad_weight, p.grad_bias};
    for (int k = 0; k < count; ++k)
      if (to[k] != nullptr) std::copy_n(values_.data() + k * stride_, channels_.size(), to[k] + channels_.begin);
  }

 private:
  template <Pass, Guard, typename, typename>
  friend class Run;
  enum { means, vars, weights, biases, us, vs, grad_weights, grad_biases, count };

  T* at(int which, int64_t channel) const { return values_.data() + which * stride_ + channel - channels_.begin; }

  Range channels_;
  int64_t stride_;
  Array<T> values_;
};

// One run over samples of some channels. Per channel and sample, z = a * (x - mu) + b with a = weight * r, and
// y = r * (x - mu); the gradient of x is a * g + of_d * (x - mu) + shift, with g the gradient of z.
template <Pass pass, Guard guard, typename X, typename T>
class Run {
 public:
  // `squares` and `products` [N, units]: sums of z * z and of gradient times z.
  Run(const Problem<X, T>& p, const States<T>& states, Range channels, const std::vector<Guarded<guard, T>>& guards,
      std::vector<T>& squares, std::vector<T>& products)
      : p_(p), range_(channels), guards_(guards), squares_(squares), products_(products),
        own_{states.at(States<T>::means, channels.begin), states.at(States<T>::vars, channels.begin),
             states.at(States<T>::weights, channels.begin), states.at(States<T>::biases, channels.begin),
             states.at(States<T>::us, channels.begin), states.at(States<T>::vs, channels.begin),
             states.at(States<T>::grad_weights, channels.begin), states.at(States<T>::grad_biases, channels.begin)} {}

  void operator()(Range samples) {
    if (p_.D == 1) return single_values(samples);
    for (int64_t n = samples.begin; n < samples.end; ++n)
      if (p_.channels_last) tiles(n);
      else rows(n);
  }

 private:
  static constexpr bool back = pass == Pass::backward, multiplied = pass == Pass::products;
  static constexpr bool summed = pass == Pass::squares || multiplied, with_grad = back || multiplied;

  // Moves the states of channel `j` by the sums over the values of a sample: of d = x - mu, d * d, g and g * d.
  RNNORM_INLINE void move(int64_t j, T r, T a, T d, T dd, T g, T gd, T& of_d, T& shift) {
    const T mean_d = d * p_.part, mean_dd = dd * p_.part, variance = mean_dd - mean_d * mean_d;
    if constexpr (back) {
      own_.grad_weight[j] += r * gd;
      own_.grad_bias[j] += g;
      of_d = -p_.rest_bwd * own_.v[j] * r * r;
      shift = -p_.rest_bwd * own_.u[j];
      own_.u[j] += a * g * p_.part + of_d * mean_d + shift;
      move_control(own_.v[j], a * gd * p_.part, r * r * mean_dd, p_.rest_bwd, p_.constants.control_floor);
    }
    move_statistics(own_.mean[j], own_.var[j], mean_d, variance < 0 ? T(0) : variance, p_.constants.alpha_fwd, p_.rest_fwd);
  }

  Guarded<guard, T> guarded(int64_t n) const {
    return guards_.empty() ? Guarded<guard, T>{p_.constants.clamp_limit} : guards_[n];
  }

  // A channel's values are neighbours in memory.
  void rows(int64_t n) {
    const Guarded<guard, T> of_n = guarded(n);
    for (int64_t j = 0; j < range_.size(); ++j) {
      const int64_t place = (n * p_.C + range_.begin + j) * p_.D;
      const X* __restrict x = p_.x + place;
      const X* __restrict grad = with_grad ? p_.grad + place : x;
      const T mu = own_.mean[j], b = own_.bias[j], r = inverse_sqrt(own_.var[j] + p_.constants.eps), a = own_.weight[j] * r;
      double sum_d = 0, sum_dd = 0, sum_g = 0, sum_gd = 0, squares = 0, products = 0;
      constexpr int64_t block = terms * LanesOf<T>::count;
      for (int64_t begin = 0; begin < p_.D; begin += block) {
        const int64_t end = std::min(begin + block, p_.D);
        T d_part = 0, dd_part = 0, g_part = 0, gd_part = 0, squares_part = 0, products_part = 0;
#pragma omp simd reduction(+ : d_part, dd_part, g_part, gd_part, squares_part, products_part)
        for (int64_t i = begin; i < end; ++i) {
          const T d = static_cast<T>(x[i]) - mu, z = a * d + b, given = static_cast<T>(grad[i]);
          d_part += d;
          dd_part += d * d;
          if constexpr (back) {
            const T g = of_n.backward(given, z);
            g_part += g;
            gd_part += g * d;
          }
          if constexpr (summed) squares_part += z * z;
          if constexpr (multiplied) products_part += given * z;
        }
        sum_d += d_part, sum_dd += dd_part, sum_g += g_part, sum_gd += gd_part;
        squares += squares_part, products += products_part;
      }
      T of_d = 0, shift = 0;
      move(j, r, a, T(sum_d), T(sum_dd), T(sum_g), T(sum_gd), of_d, shift);
      if constexpr (summed) squares_[n * p_.C + range_.begin + j] = static_cast<T>(squares);
      if constexpr (multiplied) products_[n * p_.C + range_.begin + j] = static_cast<T>(products);
      if (summed || p_.out == nullptr) continue;
      X* __restrict out = p_.out + place;
#pragma omp simd
      for (int64_t i = 0; i < p_.D; ++i) {
        const T d = static_cast<T>(x[i]) - mu, z = a * d + b;
        if constexpr (back) out[i] = static_cast<X>(a * of_n.backward(static_cast<T>(grad[i]), z) + of_d * d + shift);
        else out[i] = static_cast<X>(of_n.forward(z));
      }
    }
  }

  // A sample of a channel is one value.
  void single_values(Range samples) {
    constexpr int64_t lanes = LanesOf<T>::count;
    for (int64_t n = samples.begin; n < samples.end; n += together)
      for (int64_t first = 0; first < range_.size(); first += lanes) {
        const Range some{n, std::min(n + together, samples.end)};
        if (range_.size() - first >= lanes) values_of_lanes<true>(some, first, lanes);
        else values_of_lanes<false>(some, first, range_.size() - first);
      }
  }

  template <bool whole>
  RNNORM_INLINE void values_of_lanes(Range samples, int64_t first, int64_t count) {
    using V = Lanes<T>;
    constexpr int64_t lanes = LanesOf<T>::count;
    const auto state = [&](const T* of) { return load<true, T>(of + first, lanes); };
    const auto keep = [&](V from, T* to) { store<true, T>(from, to + first, lanes); };
    V mean = state(own_.mean), var = state(own_.var), u = state(own_.u), v = state(own_.v);
    V grad_weight = state(own_.grad_weight), grad_bias = state(own_.grad_bias);
    const V weight = state(own_.weight), bias = state(own_.bias);
    for (int64_t n = samples.begin; n < samples.end; ++n) {
      const Guarded<guard, T> of_n = guarded(n);
      const int64_t place = n * p_.C + range_.begin + first;
      const V r = inverse_sqrt(var + p_.constants.eps), d = load<whole, T>(p_.x + place, count) - mean, y = r * d;
      const V z = weight * y + bias;
      V given{}, out{};
      // The processor foresees a few rows that are read side by side, not so many.
      __builtin_prefetch(p_.x + place + 2 * line);
      if constexpr (with_grad) __builtin_prefetch(p_.grad + place + 2 * line);
      if (!summed && p_.out != nullptr) __builtin_prefetch(p_.out + place + 2 * line, 1);
      if constexpr (with_grad) given = load<whole, T>(p_.grad + place, count);
      if constexpr (pass == Pass::forward) out = of_n.forward(z);
      if constexpr (back) {
        const V g = of_n.backward(given, z), of_y = weight * g;
        grad_weight += g * y;
        grad_bias += g;
        out = r * (of_y - p_.rest_bwd * v * y) - p_.rest_bwd * u;
        u += out;
        move_control(v, of_y * y, y * y, p_.rest_bwd, p_.constants.control_floor);
      }
      move_statistics(mean, var, d, V{}, p_.constants.alpha_fwd, p_.rest_fwd);
      if constexpr (summed) {
        T squares[lanes], products[lanes];
        store<true, T>(z * z, squares, lanes);
        store<true, T>(given * z, products, lanes);
        report(n, range_.begin + first, count, squares, products);
      } else if (p_.out != nullptr) {
        store<whole, T>(out, p_.out + place, count);
      }
    }
    keep(mean, own_.mean), keep(var, own_.var);
    if constexpr (back) keep(u, own_.u), keep(v, own_.v), keep(grad_weight, own_.grad_weight), keep(grad_bias, own_.grad_bias);
  }

  // Channels are neighbours in memory.
  void tiles(int64_t n) {
    const Guarded<guard, T> of_n = guarded(n);
    for (int64_t first = 0; first < range_.size(); first += widest) {
      const int64_t count = std::min(widest, range_.size() - first);
      const int64_t place = n * p_.D * p_.C + range_.begin + first;
      const T *__restrict bias = own_.bias + first, *__restrict weight = own_.weight + first;
      T mu[widest], r[widest], a[widest], of_d[widest], shift[widest];
      enum { ds, dds, gs, gds, zzs, gzs, sums };
      T part[sums][widest], total[sums][widest];
      double exact[sums][widest] = {};
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        mu[j] = own_.mean[first + j];
        r[j] = inverse_sqrt(own_.var[first + j] + p_.constants.eps);
        a[j] = weight[j] * r[j];
      }
      for (int64_t begin = 0; begin < p_.D; begin += terms) {
        for (T (&of)[widest] : part) std::fill_n(of, count, T(0));
        for (int64_t i = begin; i < std::min(begin + terms, p_.D); ++i) {
          const X* __restrict x = p_.x + place + i * p_.C;
          const X* __restrict grad = with_grad ? p_.grad + place + i * p_.C : x;
#pragma omp simd
          for (int64_t j = 0; j < count; ++j) {
            const T d = static_cast<T>(x[j]) - mu[j], z = a[j] * d + bias[j], given = static_cast<T>(grad[j]);
            part[ds][j] += d;
            part[dds][j] += d * d;
            if constexpr (back) {
              const T g = of_n.backward(given, z);
              part[gs][j] += g;
              part[gds][j] += g * d;
            }
            if constexpr (summed) part[zzs][j] += z * z;
            if constexpr (multiplied) part[gzs][j] += given * z;
          }
        }
        for (int k = 0; k < sums; ++k)
#pragma omp simd
          for (int64_t j = 0; j < count; ++j) exact[k][j] += part[k][j];
      }
      for (int k = 0; k < sums; ++k) std::copy_n(exact[k], count, total[k]);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j)
        move(first + j, r[j], a[j], total[ds][j], total[dds][j], total[gs][j], total[gds][j], of_d[j], shift[j]);
      if constexpr (summed) report(n, range_.begin + first, count, total[zzs], total[gzs]);
      if (summed || p_.out == nullptr) continue;
      for (int64_t i = 0; i < p_.D; ++i) {
        const X* __restrict x = p_.x + place + i * p_.C;
        const X* __restrict grad = with_grad ? p_.grad + place + i * p_.C : x;
        X* __restrict out = p_.out + place + i * p_.C;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          const T d = static_cast<T>(x[j]) - mu[j], z = a[j] * d + bias[j];
          if constexpr (back) out[j] = static_cast<X>(a[j] * of_n.backward(static_cast<T>(grad[j]), z) + of_d[j] * d + shift[j]);
          else out[j] = static_cast<X>(of_n.forward(z));
        }
      }
    }
  }

  // By lines of channels, in order, so that the sums do not depend on the number of threads.
  void report(int64_t n, int64_t channel, int64_t count, const T* squares, const T* products) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t place = n * p_.units() + (channel + j) / line;
      squares_[place] += squares[j];
      if (multiplied) products_[place] += products[j];
    }
  }

  const Problem<X, T>& p_;
  const Range range_;
  const std::vector<Guarded<guard, T>>& guards_;
  std::vector<T>&squares_, &products_;
  const struct {
    T *mean, *var, *weight, *bias, *u, *v, *grad_weight, *grad_bias;
  } own_;  // of these channels
};

// Who processes what. Where the values of a channel are neighbours in memory, each thread takes channels of its own. Where
// channels are, threads that write parts of the same rows would pull each other's cache lines to and fro, so each takes whole
// rows, block by block, and a group of channels goes on from where the thread before has left it.
struct Schedule {
  int64_t groups = 0, blocks = 0;  // 0: channels of its own

  template <typename X, typename T>
  Schedule(const Problem<X, T>& p, int threads) {
    if (threads == 1 || !p.channels_last || p.N < 4 * threads) return;
    groups = std::min<int64_t>(p.units(), 4 * threads);
    const int64_t rounds = (p.N * p.C * p.D + threads * block_values - 1) / (threads * block_values);
    blocks = std::min(rounds * threads, p.N);
  }
};

template <Pass pass, Guard guard, typename X, typename T>
void solve(const Problem<X, T>& p, int64_t threads) {
  const int64_t useful = std::min(1 + p.N * p.C * p.D / worthwhile, int64_t{available_threads()}), units = p.units();
  const int most = static_cast<int>(std::min(threads > 0 ? threads : useful, units));
  constexpr bool scaled = guard == Guard::scale;
  constexpr bool back = pass == Pass::backward;
  std::vector<T> squares(scaled ? p.N * units : 0), products(scaled && back ? p.N * units : 0);
  std::vector<Guarded<guard, T>> guards(scaled ? p.N : 0, Guarded<guard, T>{p.constants.clamp_limit});
  const auto channels = [&](int64_t index, int64_t count) {
    const Range part{units * index / count, units * (index + 1) / count};
    return Range{part.begin * p.unit(), std::min(part.end * p.unit(), p.C)};
  };
  const Schedule schedule(p, most);
  const States<T> shared(p, {0, schedule.groups > 0 ? p.C : 0});
  std::vector<std::atomic<int>> done_first(schedule.groups), done_last(schedule.groups);  // blocks, by group
  Team::run(most, [&](int id, Team& team) {
    const auto run = [&]<Pass which>(std::vector<std::atomic<int>>& done) {
      const auto of = [&](const States<T>& states, Range part) {
        return Run<which, guard, X, T>(p, states, part, guards, squares, products);
      };
      if (schedule.groups == 0) {
        const Range own = channels(id, team.size());
        const States<T> states(p, own);
        of(states, own)({0, p.N});
        if (which == pass) states.store(p);
      }
      for (int64_t block = id; block < schedule.blocks; block += team.size())
        for (int64_t group = 0; group < schedule.groups; ++group) {
          team.wait_for(done[group], static_cast<int>(block));
          of(shared, channels(group, schedule.groups))(part_of(p.N, static_cast<int>(block), static_cast<int>(schedule.blocks)));
          done[group].store(static_cast<int>(block + 1), std::memory_order_release);
        }
    };
    if constexpr (scaled) {
      run.template operator()<back ? Pass::products : Pass::squares>(done_first);
      team.wait();
      const Range samples = part_of(p.N, id, team.size());
      for (int64_t n = samples.begin; n < samples.end; ++n) {
        T square = 0, product = 0;
        for (int64_t k = 0; k < units; ++k) {
          square += squares[n * units + k];
          if (back) product += products[n * units + k];
        }
        const T values = static_cast<T>(p.C * p.D), factor = 1 / std::sqrt(square / values + p.constants.scale_eps);
        guards[n].factor = factor;
        guards[n].pull = factor * factor * factor * (product / values);
      }
      if (id == 0) shared.reset(p);
      team.wait();
    }
    run.template operator()<pass>(done_last);
  });
  if (schedule.groups > 0) shared.store(p);
}

template <Pass pass, typename X, typename T>
void choose_guard(const Problem<X, T>& p, Guard guard, int64_t threads) {
  switch (guard) {
#define RNNORM_CASE(name) \
  case Guard::name: return solve<pass, Guard::name>(p, threads);
    RNNORM_GUARDS(RNNORM_CASE)
#undef RNNORM_CASE
  }
}

Label label(const char* name) { return {"online_norm's", name}; }

// Call `function` with the types of values and statistics as template arguments.
template <typename Function>
void choose_types(at::ScalarType dtype, const Function& function) {
  switch (dtype) {
    case at::kDouble: return function.template operator()<double, double>();
    case at::kFloat: return function.template operator()<float, float>();
    case at::kBFloat16: return function.template operator()<c10::BFloat16, float>();
    case at::kHalf: return function.template operator()<c10::Half, float>();
    default: TORCH_CHECK(false, label("x"), " must be float64, float32, bfloat16 or float16; got ", dtype);
  }
}

// The arguments of both passes, checked.
struct Arguments {
  Tensor x;
  bool channels_last;
  at::ScalarType wide;
  Tensor weight, bias, mean, var;
  Guard guard;
  Constants constants;

  Arguments(const Tensor& given, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, const Tensor& mean,
            const Tensor& var, std::string_view guard, at::ArrayRef<double> values, int64_t threads)
      : x(given), wide(given.scalar_type() == at::kDouble ? at::kDouble : at::kFloat), mean(mean.contiguous()),
        var(var.contiguous()), guard(named<Guard>("guard", guard)) {
    check_memory(x, label("x"));
    TORCH_CHECK(at::isFloatingType(x.scalar_type()), label("x"), " must have a floating-point dtype; got ", x.scalar_type());
    TORCH_CHECK(x.dim() >= 2, label("x"), " must have shape [N, C, *]; got ", x.sizes());
    TORCH_CHECK(scale.has_value() == shift.has_value(), "rnnorm: online_norm's weight and bias must both be given, or neither");
    check_count(values.size(), names<Constants>.size(), "constants");
    std::memcpy(&constants, values.data(), sizeof(Constants));
    check_threads(threads);
    check_channels(this->mean, "mean");
    check_channels(this->var, "var");
    if (scale) check_channels(weight = scale->contiguous(), "weight");
    if (shift) check_channels(bias = shift->contiguous(), "bias");
    // Of one channel, or one value per channel, either order is the other; rows are faster, and made for many values.
    const auto neighbours = [&] { return x.movedim(1, -1).is_contiguous() && (x.size(1) > 1 || x.numel() == x.size(0)); };
    channels_last = neighbours();
    if (!channels_last) {
      x = x.contiguous();
      channels_last = neighbours();
    }
  }

  void check_channels(const Tensor& tensor, const char* name) const {
    check_memory(tensor, label(name));
    check_dtype(tensor, label(name), wide);
    check_shape(tensor, label(name), {x.size(1)});
  }

  template <typename X, typename T>
  Problem<X, T> problem() const {
    const auto data = [](const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr; };
    const int64_t N = x.size(0), C = x.size(1);
    Problem<X, T> p{};
    p.N = N, p.C = C, p.D = x.numel() / std::max<int64_t>(N * C, 1);
    p.part = static_cast<T>(1) / static_cast<T>(p.D);
    p.channels_last = channels_last;
    p.x = x.const_data_ptr<X>();
    p.weight = data(weight), p.bias = data(bias), p.mean = data(mean), p.var = data(var);
    p.constants = constants.to<T>();
    p.rest_fwd = static_cast<T>(1 - constants.alpha_fwd), p.rest_bwd = static_cast<T>(1 - constants.alpha_bwd);
    return p;
  }
};

}  // namespace

Three online_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& mean,
                  const Tensor& var, std::string_view guard, at::ArrayRef<double> constants, int64_t threads) {
  const Arguments given(x, weight, bias, mean, var, guard, constants, threads);
  Tensor out = at::empty_like(given.x), new_mean = at::empty_like(given.mean), new_var = at::empty_like(given.var);
  choose_types(x.scalar_type(), [&]<typename X, typename T>() {
    Problem<X, T> p = given.problem<X, T>();
    p.out = out.data_ptr<X>();
    p.new_mean = new_mean.data_ptr<T>(), p.new_var = new_var.data_ptr<T>();
    choose_guard<Pass::forward>(p, given.guard, threads);
    if (!all_finite(new_mean) || !all_finite(new_var)) new_mean.copy_(given.mean), new_var.copy_(given.var);
  });
  return {out, new_mean, new_var};
}

Three online_norm_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, Tensor u, Tensor v,
                           std::string_view guard, at::ArrayRef<double> constants, bool need_input, int64_t threads) {
  const Arguments given(x, weight, bias, mean, var, guard, constants, threads);
  check_memory(grad, label("gradient"));
  check_dtype(grad, label("gradient"), x.scalar_type());
  check_shape(grad, label("gradient"), x.sizes());
  given.check_channels(u, "u");
  given.check_channels(v, "v");
  const Tensor same = grad.strides() == given.x.strides() ? grad : at::empty_like(given.x).copy_(grad);
  const Tensor dx = need_input ? at::empty_like(given.x) : at::empty({0}, x.options());
  const auto of_channels = [&] { return at::empty({weight ? x.size(1) : 0}, given.mean.options()); };
  const Tensor grad_weight = of_channels(), grad_bias = of_channels();
  const Tensor new_u = u.clone(at::MemoryFormat::Contiguous), new_v = v.clone(at::MemoryFormat::Contiguous);
  choose_types(x.scalar_type(), [&]<typename X, typename T>() {
    Problem<X, T> p = given.problem<X, T>();
    p.grad = same.const_data_ptr<X>();
    p.out = need_input ? dx.data_ptr<X>() : nullptr;
    p.u = new_u.data_ptr<T>(), p.v = new_v.data_ptr<T>();
    if (weight) p.grad_weight = grad_weight.data_ptr<T>(), p.grad_bias = grad_bias.data_ptr<T>();
    choose_guard<Pass::backward>(p, given.guard, threads);
    if (!need_input || !all_finite(new_u) || !all_finite(new_v)) return;
    u.copy_(new_u);
    v.copy_(new_v);
  });
  return {dx, grad_weight, grad_bias};
}

}  // namespace rnnorm
