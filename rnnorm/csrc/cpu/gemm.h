// Matrix products of one thread: row-major A [M, K] times packed B, by oneDNN's micro-kernel or by at::addmm.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "pool.h"

namespace rnnorm {

// True if the micro-kernel exists in this torch and can be generated for this processor.
bool micro_kernel_works();

// C [M, N] (+)= A [M, K] B [K, N] by at::addmm.
template <typename T>
void blas(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc, bool add);

template <typename T>
struct Gemm {
  bool micro = false;

  // C [M, N] (+)= A [M, K] B [K, N], leading dimensions in elements.
  void operator()(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc,
                  bool add) const {
    if (M == 0 || N == 0) return;
    if (K == 0) {
      if (!add)
        for (int64_t m = 0; m < M; ++m) std::fill(C + m * ldc, C + m * ldc + N, T(0));
      return;
    }
#if defined(CPUBLAS_BRGEMM_F32F32F32)
    if constexpr (std::is_same_v<T, float>) {
      if (micro) {
        at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, A, B, C, false);
        return;
      }
    }
#endif
    blas(M, N, K, A, lda, B, ldb, C, ldc, add);
  }

  // The micro-kernel may hold a hardware context on this thread.
  void release() const {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
    if (micro) at::native::cpublas::brgemm_release(false);
#endif
  }
};

// The block of one micro-kernel call: eight times seven rows, and a depth in K such that the slice of B, which is read again
// for every seven rows, fits in the L2 cache.
inline constexpr int64_t block_rows = 56, block_depth = 512;

// Columns cut into slices for the micro-kernel: at most four vectors of 16, which leaves registers for seven rows at a time,
// and of nearly equal width, since a narrow remainder would run at a fraction of the speed.
class Slices {
 public:
  static constexpr int64_t widest = 64;

  explicit Slices(int64_t columns) : columns_(columns), vectors_((columns + 15) / 16), count_((vectors_ + 3) / 4) {}

  int64_t count() const { return count_; }
  int64_t begin(int64_t slice) const { return std::min(columns_, vectors_ * slice / count_ * 16); }
  int64_t width(int64_t slice) const { return begin(slice + 1) - begin(slice); }

 private:
  int64_t columns_, vectors_, count_;
};

// Copy `count` rows of `width` values to contiguous memory: from `column` of separate pointers, or with row stride `ld`.
template <typename T>
void copy_rows(const T* const* rows, int64_t column, int64_t count, int64_t width, T* out) {
  for (int64_t k = 0; k < count; ++k) std::copy_n(rows[k] + column, width, out + k * width);
}
template <typename T>
void copy_rows(const T* source, int64_t ld, int64_t count, int64_t width, T* out) {
  for (int64_t k = 0; k < count; ++k) std::copy_n(source + k * ld, width, out + k * width);
}

#if defined(__AVX512F__)
using Lanes = float __attribute__((vector_size(64)));

// Swap the two off-diagonal blocks of 2 x 2 blocks of `step` x `step` values.
template <int step, std::size_t... j>
inline void exchange(Lanes& a, Lanes& b, std::index_sequence<j...>) {
  const Lanes first = __builtin_shufflevector(a, b, (j & step ? 16 + j - step : j)...);
  b = __builtin_shufflevector(a, b, (j & step ? 16 + j : j + step)...);
  a = first;
}

template <int... step>
inline void transpose_lanes(Lanes* rows) {
  const auto stage = [rows]<int s>(std::integral_constant<int, s>) {
    for (int i = 0; i < 16; ++i)
      if (!(i & s)) exchange<s>(rows[i], rows[i + s], std::make_index_sequence<16>());
  };
  (stage(std::integral_constant<int, step>()), ...);
}
#endif

// Transpose one tile of 16 x 16 values by shuffles; returns false if the type or the processor does not support it.
template <typename T>
bool transpose_tile(const T* in, int64_t ld, T* out, int64_t out_ld) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    Lanes rows[16];
    for (int i = 0; i < 16; ++i) std::memcpy(&rows[i], in + i * ld, sizeof(Lanes));
    transpose_lanes<1, 2, 4, 8>(rows);
    for (int i = 0; i < 16; ++i) std::memcpy(out + i * out_ld, &rows[i], sizeof(Lanes));
    return true;
  }
#endif
  return false;
}

// B [K, columns], packed slice by slice.
template <typename T>
class Panels {
 public:
  Panels(int64_t K, int64_t columns) : K_(K), slices_(columns), data_(K * columns) {}

  // Fill columns [first, first + count) with the transpose of `count` rows of `source` (row stride `ld`).
  void pack_rows(int64_t first, int64_t count, const T* source, int64_t ld) {
    constexpr int64_t tile = 16;
    for (int64_t slice = 0; slice < slices_.count(); ++slice) {
      const int64_t start = slices_.begin(slice), w = slices_.width(slice);
      T* out = data_.data() + start * K_ - start;
      const int64_t c_begin = std::max(first, start), c_end = std::min(first + count, start + w);
      for (int64_t c0 = c_begin; c0 < c_end; c0 += tile)
        for (int64_t k0 = 0; k0 < K_; k0 += tile) {
          const bool whole = c0 + tile <= c_end && k0 + tile <= K_;
          if (whole && transpose_tile(source + (c0 - first) * ld + k0, ld, out + k0 * w + c0, w)) continue;
          for (int64_t k = k0; k < std::min(k0 + tile, K_); ++k)
            for (int64_t c = c0; c < std::min(c0 + tile, c_end); ++c) out[k * w + c] = source[(c - first) * ld + k];
        }
    }
  }

  // Fill all columns with those of `source` (row stride `ld`).
  void pack_columns(const T* source, int64_t ld) {
    for (int64_t slice = 0; slice < slices_.count(); ++slice) {
      const int64_t start = slices_.begin(slice), w = slices_.width(slice);
      copy_rows(source + start, ld, K_, w, data_.data() + start * K_);
    }
  }

  // C [M, columns] = A [M, K] B, or += with `add`.
  void multiply(const Gemm<T>& gemm, int64_t M, const T* A, int64_t lda, T* C, int64_t ldc, bool add) const {
    for (int64_t slice = 0; slice < slices_.count(); ++slice) {
      const int64_t start = slices_.begin(slice), w = slices_.width(slice);
      for (int64_t m = 0; m < M; m += block_rows)
        for (int64_t k = 0; k < std::max<int64_t>(K_, 1); k += block_depth)
          gemm(std::min(block_rows, M - m), w, std::min(block_depth, K_ - k), A + m * lda + k, lda,
               data_.data() + start * K_ + k * w, w, C + m * ldc + start, ldc, add || k > 0);
    }
  }

 private:
  int64_t K_;
  Slices slices_;
  Array<T> data_;
};

// `out` [columns, rows] = transpose of `in` [rows, columns] (row stride `ld`).
template <typename T>
void transpose(const T* in, int64_t ld, int64_t rows, int64_t columns, T* out) {
  constexpr int64_t tile = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += tile)
    for (int64_t c0 = 0; c0 < columns; c0 += tile) {
      const bool whole = r0 + tile <= rows && c0 + tile <= columns;
      if (whole && transpose_tile(in + r0 * ld + c0, ld, out + c0 * rows + r0, rows)) continue;
      for (int64_t c = c0; c < std::min(c0 + tile, columns); ++c)
        for (int64_t r = r0; r < std::min(r0 + tile, rows); ++r) out[c * rows + r] = in[r * ld + c];
    }
}

}  // namespace rnnorm
