// The backward pass over a sequence.
#pragma once

#include <vector>

#include "pass.h"
#include "sequence.h"
#include "team.h"

namespace rnnorm {

template <typename T>
struct Backward : Pass<T> {
  using Pass<T>::call, Pass<T>::walk, Pass<T>::N, Pass<T>::I, Pass<T>::P, Pass<T>::G, Pass<T>::H, Pass<T>::C, Pass<T>::S;
  using Pass<T>::gemm, Pass<T>::kept, Pass<T>::norm, Pass<T>::cell_norm, Pass<T>::get;

  States<T> h, c;
  Tensor grad_y, grad_h, grad_c;             // [S, P] or undefined, [N, P], [N, H]; the last two updated in place
  // Of the pre-activations: a block [S, G * units] for each thread, which writes no memory near another's. The recurrent part's
  // gradient is that of the input part unless the last gate's is separate.
  std::vector<Matrix<T>> grad_input_part, grad_hidden_part;
  Matrix<T> grad_hidden, projected;             // with a projection: [S, P], [S, H]
  Matrix<T> entered;                            // [S, P] h as it entered the recurrent product, if that differs from h
  Tensor grad_affine, grad_cell_affine;      // [2, C], [2, H]
  Tensor grad_x, grad_weight_ih, grad_weight_hh, grad_weight_hr, grad_bias_ih, grad_bias_hh;
  bool need_input, need_weights;

  Backward(const Call& call, const Gradient& grads, const Table<Kept>& kept, bool need_input, bool need_weights)
      : Pass<T>(call, kept), h{get(Operand::h), get(Kept::hidden), P, walk, this->zeros.data()},
        c{get(Operand::c), get(Kept::cell_state), H, walk, this->zeros.data()}, grad_y(grads.y), need_input(need_input),
        need_weights(need_weights) {
    if (grad_y.defined() && !walk.dense) {
      grad_y = call.scratch({S, P});
      this->gather(grads.y.data_ptr<T>(), P, walk.position, grad_y.template data_ptr<T>());
    }
    grad_h = grads.h.defined() ? grads.h.clone() : call.zeros({N, P});
    grad_c = grads.c.defined() ? grads.c.clone() : call.cell.has_c ? call.zeros({N, H}) : call.empty({0});
    if (call.has(Operand::weight_hr)) {
      grad_hidden = {gemm, S, P};
      projected = {gemm, S, H};
    }
    grad_affine = call.zeros({2, C});
    grad_cell_affine = call.zeros({2, H});
    norm.grad_weight = grad_affine.template data_ptr<T>();
    norm.grad_bias = norm.grad_weight + C;
    cell_norm.grad_weight = grad_cell_affine.template data_ptr<T>();
    cell_norm.grad_bias = cell_norm.grad_weight + H;
    grad_x = !need_input ? call.empty({0}) : walk.dense ? call.empty({call.T, N, I}) : call.scratch({S, I});
    if (!need_weights) return;
    if (call.has(Operand::recurrent_mask) || gemm.half) entered = {gemm, S, P};
    const auto product = [&](at::IntArrayRef shape) { return S > 0 ? call.empty(shape) : call.zeros(shape); };
    grad_weight_ih = product({C, I});
    grad_weight_hh = product({C, P});
    if (projected.defined()) grad_weight_hr = product({P, H});
    if (call.has(Operand::bias_ih)) {
      grad_bias_ih = call.zeros({C});
      grad_bias_hh = call.zeros({C});
    }
  }

  std::vector<Tensor> run() {
    using Work = void (Backward::*)(int, Team&, Exchange<T>&);
    const Work work = choose(call.options.cell, call.options.kind,
                             []<typename Chosen, Kind kind>() -> Work { return &Backward::work<Chosen, kind>; });
    const int threads = call.threads();
    Exchange<T> exchange(threads, 2 * N * G);
    if (S > 0) Team::run(threads, [&](int id, Team& team) { (this->*work)(id, team, exchange); });
    return results();
  }

  template <typename Chosen, Kind kind>
  void work(int id, Team& team, Exchange<T>& exchange) {
    const Range units = part_of(H, id, team.size()), outputs = part_of(P, id, team.size());
    const int64_t u = units.size(), p = outputs.size();
    if (id == 0) {
      take_over(team.size());
      this->set_kept();
      for (int t = 0; t < team.size(); ++t) {
        const int64_t width = G * part_of(H, t, team.size()).size();
        grad_input_part.emplace_back(gemm, S, width);
        grad_hidden_part.push_back(Chosen::apart ? Matrix<T>(gemm, S, width) : grad_input_part[t]);
      }
    }
    team.wait();
    Worker<T> me(id, team, exchange, units, norm, cell_norm, 2 * N * G);
    T *bias_ih = pointer<T>(grad_bias_ih), *bias_hh = Chosen::apart ? pointer<T>(grad_bias_hh) : nullptr;
    me.own.take(bias_ih, true);
    me.own.take(bias_hh, true);
    std::vector<Panels<T>> recurrent;  // for each thread's block of gradients
    for (int t = 0; t < team.size(); ++t) {
      const T* columns = get(Operand::weight_hh) + outputs.begin;
      recurrent.emplace_back(gemm, grad_hidden_part[t].width(), p);
      recurrent[t].pack_columns([&](int64_t k) { return columns + channel(t, team.size(), k) * P; });
    }
    Panels<T> projection(gemm, P, projected.defined() ? u : 0);
    if (const T* columns = get(Operand::weight_hr); columns != nullptr)
      projection.pack_columns([&](int64_t k) { return columns + units.begin + k * H; });

    // This thread's part of a step: gradients of h (own outputs), of the projection's input (own units), of pre-activations, and
    // of h other than through its product. Copies, since shared rows would cause false sharing.
    std::vector<T> dh(N * p), d_out(projected.defined() ? N * u : 0), spare(projected.defined() ? N * u : 0), q(N * G * u), dc(N * u);
    // Gradients of pre-activations are written to this thread's block in place, unless rounded, or changed for the recurrent part.
    T* const block = Chosen::apart ? nullptr : grad_input_part[id].values();
    std::vector<T> grads(block == nullptr ? N * G * u : 0);
    std::vector<T> direct(Chosen::reads_h ? N * u : 0);
    std::vector<T> later = own_columns(grad_h, outputs), carried = own_columns(grad_c, units);  // by sequence
    T* const new_c = get(this->stays_c.defined() ? Kept::cell_new : Kept::cell_state);
    // Gradients that bypass the step by zoneout, by row: of h (own outputs) and of c (own units).
    std::vector<T> past_h(this->stays_h.defined() ? N * p : 0), past_c(this->stays_c.defined() ? N * u : 0);
    for (size_t k = walk.steps.size(); k-- > 0;) {
      const Step step = walk.steps[k];
      if (step.count == 0) continue;
      gradient_of_output(step, outputs, later, dh);
      split_zoneout(step, outputs, this->stays_h, past_h, [&](int64_t i) { return &dh[i * p]; });
      split_zoneout(step, units, this->stays_c, past_c, [&](int64_t i) { return &carried[walk.row[step.first + i] * u]; });
      if (projected.defined()) {
        for (int64_t i = 0; i < step.count; ++i) grad_hidden.write(step.first + i, outputs.begin, &dh[i * p], p);
        team.wait();
        projection.multiply(step.count, grad_hidden.left(step.first), d_out.data(), u, false);
      }
      const int64_t own = step.first * H + units.begin;  // of rows [S, H]
      BackwardStep<T, kind> at(me, step, h, c, new_c);
      at.dh = {projected.defined() ? d_out.data() : dh.data(), 0, u};
      at.q = {q.data(), 0, G * u};
      at.d = {block == nullptr ? grads.data() : block + step.first * G * u, G * u, u};
      at.dc = {dc.data(), 0, u};
      at.direct = {direct.data(), 0, u};
      at.apart = {get(Kept::apart), own, H};
      at.projected = {projected.defined() ? spare.data() : nullptr, 0, u};
      at.carried = carried.data();
      Chosen::backward(at);
      for (int64_t i = 0; i < step.count && projected.defined(); ++i)
        projected.write(step.first + i, units.begin, at.projected(i), u);
      store(at, grad_input_part[id], bias_ih);
      if constexpr (Chosen::apart) {
        Chosen::recurrent_gradient(at);
        store(at, grad_hidden_part[id], bias_hh);
      }
      team.wait();
      // Own columns of the gradient of h before the step; written in place if all rows are active.
      const bool in_place = walk.dense && !call.has(Operand::reset) && !call.has(Operand::recurrent_mask) &&
                            !this->stays_h.defined() && !Chosen::reads_h;
      for (int t = 0; t < team.size(); ++t)
        recurrent[t].multiply(step.count, grad_hidden_part[t].left(step.first), in_place ? later.data() : dh.data(), p, t > 0);
      if (!in_place) finish_h(step, outputs, dh, Chosen::reads_h ? direct.data() : nullptr, past_h, later);
      if constexpr (Chosen::has_c) finish_c(step, u, past_c, carried);
    }
    give_back(later, grad_h, outputs);
    give_back(carried, grad_c, units);
    team.wait();
    if (entered.defined()) {
      const Range share = part_of(S, id, team.size());
      std::vector<T> row(P);
      for (int64_t s = share.begin; s < share.end; ++s) this->enter(h, s, entered, s, row);
      team.wait();
    }
    if (need_input) multiply_inputs(id, team.size());
    if (need_weights) multiply_weights(id, team.size());
    gemm.release();
  }

  // If the forward pass ran with another number of threads, rearrange the kept tensors into these threads' blocks. Copies of
  // them: another backward pass through the same graph may read them meanwhile.
  void take_over(int threads) {
    const int from = static_cast<int>(*kept[Kept::partition].template data_ptr<int64_t>());
    if (from == threads) return;
    const auto move = [&](Kept which, int64_t gates) {
      if (kept[which].numel() == 0) return;
      const Tensor old = kept[which];
      kept[which] = call.scratch(old.sizes());
      repartition(old.data_ptr<T>(), get(which), S, gates, H, from, threads);
    };
    move(Kept::y, G);
    move(Kept::cell_y, 1);
    if (norm.kind == Kind::online) {  // other norms keep one value for all units of a gate
      move(Kept::rstd, G);
      move(Kept::cell_rstd, 1);
    }
  }

  // Copy a thread's columns of a tensor [N, *], and write them back.
  std::vector<T> own_columns(const Tensor& tensor, Range columns) const {
    std::vector<T> own;
    for (int64_t n = 0; n < N && tensor.numel() > 0; ++n) {
      const T* row = tensor.data_ptr<T>() + n * tensor.size(1);
      own.insert(own.end(), row + columns.begin, row + columns.end);
    }
    return own;
  }

  void give_back(const std::vector<T>& own, const Tensor& tensor, Range columns) const {
    for (int64_t n = 0; n < N && tensor.numel() > 0; ++n)
      std::copy_n(own.data() + n * columns.size(), columns.size(), tensor.data_ptr<T>() + n * tensor.size(1) + columns.begin);
  }

  // dh [count, columns]: the sum of the gradients from later steps and from y.
  void gradient_of_output(const Step& step, Range columns, const std::vector<T>& later, std::vector<T>& dh) const {
    const T* dy = pointer<T>(grad_y);
    const int64_t p = columns.size();
    for (int64_t i = 0; i < step.count; ++i) {
      const int64_t s = step.first + i;
      const T* from = later.data() + walk.row[s] * p;
      for (int64_t j = 0; j < p; ++j) dh[i * p + j] = from[j] + (dy != nullptr ? dy[s * P + columns.begin + j] : T(0));
    }
  }

  // Split the gradient of a state after zoneout: the old state's part is written to `past`, the new one's remains in `rows`.
  template <typename Row>
  void split_zoneout(const Step& step, Range columns, const Tensor& stays, std::vector<T>& past, const Row& rows) const {
    if (!stays.defined()) return;
    const int64_t n = columns.size(), width = stays.size(-1);
    this->with_values(stays, [&]<typename V>(const V* shares) {
      for (int64_t i = 0; i < step.count; ++i) {
        const V* __restrict share = shares + (step.first + i) * width + columns.begin;
        T* __restrict gradient = rows(i);
        T* __restrict kept_back = past.data() + i * n;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          kept_back[j] = T(share[j]) * gradient[j];
          gradient[j] = (1 - T(share[j])) * gradient[j];
        }
      }
    });
  }

  // Write the gradient of h before the step to its rows: the sum of those through the product, through the step itself
  // (`direct`) and past it by zoneout (`past`).
  void finish_h(const Step& step, Range outputs, const std::vector<T>& dh, const T* direct, const std::vector<T>& past,
                std::vector<T>& later) const {
    const int64_t p = outputs.size();
    const T *mask = get(Operand::recurrent_mask), *zeros = this->zeros.data();
    for (int64_t i = 0; i < step.count; ++i) {
      const int64_t n = walk.row[step.first + i];
      T* __restrict to = later.data() + n * p;
      if (walk.before[step.first + i] == Walk::zero) {
        std::fill_n(to, p, T(0));
        continue;
      }
      const T* __restrict through = &dh[i * p];
      const T* __restrict factor = mask == nullptr ? this->ones.data() : mask + n * P + outputs.begin;
      const T* __restrict own = direct == nullptr ? zeros : direct + i * p;
      const T* __restrict by = past.empty() ? zeros : &past[i * p];
#pragma omp simd
      for (int64_t j = 0; j < p; ++j) to[j] = through[j] * factor[j] + own[j] + by[j];
    }
  }

  // The same for c, whose gradient through the step is in `carried` already.
  void finish_c(const Step& step, int64_t u, const std::vector<T>& past, std::vector<T>& carried) const {
    if (past.empty() && !call.has(Operand::reset)) return;
    for (int64_t i = 0; i < step.count; ++i) {
      T* __restrict to = carried.data() + walk.row[step.first + i] * u;
      if (walk.before[step.first + i] == Walk::zero) {
        std::fill_n(to, u, T(0));
      } else if (!past.empty()) {
#pragma omp simd
        for (int64_t j = 0; j < u; ++j) to[j] += past[i * u + j];
      }
    }
  }

  // The channel of column k of a thread's block.
  int64_t channel(int thread, int threads, int64_t k) const {
    const Range units = part_of(H, thread, threads);
    return k / units.size() * H + units.begin + k % units.size();
  }

  // Copy a step's gradients of pre-activations to `block` [S, G * units], unless they are there, and add them to `sums`
  // [G, units], the gradients of a bias.
  template <Kind kind>
  void store(const BackwardStep<T, kind>& at, const Matrix<T>& block, T* sums) const {
    const int64_t width = block.width();
    for (int64_t i = 0; i < at.count(); ++i) {
      const T* from = at.d.at(i, 0);
      const int64_t s = at.step.first + i;
      if (block.values() == nullptr || from != block.values() + s * width) block.write(s, 0, from, width);
      if (sums == nullptr) continue;
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) sums[k] += from[k];
    }
  }

  // grad_x: this thread's share of the samples times the input weights.
  void multiply_inputs(int id, int threads) {
    const Slices slices(I);
    const Range share = part_of(S, id, threads);
    const T* weight = get(Operand::weight_ih);
    const Array<T> packed(block_depth * Slices::widest);
    bool add = false;
    for (int t = 0; t < threads; ++t)
      for (int64_t k = 0; k < grad_input_part[t].width(); k += block_depth, add = true) {
        const int64_t depth = std::min(block_depth, grad_input_part[t].width() - k);
        for (int64_t slice = 0; slice < slices.count(); ++slice) {
          const int64_t column = slices.begin(slice), width = slices.width(slice);
          pack(gemm, depth, width, packed.data(),
               [&](int64_t i) { return weight + channel(t, threads, k + i) * I + column; });
          for (int64_t s = share.begin; s < share.end; s += block_rows)
            gemm(std::min(block_rows, share.end - s), width, gemm.depth(depth), grad_input_part[t].left(s).at(0, k),
                 packed.data(), grad_x.data_ptr<T>() + s * I + column, I, add);
        }
      }
  }

  struct Product {
    std::vector<Left<T>> right;  // [S] rows
    int64_t K;                   // their width
    Tensor& gradient;            // [*, K]
  };

  // Columns of a left operand that give neighbouring rows of a gradient.
  struct Columns {
    int64_t begin, count, row;
  };

  // For each product: rows of gradient = left' [., S] right [S, K], for these columns of `left`, of which there are `width`.
  void multiply_transposed(const Left<T>& left, int64_t width, const std::vector<Columns>& all,
                           const std::vector<Product>& products) {
    const int64_t blocks = (S + block_depth - 1) / block_depth, tall = gemm.depth((S + blocks - 1) / blocks);
    const Matrix<T> turned(gemm, width, tall);
    const Array<T> packed(tall * Slices::widest);
    for (int64_t s = 0; s < S; s += tall) {
      const int64_t depth = std::min(tall, S - s);
      turned.write_transposed(left.at(s, 0), depth);
      for (const Product& product : products) {
        const int64_t K = product.K;
        const Slices slices(K);
        for (int64_t slice = 0; slice < slices.count(); ++slice) {
          const int64_t k = slices.begin(slice);
          pack(gemm, depth, slices.width(slice), packed.data(), product.right.data() + s, k);
          for (const Columns& columns : all)
            for (int64_t c = 0; c < columns.count; c += block_rows)
              gemm(std::min(block_rows, columns.count - c), slices.width(slice), gemm.depth(depth),
                   turned.left(columns.begin + c), packed.data(),
                   product.gradient.template data_ptr<T>() + (columns.row + c) * K + k, K, s > 0);
        }
      }
    }
  }

  // The gradients of this thread's rows of the weights.
  void multiply_weights(int id, int threads) {
    const Range units = part_of(H, id, threads), outputs = part_of(P, id, threads);
    Product inputs{std::vector<Left<T>>(S), I, grad_weight_ih}, states{std::vector<Left<T>>(S), P, grad_weight_hh};
    for (int64_t s = 0; s < S; ++s) {
      inputs.right[s] = this->samples.left(s);
      states.right[s] = entered.defined() ? entered.left(s) : Left<T>{h.before(s), nullptr, P};
    }
    std::vector<Columns> gates;
    for (int64_t g = 0; g < G; ++g) gates.push_back({g * units.size(), units.size(), g * H + units.begin});
    const auto multiply = [&](const Matrix<T>& block, const std::vector<Product>& products) {
      multiply_transposed(block.left(), block.width(), gates, products);
    };
    if (call.cell.apart) {
      multiply(grad_input_part[id], {inputs});
      multiply(grad_hidden_part[id], {states});
    } else {
      multiply(grad_input_part[id], {inputs, states});
    }
    if (!projected.defined()) return;
    Product hidden{std::vector<Left<T>>(S), H, grad_weight_hr};
    for (int64_t s = 0; s < S; ++s) hidden.right[s] = projected.left(s);
    multiply_transposed(grad_hidden.left().at(0, outputs.begin), outputs.size(), {{0, outputs.size(), outputs.begin}}, {hidden});
  }

  // In the order of rnnorm.ops.call.DIFFERENTIABLE; empty tensors where they do not apply.
  std::vector<Tensor> results() {
    if (need_input && !walk.dense) {
      const Tensor compact = grad_x;
      grad_x = call.zeros({call.T, N, I});
      for (int64_t s = 0; s < S; ++s)
        std::copy_n(compact.data_ptr<T>() + s * I, I, grad_x.template data_ptr<T>() + walk.position[s] * I);
    }
    if (grad_bias_hh.defined() && !call.cell.apart) grad_bias_hh.copy_(grad_bias_ih);
    const auto affine = [&](Operand which, const Tensor& both, int64_t row) {
      return call.has(which) ? both.select(0, row).clone() : Tensor();
    };
    std::vector<Tensor> out{grad_x, grad_h, grad_c, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, grad_weight_hr,
                            affine(Operand::norm_scale, grad_affine, 0), affine(Operand::norm_shift, grad_affine, 1),
                            affine(Operand::cell_norm_scale, grad_cell_affine, 0),
                            affine(Operand::cell_norm_shift, grad_cell_affine, 1)};
    for (Tensor& gradient : out)
      if (!gradient.defined()) gradient = call.empty({0});
    return out;
  }
};

template <typename T>
std::vector<Tensor> backward(const Call& call, const Gradient& grads, const Table<Kept>& kept, bool need_input,
                             bool need_weights) {
  return Backward<T>(call, grads, kept, need_input, need_weights).run();
}

}  // namespace rnnorm
