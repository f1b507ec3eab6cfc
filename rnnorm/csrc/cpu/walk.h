// The order of a padded batch: the active rows of each step, and the positions of their samples.
// Samples are numbered s = 0..S-1 without padding, by step and then by row, so s = t*N + n in a dense batch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace rnnorm {

struct Step {
  int64_t first, count;  // samples first .. first + count - 1
};

struct Walk {
  int64_t T, N, S = 0;
  bool dense;
  std::vector<Step> steps;           // in processing order
  std::vector<int64_t> row;          // [S] the sequence of a sample
  std::vector<int64_t> position;     // [S] t*N + n in the padded arrays
  std::vector<int64_t> before;       // [S] the previously processed sample of the same sequence, or one of:
  static constexpr int64_t initial = -1, zero = -2;
  std::vector<int64_t> last;         // [N] the last processed sample of each sequence

  Walk(int64_t T, int64_t N, const int64_t* lengths, const bool* reset, bool reverse)
      : T(T), N(N), dense(true), last(N, initial) {
    if (lengths != nullptr)
      for (int64_t n = 0; n < N; ++n) {
        if (lengths[n] < 1 || lengths[n] > T)
          throw std::invalid_argument("rnnorm: lengths must lie in 1..T = 1.." + std::to_string(T) + "; got " +
                                      std::to_string(lengths[n]));
        dense = dense && lengths[n] == T;
      }
    row.reserve(T * N);
    position.reserve(T * N);
    std::vector<Step> ascending;
    for (int64_t t = 0; t < T; ++t) {
      const int64_t first = S;
      for (int64_t n = 0; n < N; ++n)
        if (lengths == nullptr || t < lengths[n]) {
          row.push_back(n);
          position.push_back(t * N + n);
          ++S;
        }
      ascending.push_back({first, S - first});
    }
    before.assign(S, initial);
    for (int64_t k = 0; k < T; ++k) {
      const Step step = ascending[reverse ? T - 1 - k : k];
      steps.push_back(step);
      for (int64_t s = step.first; s < step.first + step.count; ++s) {
        before[s] = reset != nullptr && reset[position[s]] ? zero : last[row[s]];
        last[row[s]] = s;
      }
    }
  }
};

}  // namespace rnnorm
