// The cells, one header each. A cell is a struct with
//   gates    the number of gates, blocks of H rows of the weights
//   apart    true if another gate multiplies the last gate's recurrent part before it is added to the input part
//   has_c    true if there is a second state c beside h, which cell_norm and a projection need
//   reads_h  true if the step uses h also outside its product with the weights
//   forward(step), backward(step)   the step and its derivative; see step.h
//   recurrent_gradient(step)        if apart: converts the gradient of the last gate's input part to that of its recurrent part
#pragma once

#include "../names.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

// The structs of rnnorm::cells, in the order of rnnorm._cells.CELLS.
#define RNNORM_CELLS(_) _(lstm) _(gru) _(rnn_tanh) _(rnn_relu)

namespace rnnorm {

RNNORM_ENUM(Cell, RNNORM_CELLS)

struct Traits {
  int gates;
  bool apart, has_c, reads_h;
};

#define RNNORM_TRAITS(name) Traits{cells::name::gates, cells::name::apart, cells::name::has_c, cells::name::reads_h},
inline constexpr Traits traits[] = {RNNORM_CELLS(RNNORM_TRAITS)};
#undef RNNORM_TRAITS

// Call `function` with the cell and the norm as template arguments. All branches on them are here.
template <typename Function>
auto choose(Cell cell, Kind kind, const Function& function) {
  const auto with_cell = [&]<typename Chosen>() {
    switch (kind) {
#define RNNORM_CASE(name) \
  case Kind::name: return function.template operator()<Chosen, Kind::name>();
      RNNORM_NORMS(RNNORM_CASE)
#undef RNNORM_CASE
    }
    __builtin_unreachable();
  };
  switch (cell) {
#define RNNORM_CASE(name) \
  case Cell::name: return with_cell.template operator()<cells::name>();
    RNNORM_CELLS(RNNORM_CASE)
#undef RNNORM_CASE
  }
  __builtin_unreachable();
}

}  // namespace rnnorm
