// A register of values of channels that are neighbours in memory, for loops over samples that keep the states in registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "math.h"

namespace rnnorm {

template <typename T>
struct LanesOf {
#if defined(__AVX512F__)
  static constexpr int64_t bytes = 64;
#elif defined(__AVX__)
  static constexpr int64_t bytes = 32;
#else
  static constexpr int64_t bytes = 16;
#endif
  static constexpr int64_t count = bytes / sizeof(T);
  typedef T type __attribute__((vector_size(bytes)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;

// The first `count` lanes from memory; the others are 1. `whole`: all of them. (By way of arrays: lanes that are accessed one by
// one do not stay in a register.)
template <bool whole, typename T, typename X>
RNNORM_INLINE Lanes<T> load(const X* from, int64_t count) {
  constexpr int64_t lanes = LanesOf<T>::count;
  T values[lanes];
  if constexpr (!whole) std::fill_n(values, lanes, T(1));
  for (int64_t j = 0; j < (whole ? lanes : count); ++j) values[j] = static_cast<T>(from[j]);
  Lanes<T> out;
  std::memcpy(&out, values, sizeof(out));
  return out;
}

template <bool whole, typename T, typename X>
RNNORM_INLINE void store(Lanes<T> from, X* to, int64_t count) {
  constexpr int64_t lanes = LanesOf<T>::count;
  T values[lanes];
  std::memcpy(values, &from, sizeof(from));
  for (int64_t j = 0; j < (whole ? lanes : count); ++j) to[j] = static_cast<X>(values[j]);
}

template <typename T>
RNNORM_INLINE T inverse_sqrt(T x) { return 1 / std::sqrt(x); }

template <typename T>
RNNORM_INLINE Lanes<T> inverse_sqrt_of_each(Lanes<T> x) {
  T values[LanesOf<T>::count];
  store<true, T>(x, values, 0);
  for (T& value : values) value = 1 / std::sqrt(value);
  return load<true, T>(values, 0);
}

RNNORM_INLINE Lanes<double> inverse_sqrt(Lanes<double> x) { return inverse_sqrt_of_each<double>(x); }

// A division and a square root take longer than all else that is done with a value; an estimate of 14 bits and a step of
// Newton's method are as precise as the float32 of it.
RNNORM_INLINE Lanes<float> inverse_sqrt(Lanes<float> x) {
#if defined(__AVX512F__)
  // Masked by ones: g++ 12 warns of the other form.
  const Lanes<float> y = (Lanes<float>)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)x), better = y + y * (0.5f - 0.5f * x * y * y);
  return better == better ? better : y;  // of 0 and infinity
#else
  return inverse_sqrt_of_each<float>(x);
#endif
}

}  // namespace rnnorm
