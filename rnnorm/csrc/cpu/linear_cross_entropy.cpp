#include "linear_cross_entropy.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "cores.h"
#include "gemm.h"
#include "math.h"
#include "pool.h"
#include "team.h"

namespace rnnorm {
namespace {

using at::Tensor;

constexpr int64_t vector = 16, tallest_tile = 128, least_rows = 64, most_rows = 128, group = 32;
// How far, in nats, a logit may exceed its row's reference: rarely reached, and sums stay finite in float32.
constexpr int headroom = 40;

template <typename T>
struct Problem {
  const T *hidden, *weight, *bias;  // [M, E], [V, E], [V] or null
  const int64_t* targets;
  const T* weights;           // [M] of the rows; null: all 1
  std::vector<int64_t> rows;  // with a weight other than 0
  int64_t E, V;
  int64_t threads;  // 0: chosen by the size of the problem
  double* nats;
  T *grad_hidden, *grad_weight, *grad_bias;  // null: not needed
  Gemm<T> gemm;

  bool keeps() const { return grad_weight != nullptr || grad_bias != nullptr; }
  T weight_of(int64_t row) const { return weights == nullptr ? T(1) : weights[row]; }
};

// The type of products' operands, rounded from T.
template <typename T>
void store(T value, T& to) { to = value; }
inline void store(float value, Half& to) { to.x = half_bits(value); }

// One thread's results for a block, read by all.
template <typename T>
struct Report {
  std::vector<T> reference;    // [rows]
  std::vector<double> sum;     // [rows] of e^(logit - reference) over the slice
  Tensor weighted;             // [rows, E] sums of e^(logit - reference) * weight
};

template <typename T>
struct Board {
  std::vector<Report<T>> reports;  // of each thread
  std::vector<T> chosen;           // [rows] the targets' logits
};

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr<T>() : nullptr;
}

// Operands of products are of type S: T, or with `gemm.half` bfloat16.
template <typename T, typename S>
class Decoder {
 public:
  Decoder(const Problem<T>& problem, int64_t width, int id, int threads, Board<T>* boards)
      : problem_(problem), width_(width), id_(id), threads_(threads), boards_(boards), slice_(part_of(problem.V, id, threads)),
        tiles_((slice_.size() + tallest_tile - 1) / tallest_tile), units_((slice_.size() + vector - 1) / vector) {
    const auto empty = [](int64_t count) { return pooled({count}, c10::CppTypeToScalarType<T>::value); };
    columns_ = empty(problem.gemm.depth(problem.E) * width);
    if (problem.grad_weight != nullptr) scaled_ = empty(problem.E * width);
    logits_ = empty(tallest_tile * width);
    if (problem.grad_hidden != nullptr) turned_ = {problem.gemm, width, tallest_tile};
    kept_ = pooled({(problem.keeps() ? slice_.size() : tallest_tile) * width}, c10::CppTypeToScalarType<S>::value);
    if constexpr (rounds) round_weights();
    if (problem.keeps()) references_.resize(tiles_ * width);
    highest_.resize(width);
    sums_.resize(width);
    factors_.resize(width);
    for (int turn = 0; turn < 2; ++turn) {
      Report<T>& mine = boards[turn].reports[id];
      mine.reference.resize(width);
      mine.sum.resize(width);
      if (problem.grad_hidden != nullptr) mine.weighted = empty(width * problem.E);
    }
  }

  // Counted rows [first, first + count), over this thread's slice of the vocabulary.
  void logits(int64_t first, int64_t count, int turn) {
    first_ = first;
    count_ = count;
    board_ = &boards_[turn];
    load();
    Report<T>& mine = board_->reports[id_];
    std::fill(mine.reference.begin(), mine.reference.end(), std::numeric_limits<T>::lowest());
    std::fill(mine.sum.begin(), mine.sum.end(), 0.0);
    auto target = targets_.begin();
    for (int64_t index = 0; index < tiles_; ++index) {
      const Range tile = this->tile(index);
      T* logits = data<T>(logits_);
      S* exponentials = data<S>(kept_) + (problem_.keeps() ? (tile.begin - slice_.begin) * width_ : 0);
      problem_.gemm(tile.size(), width_, problem_.gemm.depth(problem_.E), weight_rows(tile), data<T>(columns_), logits, width_,
                    false);
      const auto first_target = target;
      for (; target != targets_.end() && target->first < tile.end; ++target)
        board_->chosen[target->second] = logits[(target->first - tile.begin) * width_ + target->second] + bias(target->first);
      exponentiate(tile, logits, exponentials);
      if (raise(index > 0)) exponentiate(tile, logits, exponentials);
      for (auto it = first_target; it != target; ++it)  // in no product: see `of_target`
        store(T(0), exponentials[(it->first - tile.begin) * width_ + it->second]);
      for (int64_t r = 0; r < width_; ++r) mine.sum[r] += sums_[r];
      if (problem_.keeps()) std::copy_n(mine.reference.data(), width_, references_.data() + index * width_);
      if (problem_.grad_hidden != nullptr) {
        turned_.write_transposed(left(exponentials), tile.size());
        problem_.gemm(width_, problem_.E, problem_.gemm.depth(tile.size()), turned_.left(), weight_columns(tile),
                      data<T>(mine.weighted), problem_.E, index > 0);
      }
    }
  }

  // Called when all threads have computed their logits.
  void gradients() {
    const Report<T>& mine = board_->reports[id_];
    for (int64_t r = 0; r < width_; ++r)
      factors_[r] =
          r < count_ ? static_cast<T>(std::exp(mine.reference[r] - normalizer(r))) * problem_.weight_of(row(r)) : T(0);
    const Range share = part_of(count_, id_, threads_);
    for (int64_t r = share.begin; r < share.end; ++r) finish_row(r);
    if (problem_.keeps()) weight_gradients();
  }

 private:
  static constexpr bool rounds = !std::is_same_v<S, T>;

  Range tile(int64_t index) const {
    const auto edge = [&](int64_t i) { return std::min(slice_.end, slice_.begin + units_ * i / tiles_ * vector); };
    return {edge(index), edge(index + 1)};
  }

  template <typename V>
  static void fetch(const V* begin, const V* end) {
    for (const V* line = begin; line < end; line += 64 / sizeof(V)) __builtin_prefetch(line, 0, 2);
  }

  // Rows [*, width] of exponentials as a left operand.
  Left<T> left(const S* exponentials) const {
    if constexpr (rounds) return {nullptr, exponentials, width_};
    else return {exponentials, nullptr, width_};
  }

  // This thread's slice of the weights in both forms that products read.
  void round_weights() {
    const int64_t E = problem_.E;
    const T* first = problem_.weight + slice_.begin * E;
    rounded_ = {problem_.gemm, slice_.size(), E};
    for (int64_t v = 0; v < slice_.size(); ++v) rounded_.write(v, 0, first + v * E, E);
    if (problem_.grad_hidden == nullptr) return;
    packed_ = pooled({problem_.gemm.depth(slice_.size()) * E}, at::kBFloat16);
    pack(problem_.gemm, slice_.size(), E, static_cast<T*>(packed_.mutable_data_ptr()), [&](int64_t v) { return first + v * E; });
  }

  // The tile's weights as a left operand [tile, E], and packed as a right one.
  Left<T> weight_rows(Range tile) const {
    if constexpr (rounds) return rounded_.left(tile.begin - slice_.begin);
    else return {problem_.weight + tile.begin * problem_.E, nullptr, problem_.E};
  }
  const T* weight_columns(Range tile) const {
    if constexpr (!rounds) return problem_.weight + tile.begin * problem_.E;
    // A tile begins at an even place of the slice.
    const Half* pairs = data<Half>(packed_) + (tile.begin - slice_.begin) * problem_.E;
    return reinterpret_cast<const T*>(pairs);
  }

  T bias(int64_t v) const { return problem_.bias == nullptr ? T(0) : problem_.bias[v]; }

  int64_t row(int64_t r) const { return problem_.rows[first_ + r]; }

  const T* hidden(int64_t r) const { return problem_.hidden + row(r) * problem_.E; }

  void load() {
    const int64_t E = problem_.E;
    T* columns = data<T>(columns_);
    if constexpr (rounds) {
      const int64_t depth = problem_.gemm.depth(E);
      const Matrix<T> rows(problem_.gemm, width_, E);
      const std::vector<T> zeros(E);
      for (int64_t r = 0; r < width_; ++r) rows.write(r, 0, r < count_ ? hidden(r) : zeros.data(), E);
      // A pair of one row is a value of 4 bytes of one column.
      transpose(reinterpret_cast<const uint32_t*>(rows.left().halves), depth / 2, width_, depth / 2,
                reinterpret_cast<uint32_t*>(columns), width_);
    } else {
      for (int64_t e = 0; e < E; ++e)
        for (int64_t r = 0; r < width_; ++r) columns[e * width_ + r] = r < count_ ? hidden(r)[e] : T(0);
    }
    targets_.clear();
    for (int64_t r = 0; r < count_; ++r) {
      const int64_t target = problem_.targets[row(r)];
      if (target >= slice_.begin && target < slice_.end) targets_.emplace_back(target, r);
    }
    std::sort(targets_.begin(), targets_.end());
  }

  void exponentiate(Range tile, const T* logits, S* out) {
    const T* reference = board_->reports[id_].reference.data();
    for (int64_t r = 0; r < width_; r += vector) {
      T high[vector], sum[vector], from[vector];
      for (int64_t j = 0; j < vector; ++j) {
        high[j] = std::numeric_limits<T>::lowest();
        sum[j] = 0;
        from[j] = reference[r + j];
      }
      for (int64_t v = 0; v < tile.size(); ++v) {
        const T b = bias(tile.begin + v);
        const T* logit = logits + v * width_ + r;
        S* to = out + v * width_ + r;
#pragma omp simd
        for (int64_t j = 0; j < vector; ++j) {
          const T x = logit[j] + b;
          const T e = exponential(x - from[j]);
          high[j] = x > high[j] ? x : high[j];
          sum[j] += e;
          store(e, to[j]);
        }
      }
      std::copy_n(high, vector, highest_.data() + r);
      std::copy_n(sum, vector, sums_.data() + r);
    }
  }

  // Raise the references that a logit of the tile exceeds by more than the headroom, and rescale earlier sums; true if any was.
  bool raise(bool started) {
    Report<T>& mine = board_->reports[id_];
    bool any = false;
    for (int64_t r = 0; r < width_; ++r) any |= highest_[r] > mine.reference[r] + headroom;
    if (!any) return false;
    for (int64_t r = 0; r < width_; ++r) {
      if (!(highest_[r] > mine.reference[r] + headroom)) continue;
      const T factor = exponential(mine.reference[r] - highest_[r]);
      mine.reference[r] = highest_[r];
      mine.sum[r] *= factor;
      if (started && problem_.grad_hidden != nullptr)
        for (int64_t e = 0; e < problem_.E; ++e) data<T>(mine.weighted)[r * problem_.E + e] *= factor;
    }
    return true;
  }

  // The log-sum-exp of a row's logits.
  double normalizer(int64_t r) const {
    double highest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int t = 0; t < threads_; ++t) highest = std::max<double>(highest, board_->reports[t].reference[r]);
    for (int t = 0; t < threads_; ++t)
      sum += board_->reports[t].sum[r] * std::exp(board_->reports[t].reference[r] - highest);
    return highest + std::log(sum);
  }

  // The gradient of a row's target's logit, the weight times p - 1. It is added by itself and not within products: there the
  // rounding of p would be greater than p - 1 where p is nearly 1.
  T of_target(int64_t r, double total) const {
    return static_cast<T>(std::expm1(board_->chosen[r] - total)) * problem_.weight_of(row(r));
  }

  void finish_row(int64_t r) {
    const int64_t E = problem_.E, row = this->row(r);
    const double total = normalizer(r);
    problem_.nats[row] = total - board_->chosen[r];
    if (problem_.grad_hidden == nullptr) return;
    T* __restrict out = problem_.grad_hidden + row * E;
    const T* chosen = problem_.weight + problem_.targets[row] * E;
    const T weight = problem_.weight_of(row), of_target = this->of_target(r, total);
    for (int64_t e = 0; e < E; ++e) out[e] = of_target * chosen[e];
    for (int t = 0; t < threads_; ++t) {
      const Report<T>& report = board_->reports[t];
      const T factor = static_cast<T>(std::exp(report.reference[r] - total)) * weight;
      const T* weighted = data<T>(report.weighted) + r * E;
      for (int64_t e = 0; e < E; ++e) out[e] += factor * weighted[e];
    }
  }

  void weight_gradients() {
    const int64_t E = problem_.E;
    T* scaled = data<T>(scaled_);
    if (scaled != nullptr) {
      const auto scale = [&](int64_t r, T* to) -> const T* {
        for (int64_t e = 0; e < E; ++e) to[e] = r < count_ ? factors_[r] * hidden(r)[e] : T(0);
        return to;
      };
      if constexpr (rounds) {
        std::vector<T> pair(2 * E);
        pack(problem_.gemm, width_, E, scaled, [&](int64_t r) { return scale(r, pair.data() + r % 2 * E); });
      } else {
        for (int64_t r = 0; r < width_; ++r) scale(r, scaled + r * E);
      }
    }
    const bool add = first_ > 0;
    for (int64_t index = 0; index < tiles_; ++index) {
      const Range tile = this->tile(index);
      S* exponentials = data<S>(kept_) + (tile.begin - slice_.begin) * width_;
      follow(index, tile, exponentials);
      if (problem_.grad_bias != nullptr)
        for (int64_t v = 0; v < tile.size(); ++v) {
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t r = 0; r < width_; ++r) sum += static_cast<T>(exponentials[v * width_ + r]) * factors_[r];
          T& gradient = problem_.grad_bias[tile.begin + v];
          gradient = add ? gradient + sum : sum;
        }
      if (problem_.grad_weight != nullptr)
        for (int64_t v = 0; v < tile.size(); v += group) {
          const int64_t count = std::min(group, tile.size() - v);
          const S* from = exponentials + v * width_;
          T* to = problem_.grad_weight + (tile.begin + v) * E;
          const int64_t ahead = std::min(2*group, slice_.end - tile.begin - v);
          fetch(from + group * width_, from + ahead * width_);
          if (add) fetch(to + group * E, to + ahead * E);
          problem_.gemm(count, E, width_, left(from), scaled, to, E, add);
        }
    }
    for (const auto& [target, r] : targets_) {
      const T of_target = this->of_target(r, normalizer(r));
      if (problem_.grad_bias != nullptr) problem_.grad_bias[target] += of_target;
      if (problem_.grad_weight == nullptr) continue;
      T* __restrict gradient = problem_.grad_weight + target * E;
      const T* from = hidden(r);
      for (int64_t e = 0; e < E; ++e) gradient[e] += of_target * from[e];
    }
  }

  // Rescale the exponentials of a tile that was computed before its reference was raised.
  void follow(int64_t index, Range tile, S* exponentials) {
    const T *before = references_.data() + index * width_, *now = board_->reports[id_].reference.data();
    if (std::equal(before, before + width_, now)) return;
    for (int64_t r = 0; r < width_; ++r) sums_[r] = before[r] == now[r] ? T(1) : exponential(before[r] - now[r]);
    for (int64_t v = 0; v < tile.size(); ++v)
      for (int64_t r = 0; r < width_; ++r)
        store(static_cast<T>(exponentials[v * width_ + r]) * sums_[r], exponentials[v * width_ + r]);
  }

  const Problem<T>& problem_;
  const int64_t width_;
  const int id_, threads_;
  Board<T>* boards_;
  Board<T>* board_ = nullptr;
  const Range slice_;
  const int64_t tiles_, units_;
  int64_t first_ = 0, count_ = 0;
  Tensor columns_;  // [E, rows] hidden, transposed
  Tensor scaled_;   // [rows, E] hidden times the factor from exponentials to weighted probabilities, as a right operand
  Tensor logits_;
  Matrix<T> turned_;          // [rows, tile] exponentials
  Matrix<T> rounded_;         // [slice, E] weights in bfloat16
  Tensor packed_;             // the same in pairs of rows
  Tensor kept_;  // exponentials [slice, rows], or [tile, rows] if no gradient needs them later
  std::vector<T> references_, highest_, sums_, factors_;
  std::vector<std::pair<int64_t, int64_t>> targets_;  // targets in the slice, with their rows in the block
};

// Rows of a block: as many as need less memory than an eighth of all logits, but at least `least_rows`.
template <typename T>
int64_t block_rows(const Problem<T>& problem, int threads) {
  const int64_t M = problem.rows.size();
  const int64_t per_row = (problem.keeps() ? problem.V / (problem.gemm.half ? 2 : 1) : 0) + threads * (4 * problem.E + 2 * tallest_tile);
  const int64_t rows = std::clamp(M * problem.V / 8 / per_row, least_rows, most_rows);
  const int64_t blocks = (M + rows - 1) / rows;
  return ((M + blocks - 1) / blocks + vector - 1) / vector * vector;
}

template <typename T, typename S>
void solve(const Problem<T>& problem) {
  const int64_t M = problem.rows.size();
  constexpr int64_t worthwhile = 2'000'000;  // multiplications of one product per additional thread
  const int64_t useful = std::min(1 + M * problem.V * problem.E / worthwhile, int64_t{available_threads()});
  const int most = static_cast<int>(std::min(problem.threads > 0 ? problem.threads : useful, (problem.V + 63) / 64));
  const int64_t width = block_rows(problem, most);
  Board<T> boards[2];
  for (Board<T>& board : boards) {
    board.reports.resize(most);
    board.chosen.resize(width);
  }
  Team::run(most, [&](int id, Team& team) {
    Decoder<T, S> decoder(problem, width, id, team.size(), boards);
    int turn = 0;
    for (int64_t first = 0; first < M; first += width, turn ^= 1) {
      decoder.logits(first, std::min(width, M - first), turn);
      team.wait();
      decoder.gradients();
    }
    problem.gemm.release();
  });
}

// The rows whose weight is not 0. Raises if one of their targets is out of range.
template <typename T>
std::vector<int64_t> counted(const Tensor& targets, const T* weights, int64_t V) {
  std::vector<int64_t> rows;
  const int64_t* target = targets.data_ptr<int64_t>();
  for (int64_t m = 0; m < targets.size(0); ++m) {
    if (weights != nullptr && weights[m] == 0) continue;
    TORCH_CHECK_VALUE(target[m] >= 0 && target[m] < V, "targets must lie in 0..", V - 1, "; got ", target[m]);
    rows.push_back(m);
  }
  return rows;
}

template <typename T>
std::vector<Tensor> run(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                        const Tensor& targets, const std::optional<Tensor>& weights, bool need_hidden, bool need_weight,
                        bool need_bias, bool micro, bool half, int64_t threads) {
  const int64_t M = hidden.size(0);
  const T* of_rows = weights ? weights->data_ptr<T>() : nullptr;
  std::vector<int64_t> rows = counted(targets, of_rows, weight.size(0));
  const bool all = static_cast<int64_t>(rows.size()) == M, none = rows.empty();
  const auto made = [&](bool wanted, bool written, at::IntArrayRef shape) {
    if (!wanted) return at::empty({0}, hidden.options());
    return written ? at::empty(shape, hidden.options()) : at::zeros(shape, hidden.options());
  };
  const Tensor nats = at::zeros({M}, at::kDouble);
  const Tensor grad_hidden = made(need_hidden, all, hidden.sizes());
  const Tensor grad_weight = made(need_weight, !none, weight.sizes());
  const Tensor grad_bias = made(need_bias, !none, {weight.size(0)});
  if (!none) {
    const auto wanted = [](bool need, const Tensor& gradient) { return need ? gradient.data_ptr<T>() : nullptr; };
    const Problem<T> problem{hidden.data_ptr<T>(), weight.data_ptr<T>(), bias ? bias->data_ptr<T>() : nullptr,
                     targets.data_ptr<int64_t>(), of_rows, std::move(rows), weight.size(1), weight.size(0), threads,
                     nats.data_ptr<double>(), wanted(need_hidden, grad_hidden), wanted(need_weight, grad_weight),
                     wanted(need_bias, grad_bias), Gemm<T>{micro && micro_kernel_works<float>(), half && micro && micro_kernel_works<Half>()}};
    if constexpr (std::is_same_v<T, float>)
      problem.gemm.half ? solve<T, Half>(problem) : solve<T, T>(problem);
    else
      solve<T, T>(problem);
  }
  return {nats, grad_hidden, grad_weight, grad_bias};
}

void check_tensor(const Tensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef shape) {
  const Label label{"linear_cross_entropy's", name};
  check_memory(tensor, label);
  check_dtype(tensor, label, dtype);
  check_shape(tensor, label, shape);
  check_contiguous(tensor, label);
}

}  // namespace

std::vector<Tensor> linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                                         const Tensor& targets, const std::optional<Tensor>& weights, bool need_hidden,
                                         bool need_weight, bool need_bias, bool micro, bool half, int64_t threads) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2,
              "rnnorm: linear_cross_entropy's hidden and weight must have shapes [M, E] and [V, E]; got ", hidden.sizes(),
              " and ", weight.sizes());
  const at::ScalarType dtype = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t M = hidden.size(0), V = weight.size(0);
  check_tensor(hidden, "hidden", dtype, hidden.sizes());
  check_tensor(weight, "weight", dtype, {V, hidden.size(1)});
  if (bias) check_tensor(*bias, "bias", dtype, {V});
  check_tensor(targets, "targets", at::kLong, {M});
  if (weights) check_tensor(*weights, "weights", dtype, {M});
  check_threads(threads);
  const auto chosen = dtype == at::kDouble ? &run<double> : &run<float>;
  return chosen(hidden, weight, bias, targets, weights, need_hidden, need_weight, need_bias, micro, half, threads);
}

}  // namespace rnnorm
