// A recurrent layer and direction over a whole sequence on the CPU: rnnorm_cpu::forward and rnnorm_cpu::backward.
//
// One parallel region lives for the whole time loop. Each thread owns a range of hidden units with all their gates, so
// streams, norms and gates are local to it; threads meet once per step, when the new h is complete, and once more where a
// norm reduces over the units of a gate. The recurrent product runs on weights packed once per call, by the micro-kernel
// of gemm.h. Nothing is allocated or dispatched inside a step.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>


#include "../names.h"
#include "check.h"
#include "gemm.h"
#include "math.h"
#include "norm.h"
#include "pool.h"
#include "team.h"
#include "walk.h"

namespace rnnorm {
namespace {

using at::Tensor;
using Operands = c10::List<std::optional<Tensor>>;

struct Options {
  Cell cell;
  Kind kind;
  Guard guard;
  Constants constants;
  bool cell_norm, training, reverse, save, micro;
  int64_t threads;  // 0: as many as are useful

  bool lstm() const { return cell == Cell::lstm; }
};

// One tensor for each member of an enum; those that are not there are undefined.
template <typename Enum>
class Table {
 public:
  Tensor& operator[](Enum which) { return tensors_[index(which)]; }
  const Tensor& operator[](Enum which) const { return tensors_[index(which)]; }
  std::vector<Tensor> list() const { return {tensors_.begin(), tensors_.end()}; }

 private:
  std::array<Tensor, names<Enum>.size()> tensors_;
};

template <typename T>
inline constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;

template <typename T>
T* pointer(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.data_ptr<T>() : nullptr;
}

// As a kernel reads it: of the dtype that is computed in, and contiguous.
template <typename T>
Tensor ready(const Tensor& tensor, Label label) {
  check_memory(tensor, label);
  TORCH_CHECK(tensor.is_floating_point(), label, " must be of floating point; got dtype ", tensor.scalar_type());
  return tensor.to(dtype<T>).contiguous();
}

// The operands of one call and their sizes.
template <typename T>
struct Given {
  Options options;
  Table<Operand> tensors;
  int64_t sequence, N, I, P, G, H, C;

  Given(const Operands& operands, const Options& options) : options(options), G(gates_of(options.cell)) {
    for (size_t k = 0; k < operands.size(); ++k) {
      const Operand which = static_cast<Operand>(k);
      const std::optional<Tensor> operand = operands.get(k);
      if (!operand) continue;
      const Label label{"operand", name_of(which)};
      if (which != Operand::lengths) {
        tensors[which] = ready<T>(*operand, label);
        continue;
      }
      check_memory(*operand, label);
      check_dtype(*operand, label, at::kLong);
      tensors[which] = operand->contiguous();
    }
    needed({Operand::x, Operand::h, Operand::weight_ih, Operand::weight_hh});
    const Tensor &x = tensors[Operand::x], &h = tensors[Operand::h], &weight = tensors[Operand::weight_ih];
    TORCH_CHECK(x.dim() == 3 && x.size(0) > 0, "rnnorm: operand x must have shape [T, N, I], T > 0; got ", x.sizes());
    TORCH_CHECK(h.dim() == 2 && h.size(1) > 0, "rnnorm: operand h must have shape [N, P], P > 0; got ", h.sizes());
    TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(0) % G == 0,
                "rnnorm: operand weight_ih must have shape [", G, "*H, I], H > 0; got ", weight.sizes());
    sequence = x.size(0);
    N = x.size(1);
    I = x.size(2);
    P = h.size(1);
    C = weight.size(0);
    H = C / G;
    for (size_t k = 0; k < names<Operand>.size(); ++k) {
      const Operand which = static_cast<Operand>(k);
      if (tensors[which].defined()) check_shape(tensors[which], {"operand", name_of(which)}, shape(which));
    }
    TORCH_CHECK(H == P || tensors[Operand::weight_hr].defined(), "rnnorm: h must have H = ", H,
                " columns without weight_hr; got ", P);
    check_together();
  }

  at::DimVector shape(Operand which) const {
    switch (which) {
      case Operand::x: return {sequence, N, I};
      case Operand::h: return {N, P};
      case Operand::c: return {N, H};
      case Operand::weight_ih: return {C, I};
      case Operand::weight_hh: return {C, P};
      case Operand::weight_hr: return {P, H};
      case Operand::lengths: return {N};
      case Operand::cell_norm_scale: case Operand::cell_norm_shift: case Operand::cell_norm_mean:
      case Operand::cell_norm_var: case Operand::cell_norm_u: case Operand::cell_norm_v: return {H};
      default: return {C};
    }
  }

  void needed(std::initializer_list<Operand> all) const {
    for (Operand which : all)
      TORCH_CHECK(tensors[which].defined(), "rnnorm: operand ", name_of(which), " is missing");
  }

  void together(Operand one, Operand other) const {
    TORCH_CHECK(tensors[one].defined() == tensors[other].defined(), "rnnorm: operands ", name_of(one), " and ",
                name_of(other), " go together, but one of them is missing");
  }

  void check_together() const {
    together(Operand::bias_ih, Operand::bias_hh);
    together(Operand::norm_scale, Operand::norm_shift);
    together(Operand::cell_norm_scale, Operand::cell_norm_shift);
    if (options.lstm()) needed({Operand::c});
    for (Operand which : {Operand::c, Operand::weight_hr})
      TORCH_CHECK(options.lstm() || !tensors[which].defined(), "rnnorm: operand ", name_of(which),
                  " is an LSTM's alone; leave it out");
    if (options.kind != Kind::online) return;
    needed({Operand::norm_mean, Operand::norm_var});
    if (options.training) needed({Operand::norm_u, Operand::norm_v});
    if (!options.cell_norm) return;
    needed({Operand::cell_norm_mean, Operand::cell_norm_var});
    if (options.training) needed({Operand::cell_norm_u, Operand::cell_norm_v});
  }

  T* get(Operand which) const { return pointer<T>(tensors[which]); }
  const int64_t* lengths() const { return pointer<int64_t>(tensors[Operand::lengths]); }

  // What is kept for the backward; empty where it does not apply.
  at::DimVector shape(Kept which) const {
    const int64_t S = sequence * N;  // not only the real samples: shapes do not depend on the values of lengths
    const bool normed = options.kind != Kind::none, scaled = options.guard == Guard::scale;
    const bool online = options.kind == Kind::online, cell = options.cell_norm;
    const auto rows = [S](bool applies, int64_t width) { return applies ? at::DimVector{S, width} : at::DimVector{0}; };
    switch (which) {
      case Kept::hidden: return rows(true, P);
      case Kept::cell_state: return rows(options.lstm(), H);
      case Kept::new_part: return rows(options.cell == Cell::gru, H);
      case Kept::y: return rows(true, C);
      case Kept::rstd: return rows(normed, online ? C : G);
      case Kept::scale: return rows(scaled, G);
      case Kept::cell_y: return rows(cell, H);
      case Kept::cell_rstd: return rows(cell, online ? H : 1);
      case Kept::cell_scale: return rows(cell && scaled, 1);
      case Kept::partition: return {1};  // the number of threads whose blocks y, rstd and the cell's are made of
    }
    return {};
  }
};

// Also what is the same for a forward and its backward.
template <typename T>
struct Call : Given<T> {
  using Given<T>::options, Given<T>::tensors, Given<T>::I, Given<T>::P, Given<T>::G, Given<T>::H, Given<T>::C, Given<T>::get;

  Walk walk;
  Tensor samples;  // [S, I]
  std::vector<T> unit, zero;  // [C] in place of an affine map or of biases that are not there

  Call(const Operands& operands, const Options& options)
      : Given<T>(operands, options), walk(this->sequence, this->N, this->lengths(), options.reverse), unit(C, T(1)),
        zero(C, T(0)) {
    samples = tensors[Operand::x];
    if (!walk.dense) {
      samples = scratch({walk.S, I});
      gather(get(Operand::x), I, walk.position, samples.data_ptr<T>());
    }
  }

  Tensor empty(at::IntArrayRef shape) const { return at::empty(shape, dtype<T>); }
  Tensor zeros(at::IntArrayRef shape) const { return at::zeros(shape, dtype<T>); }
  Tensor scratch(at::IntArrayRef shape) const { return pooled(shape, dtype<T>); }

  static void gather(const T* rows, int64_t width, const std::vector<int64_t>& index, T* out) {
    for (size_t s = 0; s < index.size(); ++s) std::copy_n(rows + index[s] * width, width, out + s * width);
  }

  // A thread more pays for its barriers where it takes over some microseconds of each step, and has a vector of units.
  int threads() const {
    constexpr int64_t worthwhile = 500'000;  // multiplications of a step
    if (options.threads > 0) return static_cast<int>(std::min(options.threads, H));
    // With few rows it is the weights' way from the cache that takes the time, as much as four rows do.
    const int64_t useful = std::min(H / 16, 1 + std::max<int64_t>(walk.N, 4) * P * C / worthwhile);
    return static_cast<int>(std::clamp<int64_t>(useful, 1, at::get_num_threads()));
  }

  // `h` or `c` [*, width] of sample s before its step.
  const T* before(const T* initial, const T* history, int64_t width, int64_t s) const {
    const int64_t previous = walk.before[s];
    return previous < 0 ? initial + walk.row[s] * width : history + previous * width;
  }

  Norm<T> norm(bool of_cell, const Table<Kept>& kept) const {
    const Constants& constants = options.constants;
    Norm<T> norm;
    norm.kind = of_cell && !options.cell_norm ? Kind::none : options.kind;
    norm.guard = norm.kind == Kind::none ? Guard::none : options.guard;
    norm.training = options.training;
    norm.eps = constants.eps;
    norm.alpha_fwd = constants.alpha_fwd;
    norm.rest_fwd = 1 - constants.alpha_fwd;
    norm.rest_bwd = 1 - constants.alpha_bwd;
    norm.scale_eps = constants.scale_eps;
    norm.limit = constants.clamp_limit;
    norm.control_floor = constants.control_floor;
    norm.G = of_cell ? 1 : G;
    norm.H = H;
    norm.S = walk.S;
    const T *weight = get(of_cell ? Operand::cell_norm_scale : Operand::norm_scale), *bias = get(of_cell ? Operand::cell_norm_shift : Operand::norm_shift);
    norm.weight = weight != nullptr ? weight : unit.data();
    norm.bias = bias != nullptr ? bias : zero.data();
    norm.u = get(of_cell ? Operand::cell_norm_u : Operand::norm_u);
    norm.v = get(of_cell ? Operand::cell_norm_v : Operand::norm_v);
    if (norm.kind != Kind::none || !of_cell) {
      norm.y = pointer<T>(kept[of_cell ? Kept::cell_y : Kept::y]);
      norm.rstd = pointer<T>(kept[of_cell ? Kept::cell_rstd : Kept::rstd]);
      norm.scale = pointer<T>(kept[of_cell ? Kept::cell_scale : Kept::scale]);
    }
    return norm;
  }

  // Made for a backward.
  Table<Kept> kept() const {
    Table<Kept> kept;
    for (size_t k = 0; k < names<Kept>.size() && options.save; ++k) {
      const Kept which = static_cast<Kept>(k);
      kept[which] = scratch(this->shape(which));
    }
    if (options.save) *kept[Kept::partition].template data_ptr<T>() = 1;
    return kept;
  }

  // Handed back by the backward.
  Table<Kept> kept(const std::vector<Tensor>& saved) const {
    check_count(saved.size(), names<Kept>.size(), "kept tensors");
    Table<Kept> kept;
    for (size_t k = 0; k < names<Kept>.size(); ++k) {
      const Kept which = static_cast<Kept>(k);
      const Label label{"kept tensor", name_of(which)};
      check_memory(saved[k], label);
      check_dtype(saved[k], label, dtype<T>);
      check_shape(saved[k], label, this->shape(which));
      check_contiguous(saved[k], label);
      kept[which] = saved[k];
    }
    const T threads = *kept[Kept::partition].template data_ptr<T>();
    TORCH_CHECK(threads >= 1 && threads <= H && threads == std::floor(threads),
                "rnnorm: kept tensor partition must be a number of threads in 1..", H, "; got ", threads);
    return kept;
  }
};

template <typename T>
struct Forward {
  Call<T> call;
  Gemm<T> gemm;
  Table<Kept> kept;
  Norm<T> norm, cell_norm;
  Tensor y;                              // [T, N, P]
  Tensor hidden, cell_state, projected;  // [S, P], [S, H], [S, H] before projection
  std::vector<T> frozen, cell_frozen;
  std::vector<Tensor> statistics;        // mean, var, cell mean, cell var: copies that move

  Forward(const Operands& operands, const Options& options)
      : call(operands, options), gemm{options.micro}, kept(call.kept()),
        norm(call.norm(false, kept)), cell_norm(call.norm(true, kept)) {
    const int64_t S = call.walk.S;
    const at::DimVector shape{call.walk.T, call.walk.N, call.P};
    y = call.walk.dense ? call.empty(shape) : call.zeros(shape);
    hidden = options.save ? kept[Kept::hidden] : call.walk.dense ? y : call.scratch({S, call.P});
    cell_state = options.save ? kept[Kept::cell_state] : call.scratch({options.lstm() ? S : 0, call.H});
    if (call.get(Operand::weight_hr) != nullptr) projected = call.scratch({S, call.H});
    for (Operand which : {Operand::norm_mean, Operand::norm_var, Operand::cell_norm_mean, Operand::cell_norm_var}) {
      const Tensor& statistic = call.tensors[which];
      statistics.push_back(statistic.defined() && call.options.training ? statistic.clone() : statistic);
    }
    norm.mean = pointer<T>(statistics[0]);
    norm.var = pointer<T>(statistics[1]);
    cell_norm.mean = pointer<T>(statistics[2]);
    cell_norm.var = pointer<T>(statistics[3]);
    freeze(norm, call.C, frozen);
    freeze(cell_norm, call.H, cell_frozen);
  }

  static void freeze(Norm<T>& norm, int64_t channels, std::vector<T>& frozen) {
    if (norm.kind != Kind::online || norm.training) return;
    for (int64_t c = 0; c < channels; ++c) frozen.push_back(1 / std::sqrt(norm.var[c] + norm.eps));
    norm.frozen = frozen.data();
  }

  std::vector<Tensor> run() {
    const int threads = call.threads();
    Exchange<T> exchange(threads, 2 * call.walk.N * call.G);
    if (call.walk.S > 0) Team::run(threads, [&](int id, Team& team) { work(id, team, exchange); });
    return results();
  }

  void work(int id, Team& team, Exchange<T>& exchange) {
    const Walk& walk = call.walk;
    const int64_t H = call.H, P = call.P, G = call.G, N = walk.N;
    const Range units = part_of(H, id, team.size()), outputs = part_of(P, id, team.size());
    if (id == 0 && call.options.save) *kept[Kept::partition].template data_ptr<T>() = static_cast<T>(team.size());
    const int64_t u = units.size(), W = G * u;
    const bool gru = call.options.cell == Cell::gru;
    Worker<T> me(id, team, exchange, units, norm, cell_norm, 2 * N * G);

    InputPart input(*this, units);
    // The GRU's recurrent part of n meets its reset gate before it meets the input part.
    const int64_t joined = gru ? 2 * u : W;
    Panels<T> recurrent(P, joined), fresh(P, gru ? u : 0), projection(H, projected.defined() ? outputs.size() : 0);
    const T* weight = call.get(Operand::weight_hh);
    for (int64_t g = 0; g < G; ++g) {
      Panels<T>& panels = gru && g == 2 ? fresh : recurrent;
      panels.pack_rows(gru && g == 2 ? 0 : g * u, u, weight + (g * H + units.begin) * P, P);
    }
    if (projected.defined())
      projection.pack_rows(0, outputs.size(), call.get(Operand::weight_hr) + outputs.begin * H, H);

    std::vector<T> gathered(walk.dense ? 0 : N * P), new_part(gru ? N * u : 0), c(N * u);
    T* h = hidden.data_ptr<T>();
    for (size_t k = 0; k < walk.steps.size(); ++k) {
      const Step& step = walk.steps[k];
      if (step.count == 0) continue;
      const T* h_before = state_before(step, gathered);
      T* pre = input.of(step);
      recurrent.multiply(gemm, step.count, h_before, P, pre, W, true);
      if (gru) {
        fresh.multiply(gemm, step.count, h_before, P, new_part.data(), u, false);
        gru_step(me, step, pre, input.bias(), new_part.data(), h_before, h);
      } else if (call.options.cell == Cell::lstm) {
        T* out = projected.defined() ? projected.data_ptr<T>() : h;
        if (norm.kind == Kind::none) plain_lstm_step(me, step, pre, input.bias(), out);
        else lstm_step(me, step, pre, input.bias(), c.data(), out);
      } else {
        rnn_step(me, step, pre, input.bias(), h);
      }
      team.wait();
      if (projected.defined()) {
        projection.multiply(gemm, step.count, projected.data_ptr<T>() + step.first * H, H,
                            h + step.first * P + outputs.begin, P, false);
        team.wait();
      }
      publish(step, outputs);
    }
    gemm.release();
  }

  // What is returned is the caller's to change: it shares no memory with what is kept.
  void publish(const Step& step, Range columns) {
    const T* from = hidden.data_ptr<T>() + columns.begin;
    T* to = y.data_ptr<T>() + columns.begin;
    if (from == to) return;
    for (int64_t s = step.first; s < step.first + step.count; ++s)
      std::copy_n(from + s * call.P, columns.size(), to + call.walk.position[s] * call.P);
  }

  // The input part of this thread's units, computed for many samples at a time: enough for a good product,
  // few enough to stay in the cache until their step comes.
  class InputPart {
   public:
    InputPart(const Forward& forward, Range units)
        : forward_(forward), W_(forward.call.G * units.size()), panels_(forward.call.I, W_), bias_(W_),
          capacity_(std::min(std::max<int64_t>(256, forward.call.walk.N), forward.call.walk.S)), part_(capacity_ * W_) {
      const Call<T>& call = forward.call;
      const T *b = call.get(Operand::bias_ih), *b_hidden = call.get(Operand::bias_hh);
      const int64_t u = units.size();
      for (int64_t g = 0; g < call.G; ++g) {
        const int64_t channel = g * call.H + units.begin;
        panels_.pack_rows(g * u, u, call.get(Operand::weight_ih) + channel * call.I, call.I);
        // The GRU's recurrent bias of n stays with its recurrent part.
        const bool apart = call.options.cell == Cell::gru && g == 2;
        for (int64_t j = 0; j < u && b != nullptr; ++j)
          bias_[g * u + j] = b[channel + j] + (apart ? T(0) : b_hidden[channel + j]);
      }
    }

    // [count, W] of a step's samples, free to be overwritten.
    T* of(const Step& step) {
      if (step.first < first_ || step.first + step.count > end_) {
        const int64_t S = forward_.call.walk.S, I = forward_.call.I;
        // In a reverse direction, the samples that come next lie before this step.
        first_ = forward_.call.options.reverse ? std::max<int64_t>(0, step.first + step.count - capacity_) : step.first;
        end_ = std::min(first_ + capacity_, S);
        panels_.multiply(forward_.gemm, end_ - first_, forward_.call.samples.template data_ptr<T>() + first_ * I, I,
                         part_.data(), W_, false);
      }
      return part_.data() + (step.first - first_) * W_;
    }

    // [W], added where the products have met.
    const T* bias() const { return bias_.data(); }

   private:
    const Forward& forward_;
    int64_t W_;
    Panels<T> panels_;
    std::vector<T> bias_;
    int64_t capacity_, first_ = 0, end_ = 0;
    Array<T> part_;
  };

  // h of the step's rows before it, [count, P] contiguous.
  const T* state_before(const Step& step, std::vector<T>& gathered) const {
    const T *initial = call.get(Operand::h), *history = hidden.data_ptr<T>();
    if (call.walk.dense) return call.before(initial, history, call.P, step.first);
    for (int64_t i = 0; i < step.count; ++i)
      std::copy_n(call.before(initial, history, call.P, step.first + i), call.P, gathered.data() + i * call.P);
    return gathered.data();
  }

  // Nothing stands between the products and the gates: one pass, and the gates themselves are kept in place of what the
  // backward would compute them from.
  void plain_lstm_step(Worker<T>& me, const Step& step, T* pre, const T* bias, T* out) {
    const int64_t u = me.units.size(), H = call.H, first = me.units.begin;
    T* history = cell_state.data_ptr<T>();
    for (int64_t i = 0; i < step.count; ++i) {
      const int64_t s = step.first + i;
      const T *q = pre + i * 4 * u, *c = call.before(call.get(Operand::c), history, H, s) + first;
      T* gates = norm.y != nullptr ? norm.y + norm.place(me.units, s, 0) : pre + i * 4 * u;
      T *kept_c = history + s * H + first, *h = out + s * H + first;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T in = sigmoid(q[j] + bias[j]), forget = sigmoid(q[u + j] + bias[u + j]);
        const T g = tangent(q[2 * u + j] + bias[2 * u + j]), o = sigmoid(q[3 * u + j] + bias[3 * u + j]);
        const T now = forget * c[j] + in * g;
        gates[j] = in;
        gates[u + j] = forget;
        gates[2 * u + j] = g;
        gates[3 * u + j] = o;
        kept_c[j] = now;
        h[j] = o * tangent(now);
      }
    }
  }

  void lstm_step(Worker<T>& me, const Step& step, T* pre, const T* bias, T* c_new, T* out) {
    const int64_t u = me.units.size(), H = call.H, W = 4 * u, first = me.units.begin;
    T* history = cell_state.data_ptr<T>();
    norm_forward(me.norm, me, 0, 4, step.first, step.count, pre, W, bias);
    for (int64_t i = 0; i < step.count; ++i) {
      const int64_t s = step.first + i;
      const T* __restrict q = pre + i * W;
      const T* __restrict c = call.before(call.get(Operand::c), history, H, s) + first;
      T* __restrict now = c_new + i * u;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j)
        now[j] = sigmoid(q[u + j]) * c[j] + sigmoid(q[j]) * tangent(q[2 * u + j]);
    }
    norm_forward(me.cell_norm, me, 0, 1, step.first, step.count, c_new, u, call.zero.data());
    for (int64_t i = 0; i < step.count; ++i) {
      const int64_t s = step.first + i;
      const T* __restrict q = pre + i * W + 3 * u;
      const T* __restrict now = c_new + i * u;
      T* __restrict kept_c = history + s * H + first;
      T* __restrict h = out + s * H + first;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        kept_c[j] = now[j];
        h[j] = sigmoid(q[j]) * tangent(now[j]);
      }
    }
  }

  void gru_step(Worker<T>& me, const Step& step, T* pre, const T* bias, T* new_part, const T* h_before, T* out) {
    const int64_t u = me.units.size(), H = call.H, W = 3 * u, first = me.units.begin;
    const T* hidden_bias = call.get(Operand::bias_hh);
    norm_forward(me.norm, me, 0, 2, step.first, step.count, pre, W, bias);
    for (int64_t i = 0; i < step.count; ++i) {
      T* __restrict q = pre + i * W;
      T* __restrict part = new_part + i * u;
      if (hidden_bias != nullptr) {
        const T* b = hidden_bias + 2 * H + first;
#pragma omp simd
        for (int64_t j = 0; j < u; ++j) part[j] += b[j];
      }
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) q[2 * u + j] += sigmoid(q[j]) * part[j];
      if (call.options.save)
        std::copy_n(part, u, kept[Kept::new_part].template data_ptr<T>() + (step.first + i) * H + first);
    }
    norm_forward(me.norm, me, 2, 3, step.first, step.count, pre + 2 * u, W, bias + 2 * u);
    for (int64_t i = 0; i < step.count; ++i) {
      const T* __restrict q = pre + i * W;
      const T* __restrict h = h_before + i * H + first;
      T* __restrict now = out + (step.first + i) * H + first;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T n = tangent(q[2 * u + j]);
        now[j] = n + sigmoid(q[u + j]) * (h[j] - n);
      }
    }
  }

  void rnn_step(Worker<T>& me, const Step& step, T* pre, const T* bias, T* out) {
    const int64_t u = me.units.size(), H = call.H, first = me.units.begin;
    norm_forward(me.norm, me, 0, 1, step.first, step.count, pre, u, bias);
    const bool tanh = call.options.cell == Cell::rnn_tanh;
    for (int64_t i = 0; i < step.count; ++i) {
      const T* __restrict q = pre + i * u;
      T* __restrict now = out + (step.first + i) * H + first;
      if (tanh) {
#pragma omp simd
        for (int64_t j = 0; j < u; ++j) now[j] = tangent(q[j]);
      } else {
        for (int64_t j = 0; j < u; ++j) now[j] = q[j] < 0 ? T(0) : q[j];
      }
    }
  }

  // y [T, N, P], h [N, P], c [N, H], the four statistics where they moved, then what was kept.
  std::vector<Tensor> results() {
    const Walk& walk = call.walk;
    const int64_t P = call.P, H = call.H;
    const bool lstm = call.options.lstm();
    Tensor h = call.empty({walk.N, P}), c = lstm ? call.empty({walk.N, H}) : call.empty({0});
    call.gather(hidden.data_ptr<T>(), P, walk.last, h.data_ptr<T>());
    if (lstm) call.gather(cell_state.data_ptr<T>(), H, walk.last, c.data_ptr<T>());
    std::vector<Tensor> out{y, h, c};
    const bool moved = call.options.training && call.options.kind == Kind::online;
    for (const Tensor& statistic : statistics)
      out.push_back(moved && statistic.defined() ? statistic : call.empty({0}));
    for (size_t k = 0; k < names<Kept>.size() && call.options.save; ++k) out.push_back(kept[static_cast<Kept>(k)]);
    return out;
  }
};

template <typename T>
struct Backward {
  Call<T> call;
  Gemm<T> gemm;
  Table<Kept> kept;
  Norm<T> norm, cell_norm;
  Tensor grad_y, grad_h, grad_c;                  // [S, P] or undefined, [N, P], [N, H] moved in place
  Tensor grad_input_part, grad_hidden_part;       // [S, C]; the second differs from the first only in a GRU
  Tensor grad_hidden, projected;                  // with a projection: [S, P], [S, H]
  Tensor grad_affine, grad_cell_affine;           // [2, C], [2, H]
  Tensor grad_x, grad_weight_ih, grad_weight_hh, grad_weight_hr, grad_bias_ih, grad_bias_hh;
  bool need_input, need_weights;

  Backward(const Operands& grads, const Operands& operands, const std::vector<Tensor>& saved, const Options& options,
           bool need_input, bool need_weights)
      : call(operands, options), gemm{options.micro}, kept(call.kept(saved)), norm(call.norm(false, kept)),
        cell_norm(call.norm(true, kept)), need_input(need_input), need_weights(need_weights) {
    const Walk& walk = call.walk;
    const int64_t S = walk.S, P = call.P, H = call.H, C = call.C, I = call.I;
    check_count(grads.size(), 3, "gradients, those of y, h and c");
    const auto gradient = [&](size_t k, const char* name, at::IntArrayRef shape) {
      const std::optional<Tensor> given = grads.get(k);
      if (!given) return Tensor();
      check_shape(*given, {"gradient of", name}, shape);
      return ready<T>(*given, {"gradient of", name});
    };
    const auto moved = [&](const Tensor& given, at::IntArrayRef shape) {
      return given.defined() ? given.clone() : call.zeros(shape);
    };
    grad_y = gradient(0, "y", {walk.T, walk.N, P});
    if (grad_y.defined() && !walk.dense) {
      const Tensor padded = grad_y;
      grad_y = call.scratch({S, P});
      call.gather(padded.data_ptr<T>(), P, walk.position, grad_y.template data_ptr<T>());
    }
    grad_h = moved(gradient(1, "h", {walk.N, P}), {walk.N, P});
    const at::DimVector c_shape = options.lstm() ? at::DimVector{walk.N, H} : at::DimVector{0};
    grad_c = moved(gradient(2, "c", c_shape), c_shape);
    grad_input_part = call.scratch({S, C});
    grad_hidden_part = options.cell == Cell::gru ? call.scratch({S, C}) : grad_input_part;
    if (call.get(Operand::weight_hr) != nullptr) {
      grad_hidden = call.scratch({S, P});
      projected = call.scratch({S, H});
    }
    grad_affine = call.zeros({2, C});
    grad_cell_affine = call.zeros({2, H});
    norm.grad_weight = grad_affine.template data_ptr<T>();
    norm.grad_bias = norm.grad_weight + C;
    cell_norm.grad_weight = grad_cell_affine.template data_ptr<T>();
    cell_norm.grad_bias = cell_norm.grad_weight + H;
    grad_x = need_input ? call.empty({S, I}) : call.empty({0});
    if (!need_weights) return;
    const auto product = [&](at::IntArrayRef shape) { return S > 0 ? call.empty(shape) : call.zeros(shape); };
    grad_weight_ih = product({C, I});
    grad_weight_hh = product({C, P});
    if (projected.defined()) grad_weight_hr = product({P, H});
    if (call.get(Operand::bias_ih) != nullptr) {
      grad_bias_ih = call.zeros({C});
      grad_bias_hh = call.zeros({C});
    }
  }

  std::vector<Tensor> run() {
    const int threads = call.threads();
    Exchange<T> exchange(threads, 2 * call.walk.N * call.G);
    if (call.walk.S > 0) Team::run(threads, [&](int id, Team& team) { work(id, team, exchange); });
    return results();
  }

  void work(int id, Team& team, Exchange<T>& exchange) {
    const Walk& walk = call.walk;
    const int64_t H = call.H, P = call.P, G = call.G, C = call.C, N = walk.N;
    const Range units = part_of(H, id, team.size()), outputs = part_of(P, id, team.size());
    const int64_t u = units.size(), p = outputs.size();
    const bool gru = call.options.cell == Cell::gru;
    if (id == 0) take_over(team.size());
    team.wait();
    Worker<T> me(id, team, exchange, units, norm, cell_norm, 2 * N * G);
    T *bias_ih = pointer<T>(grad_bias_ih), *bias_hh = gru ? pointer<T>(grad_bias_hh) : nullptr;
    me.own.take(bias_ih, true);
    me.own.take(bias_hh, true);
    Panels<T> recurrent(C, p), projection(P, projected.defined() ? u : 0);
    recurrent.pack_columns(call.get(Operand::weight_hh) + outputs.begin, P);
    if (projected.defined()) projection.pack_columns(call.get(Operand::weight_hr) + units.begin, H);

    // By row of the step: gradients of h (own outputs), of what the projection takes in (own units), of pre-activations and
    // of what goes past them. All that is worked on lies here: in shared rows the threads would fight for the lines between.
    std::vector<T> dh(N * p), d_out(projected.defined() ? N * u : 0), q(N * G * u), grads(N * G * u), dc(N * u);
    std::vector<T> direct(gru ? N * u : 0);
    std::vector<T> later = own_columns(grad_h, outputs), carried = own_columns(grad_c, units);  // by sequence
    const T* dy = grad_y.defined() ? grad_y.data_ptr<T>() : nullptr;
    for (size_t k = walk.steps.size(); k-- > 0;) {
      const Step step = walk.steps[k];
      if (step.count == 0) continue;
      for (int64_t i = 0; i < step.count; ++i) {
        const int64_t s = step.first + i;
        const T* from = later.data() + walk.row[s] * p;
        for (int64_t j = 0; j < p; ++j)
          dh[i * p + j] = from[j] + (dy != nullptr ? dy[s * P + outputs.begin + j] : T(0));
      }
      const T* dout = dh.data();
      if (projected.defined()) {
        for (int64_t i = 0; i < step.count; ++i)
          std::copy_n(&dh[i * p], p, grad_hidden.data_ptr<T>() + (step.first + i) * P + outputs.begin);
        team.wait();
        projection.multiply(gemm, step.count, grad_hidden.data_ptr<T>() + step.first * P, P, d_out.data(), u, false);
        dout = d_out.data();
      }
      const Gradients<T> d{grads.data(), G * u, u};
      const bool plain_lstm = norm.kind == Kind::none && call.options.cell == Cell::lstm;
      if (gru) gru_step(me, step, dout, q.data(), d, direct.data());
      else if (plain_lstm) plain_lstm_step(me, step, dout, d, carried.data());
      else if (call.options.cell == Cell::lstm) lstm_step(me, step, dout, q.data(), d, dc.data(), carried.data());
      else rnn_step(me, step, dout, q.data(), d);
      store(me, step, d, grad_input_part, bias_ih);
      if (gru) {
        reset_new_gate(me, step, q.data(), d);
        store(me, step, d, grad_hidden_part, bias_hh);
      }
      team.wait();
      // Own columns of the gradient of h before the step, straight to its rows where they are all active.
      const T* parts = grad_hidden_part.data_ptr<T>() + step.first * C;
      const bool in_place = walk.dense && !gru;
      recurrent.multiply(gemm, step.count, parts, C, in_place ? later.data() : dh.data(), p, false);
      if (!in_place) finish_state(step, p, dh, gru ? direct.data() : nullptr, later);
    }
    give_back(later, grad_h, outputs);
    give_back(carried, grad_c, units);
    team.wait();
    if (need_input) multiply_inputs(id, team.size());
    if (need_weights) multiply_weights(id, team.size());
    gemm.release();
  }

  // Where the forward ran with another number of threads, what it kept moves to these ones' blocks.
  void take_over(int threads) {
    T& partition = *kept[Kept::partition].template data_ptr<T>();
    const int from = static_cast<int>(partition);
    if (from == threads) return;
    for (Kept which : {Kept::y, Kept::rstd, Kept::cell_y, Kept::cell_rstd}) {
      const bool of_cell = which == Kept::cell_y || which == Kept::cell_rstd, of_units = which == Kept::y || which == Kept::cell_y || norm.kind == Kind::online;
      if (of_units && kept[which].numel() > 0)
        repartition(kept[which].template data_ptr<T>(), call.walk.S, of_cell ? 1 : call.G, call.H, from, threads);
    }
    partition = static_cast<T>(threads);
  }

  // A thread's columns of a tensor [N, *] as rows of its own, and back.
  std::vector<T> own_columns(const Tensor& tensor, Range columns) const {
    std::vector<T> own;
    for (int64_t n = 0; n < call.walk.N && tensor.numel() > 0; ++n) {
      const T* row = tensor.data_ptr<T>() + n * tensor.size(1);
      own.insert(own.end(), row + columns.begin, row + columns.end);
    }
    return own;
  }

  void give_back(const std::vector<T>& own, const Tensor& tensor, Range columns) const {
    for (int64_t n = 0; n < call.walk.N && tensor.numel() > 0; ++n)
      std::copy_n(own.data() + n * columns.size(), columns.size(), tensor.data_ptr<T>() + n * tensor.size(1) + columns.begin);
  }

  // Scatter the gradient of h before the step to its rows; a GRU adds the direct path that its step left in `direct`.
  void finish_state(const Step& step, int64_t p, const std::vector<T>& dh, const T* direct, std::vector<T>& later) {
    for (int64_t i = 0; i < step.count; ++i) {
      T* to = later.data() + call.walk.row[step.first + i] * p;
      for (int64_t j = 0; j < p; ++j) to[j] = dh[i * p + j] + (direct != nullptr ? direct[i * p + j] : T(0));
    }
  }

  // Write a step's gradients of pre-activations to their places, and add them to the biases' `sums` [G, units].
  void store(const Worker<T>& me, const Step& step, Gradients<T> d, const Tensor& parts, T* sums) {
    const int64_t u = me.units.size();
    for (int64_t i = 0; i < step.count; ++i)
      for (int64_t g = 0; g < call.G; ++g) {
        const T* __restrict from = d.at(i, g);
        T* __restrict to = parts.data_ptr<T>() + (step.first + i) * call.C + g * call.H + me.units.begin;
        std::copy_n(from, u, to);
        if (sums == nullptr) continue;
        T* __restrict sum = sums + g * u;
#pragma omp simd
        for (int64_t j = 0; j < u; ++j) sum[j] += from[j];
      }
  }

  // From the gates that the forward kept.
  void plain_lstm_step(Worker<T>& me, const Step& step, const T* dh, Gradients<T> d, T* later) {
    const int64_t u = me.units.size(), H = call.H, first = me.units.begin;
    const T* history = kept[Kept::cell_state].template data_ptr<T>();
    T* inside = projected.defined() ? projected.data_ptr<T>() : nullptr;
    for (int64_t i = 0; i < step.count; ++i) {
      const int64_t s = step.first + i;
      const T* __restrict gates = norm.y + norm.place(me.units, s, 0);
      const T* __restrict now = history + s * H + first;
      const T* __restrict before = call.before(call.get(Operand::c), history, H, s) + first;
      const T* __restrict dhi = dh + i * u;
      T* __restrict di = d.at(i, 0);
      T* __restrict carried = later + call.walk.row[s] * u;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T in = gates[j], forget = gates[u + j], g = gates[2 * u + j], o = gates[3 * u + j], t = tangent(now[j]);
        const T dc = carried[j] + dhi[j] * o * (1 - t * t);
        di[j] = dc * g * in * (1 - in);
        di[u + j] = dc * before[j] * forget * (1 - forget);
        di[2 * u + j] = dc * in * (1 - g * g);
        di[3 * u + j] = dhi[j] * t * o * (1 - o);
        carried[j] = dc * forget;
      }
      if (inside != nullptr)
        for (int64_t j = 0; j < u; ++j) inside[s * H + first + j] = gates[3 * u + j] * tangent(now[j]);
    }
  }

  void lstm_step(Worker<T>& me, const Step& step, const T* dh, T* q, Gradients<T> d, T* dc, T* carried) {
    const int64_t u = me.units.size(), H = call.H, W = 4 * u, first = me.units.begin;
    const T* history = kept[Kept::cell_state].template data_ptr<T>();
    T* inside = projected.defined() ? projected.data_ptr<T>() : nullptr;
    for (int64_t i = 0; i < step.count; ++i) {
      const int64_t s = step.first + i;
      norm_recompute(me.norm, me, s, q + i * W);
      const T* __restrict c = history + s * H + first;
      const T* __restrict later = carried + call.walk.row[s] * u;
      T* __restrict o = q + i * W + 3 * u;
      T* __restrict d_o = d.at(i, 3);
      const T* __restrict dhi = dh + i * u;
      T* __restrict dci = dc + i * u;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T gate = sigmoid(o[j]), t = tangent(c[j]);
        d_o[j] = dhi[j] * t * gate * (1 - gate);
        dci[j] = later[j] + dhi[j] * gate * (1 - t * t);
      }
      if (inside != nullptr)
        for (int64_t j = 0; j < u; ++j) inside[s * H + first + j] = sigmoid(o[j]) * tangent(c[j]);
    }
    norm_backward(me.cell_norm, me, 0, 1, step.first, step.count, history + step.first * H + first, H,
                  Gradients<T>{dc, u, u});
    for (int64_t i = 0; i < step.count; ++i) {
      const int64_t s = step.first + i;
      const T* __restrict c = call.before(call.get(Operand::c), history, H, s) + first;
      const T* __restrict qi = q + i * W;
      T* __restrict di = d.at(i, 0);
      const T* __restrict dci = dc + i * u;
      T* __restrict earlier = carried + call.walk.row[s] * u;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T in = sigmoid(qi[j]), forget = sigmoid(qi[u + j]), g = tangent(qi[2 * u + j]);
        di[j] = dci[j] * g * in * (1 - in);
        di[u + j] = dci[j] * c[j] * forget * (1 - forget);
        di[2 * u + j] = dci[j] * in * (1 - g * g);
        earlier[j] = dci[j] * forget;
      }
    }
    norm_backward(me.norm, me, 0, 4, step.first, step.count, q, W, d);
  }

  // Leaves dh * z, the direct path to h before the step, in `direct` [count, units].
  void gru_step(Worker<T>& me, const Step& step, const T* dh, T* q, Gradients<T> d, T* direct) {
    const int64_t u = me.units.size(), H = call.H, W = 3 * u, first = me.units.begin;
    const T *initial = call.get(Operand::h), *history = kept[Kept::hidden].template data_ptr<T>();
    const T* parts = kept[Kept::new_part].template data_ptr<T>();
    for (int64_t i = 0; i < step.count; ++i) {
      norm_recompute(me.norm, me, step.first + i, q + i * W);
      const T* __restrict qi = q + i * W;
      const T* __restrict dhi = dh + i * u;
      T* __restrict dn = d.at(i, 2);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T n = tangent(qi[2 * u + j]);
        dn[j] = dhi[j] * (1 - sigmoid(qi[u + j])) * (1 - n * n);
      }
    }
    norm_backward(me.norm, me, 2, 3, step.first, step.count, q + 2 * u, W, Gradients<T>{d.at(0, 2), d.ld, d.gate});
    for (int64_t i = 0; i < step.count; ++i) {
      const int64_t s = step.first + i;
      const T* __restrict qi = q + i * W;
      const T* __restrict dhi = dh + i * u;
      const T* __restrict h = call.before(initial, history, H, s) + first;
      const T* __restrict part = parts + s * H + first;
      T* __restrict di = d.at(i, 0);
      T* __restrict past = direct + i * u;
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T r = sigmoid(qi[j]), z = sigmoid(qi[u + j]), n = tangent(qi[2 * u + j]);
        past[j] = dhi[j] * z;
        di[j] = di[2 * u + j] * part[j] * r * (1 - r);
        di[u + j] = dhi[j] * (h[j] - n) * z * (1 - z);
      }
    }
    norm_backward(me.norm, me, 0, 2, step.first, step.count, q, W, d);
  }

  // From the gradient of the GRU's new gate to that of its recurrent part, which the reset gate was multiplied to.
  void reset_new_gate(const Worker<T>& me, const Step& step, const T* q, Gradients<T> d) {
    const int64_t u = me.units.size();
    for (int64_t i = 0; i < step.count; ++i) {
      const T* __restrict qi = q + i * 3 * u;
      T* __restrict dn = d.at(i, 2);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) dn[j] *= sigmoid(qi[j]);
    }
  }

  void rnn_step(Worker<T>& me, const Step& step, const T* dh, T* q, Gradients<T> d) {
    const int64_t u = me.units.size();
    const bool tanh = call.options.cell == Cell::rnn_tanh;
    for (int64_t i = 0; i < step.count; ++i) {
      norm_recompute(me.norm, me, step.first + i, q + i * u);
      const T* __restrict qi = q + i * u;
      const T* __restrict dhi = dh + i * u;
      T* __restrict di = d.at(i, 0);
#pragma omp simd
      for (int64_t j = 0; j < u; ++j) {
        const T h = tangent(qi[j]);
        di[j] = tanh ? dhi[j] * (1 - h * h) : (qi[j] > 0 ? dhi[j] : T(0));
      }
    }
    norm_backward(me.norm, me, 0, 1, step.first, step.count, q, u, d);
  }

  // grad_x: this thread's share of the samples times the input weights.
  void multiply_inputs(int id, int threads) {
    const Slices slices(call.I);
    const Range share = part_of(call.walk.S, id, threads);
    const T *parts = grad_input_part.data_ptr<T>(), *weight = call.get(Operand::weight_ih);
    const int64_t I = call.I, C = call.C;
    const Array<T> packed(block_depth * Slices::widest);
    for (int64_t k = 0; k < C; k += block_depth) {
      const int64_t depth = std::min(block_depth, C - k);
      for (int64_t slice = 0; slice < slices.count(); ++slice) {
        const int64_t column = slices.begin(slice), width = slices.width(slice);
        copy_rows(weight + k * I + column, I, depth, width, packed.data());
        for (int64_t s = share.begin; s < share.end; s += block_rows)
          gemm(std::min(block_rows, share.end - s), width, depth, parts + s * C + k, C, packed.data(), width,
               grad_x.data_ptr<T>() + s * I + column, I, k > 0);
      }
    }
  }

  struct Product {
    std::vector<const T*> right;  // [S] rows
    int64_t K;                    // their width
    Tensor& gradient;             // [columns of left, K]
  };

  // For each product: gradient = left' [., S] right [S, K], for this thread's columns of `left` [S, columns].
  void multiply_transposed(int id, int threads, const Tensor& left, const std::vector<Product>& products) {
    const int64_t S = call.walk.S, columns = left.size(1);
    const Range share = part_of(columns, id, threads);
    const int64_t blocks = (S + block_depth - 1) / block_depth, tall = (S + blocks - 1) / blocks;
    const Array<T> turned(share.size() * tall);
    const Array<T> packed(tall * Slices::widest);
    for (int64_t s = 0; s < S; s += tall) {
      const int64_t depth = std::min(tall, S - s);
      transpose(left.data_ptr<T>() + s * columns + share.begin, columns, depth, share.size(), turned.data());
      for (const Product& product : products) {
        const int64_t K = product.K;
        const Slices slices(K);
        for (int64_t slice = 0; slice < slices.count(); ++slice) {
          const int64_t k = slices.begin(slice), width = slices.width(slice);
          copy_rows(product.right.data() + s, k, depth, width, packed.data());
          for (int64_t c = 0; c < share.size(); c += block_rows)
            gemm(std::min(block_rows, share.size() - c), width, depth, turned.data() + c * depth, depth, packed.data(),
                 width, product.gradient.template data_ptr<T>() + (share.begin + c) * K + k, K, s > 0);
        }
      }
    }
  }

  void multiply_weights(int id, int threads) {
    const int64_t S = call.walk.S;
    Product inputs{std::vector<const T*>(S), call.I, grad_weight_ih}, states{std::vector<const T*>(S), call.P, grad_weight_hh};
    const T *samples = call.samples.template data_ptr<T>(), *history = kept[Kept::hidden].template data_ptr<T>();
    for (int64_t s = 0; s < S; ++s) {
      inputs.right[s] = samples + s * call.I;
      states.right[s] = call.before(call.get(Operand::h), history, call.P, s);
    }
    if (call.options.cell == Cell::gru) {
      multiply_transposed(id, threads, grad_input_part, {inputs});
      multiply_transposed(id, threads, grad_hidden_part, {states});
    } else {
      multiply_transposed(id, threads, grad_input_part, {inputs, states});
    }
    if (!projected.defined()) return;
    Product outputs{std::vector<const T*>(S), call.H, grad_weight_hr};
    for (int64_t s = 0; s < S; ++s) outputs.right[s] = projected.data_ptr<T>() + s * call.H;
    multiply_transposed(id, threads, grad_hidden, {outputs});
  }

  // In the order of rnnorm.ops.call.DIFFERENTIABLE; what does not apply is empty.
  std::vector<Tensor> results() {
    const Walk& walk = call.walk;
    if (need_input && !walk.dense) {
      const Tensor compact = grad_x;
      grad_x = call.zeros({walk.T * walk.N, call.I});
      for (int64_t s = 0; s < walk.S; ++s)
        std::copy_n(compact.data_ptr<T>() + s * call.I, call.I, grad_x.data_ptr<T>() + walk.position[s] * call.I);
    }
    if (need_input) grad_x = grad_x.view({walk.T, walk.N, call.I});
    if (grad_bias_hh.defined() && call.options.cell != Cell::gru) grad_bias_hh.copy_(grad_bias_ih);
    const auto affine = [&](Operand which, const Tensor& both, int64_t row) {
      return call.tensors[which].defined() ? both.select(0, row).clone() : Tensor();
    };
    std::vector<Tensor> out{grad_x, grad_h, grad_c, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh,
                            grad_weight_hr, affine(Operand::norm_scale, grad_affine, 0), affine(Operand::norm_shift, grad_affine, 1),
                            affine(Operand::cell_norm_scale, grad_cell_affine, 0), affine(Operand::cell_norm_shift, grad_cell_affine, 1)};
    for (Tensor& gradient : out)
      if (!gradient.defined()) gradient = call.empty({0});
    return out;
  }
};

Options options_of(std::string_view cell, std::string_view norm, std::string_view guard, at::ArrayRef<double> constants,
                   bool cell_norm, bool training, bool reverse, bool save, bool micro, int64_t threads) {
  check_count(constants.size(), names<Constants>.size(), "constants");
  Options options{named<Cell>("cell", cell), named<Kind>("norm", norm), named<Guard>("guard", guard), {}, cell_norm,
                  training, reverse, save, micro && micro_kernel_works(), threads};
  std::memcpy(&options.constants, constants.data(), sizeof(Constants));
  TORCH_CHECK(options.guard == Guard::none || options.kind == Kind::online, "rnnorm: guard must be none where norm is ",
              norm, "; got ", guard);
  TORCH_CHECK(!cell_norm || (options.lstm() && options.kind != Kind::none),
              "rnnorm: cell_norm must be false where cell is ", cell, " and norm is ", norm);
  check_threads(threads);
  return options;
}

at::ScalarType dtype_of(const Operands& operands) {
  check_count(operands.size(), names<Operand>.size(), "operands");
  const std::optional<Tensor> x = operands.get(index(Operand::x));
  TORCH_CHECK(x, "rnnorm: operand x is missing");
  return x->scalar_type();
}

std::vector<Tensor> forward(const Operands& operands, std::string_view cell, std::string_view norm,
                            std::string_view guard, at::ArrayRef<double> constants, bool cell_norm, bool training,
                            bool reverse, bool save, bool micro, int64_t threads) {
  const Options options = options_of(cell, norm, guard, constants, cell_norm, training, reverse, save, micro, threads);
  const at::ScalarType found_dtype = dtype_of(operands);
  std::vector<Tensor> found =
      found_dtype == at::kDouble ? Forward<double>(operands, options).run() : Forward<float>(operands, options).run();
  for (int k = 0; k < 3; ++k) found[k] = found[k].to(found_dtype);  // y, h and c
  return found;
}

template <typename T>
std::vector<Tensor> gradients(const Operands& grads, const Operands& operands, const std::vector<Tensor>& kept,
                              const Options& options, bool need_input, bool need_weights) {
  Backward<T> pass(grads, operands, kept, options, need_input, need_weights);
  std::vector<Tensor> found = pass.run();
  const auto given = [&](Operand which) { return std::optional<Tensor>(operands.get(index(which))); };
  for (Operand which : {Operand::norm_u, Operand::norm_v, Operand::cell_norm_u, Operand::cell_norm_v})  // what moved may be a copy, made for its dtype or strides
    if (auto buffer = given(which); buffer && !buffer->is_same(pass.call.tensors[which]))
      buffer->copy_(pass.call.tensors[which]);
  for (size_t k = 0; k < found.size(); ++k)
    if (auto operand = given(static_cast<Operand>(k))) found[k] = found[k].to(operand->scalar_type());
  return found;
}

std::vector<Tensor> backward(const Operands& grads, const Operands& operands, const std::vector<Tensor>& kept,
                             std::string_view cell, std::string_view norm, std::string_view guard,
                             at::ArrayRef<double> constants, bool cell_norm, bool training, bool reverse, bool micro,
                             int64_t threads, bool need_input, bool need_weights) {
  const Options options = options_of(cell, norm, guard, constants, cell_norm, training, reverse, true, micro, threads);
  const auto chosen = dtype_of(operands) == at::kDouble ? &gradients<double> : &gradients<float>;
  return chosen(grads, operands, kept, options, need_input, need_weights);
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnorm_cpu, CPU, library) {
  library.impl("forward", &forward);
  library.impl("backward", &backward);
}

}  // namespace rnnorm
