// Matrix products of one thread: row-major A [M, K] times packed B, by oneDNN's micro-kernel or by at::addmm.
// With `half`, products run in bfloat16 with sums in float32: operands are rounded when they are packed or written to a Matrix,
// and an odd depth K is padded with a zero, since the micro-kernel multiplies pairs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "pool.h"

namespace rnnorm {

using Half = at::BFloat16;

// True if the micro-kernel for products of that type exists in this torch and for this processor.
template <typename Product>
bool micro_kernel_works();

// C [M, N] (+)= A [M, K] B [K, N] by at::addmm.
template <typename T>
void blas(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc, bool add);

// The bits of a value rounded to bfloat16, to nearest, ties to even.
inline uint16_t half_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return value != value ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t half_bits(double value) { return half_bits(static_cast<float>(value)); }
inline uint16_t half_bits(Half value) { return value.x; }

template <typename From>
inline void round_to_half(const From* __restrict from, int64_t count, Half* __restrict to) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j].x = half_bits(from[j]);
}

// The left operand of a product, from some row and column on: of T, or with `half` of bfloat16.
template <typename T>
struct Left {
  const T* values;
  const Half* halves;
  int64_t ld;

  Left at(int64_t row, int64_t column) const {
    const int64_t offset = row * ld + column;
    return {values == nullptr ? nullptr : values + offset, halves == nullptr ? nullptr : halves + offset, ld};
  }
};

template <typename T>
struct Gemm {
  bool micro = false, half = false;

  // The stored depth of operands.
  int64_t depth(int64_t K) const { return half ? (K + 1) / 2 * 2 : K; }

  // C [M, N] (+)= A [M, K] B [K, N]. B [K, N] is contiguous; with `half` in bfloat16, B[k][n] at [k / 2][n][k % 2]. K is a
  // stored depth.
  void operator()(int64_t M, int64_t N, int64_t K, const Left<T>& A, const T* B, T* C, int64_t ldc, bool add) const {
    if (M == 0 || N == 0) return;
    if (K == 0) {
      if (!add)
        for (int64_t m = 0; m < M; ++m) std::fill(C + m * ldc, C + m * ldc + N, T(0));
      return;
    }
    if constexpr (std::is_same_v<T, float>) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
      if (half) {
        at::native::cpublas::brgemm(M, N, K, A.ld, N, ldc, add, A.halves, reinterpret_cast<const Half*>(B), C, true);
        return;
      }
#endif
#if defined(CPUBLAS_BRGEMM_F32F32F32)
      if (micro) {
        at::native::cpublas::brgemm(M, N, K, A.ld, N, ldc, add, A.values, B, C, false);
        return;
      }
#endif
    }
    blas(M, N, K, A.values, A.ld, B, N, C, ldc, add);
  }

  // The micro-kernel may hold a hardware context on this thread.
  void release() const {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
    if (half || micro) at::native::cpublas::brgemm_release(half);
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

#if defined(__AVX512F__)
using Lanes32 = uint32_t __attribute__((vector_size(64)));
using Lanes16 = uint16_t __attribute__((vector_size(32)));

// Swap the two off-diagonal blocks of 2 x 2 blocks of `step` x `step` values.
template <int step, typename Row, std::size_t... j>
inline void exchange(Row& a, Row& b, std::index_sequence<j...>) {
  const Row first = __builtin_shufflevector(a, b, (j & step ? 16 + j - step : j)...);
  b = __builtin_shufflevector(a, b, (j & step ? 16 + j : j + step)...);
  a = first;
}

template <int... step, typename Row>
inline void transpose_lanes(Row* rows) {
  const auto stage = [rows]<int s>(std::integral_constant<int, s>) {
    for (int i = 0; i < 16; ++i)
      if (!(i & s)) exchange<s>(rows[i], rows[i + s], std::make_index_sequence<16>());
  };
  (stage(std::integral_constant<int, step>()), ...);
}
#endif

// Transpose one tile of 16 x 16 values by shuffles; returns false if the type or the processor does not support it.
template <typename V>
bool transpose_tile(const V* in, int64_t ld, V* out, int64_t out_ld) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 4 || sizeof(V) == 2) {
    std::conditional_t<sizeof(V) == 4, Lanes32, Lanes16> rows[16];
    for (int i = 0; i < 16; ++i) std::memcpy(&rows[i], in + i * ld, sizeof(rows[i]));
    transpose_lanes<1, 2, 4, 8>(rows);
    for (int i = 0; i < 16; ++i) std::memcpy(out + i * out_ld, &rows[i], sizeof(rows[i]));
    return true;
  }
#endif
  return false;
}

// `out` [columns, rows] (row stride `out_ld`) = transpose of `in` [rows, columns] (row stride `ld`).
template <typename V>
void transpose(const V* in, int64_t ld, int64_t rows, int64_t columns, V* out, int64_t out_ld) {
  constexpr int64_t tile = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += tile)
    for (int64_t c0 = 0; c0 < columns; c0 += tile) {
      const bool whole = r0 + tile <= rows && c0 + tile <= columns;
      if (whole && transpose_tile(in + r0 * ld + c0, ld, out + c0 * out_ld + r0, out_ld)) continue;
      for (int64_t c = c0; c < std::min(c0 + tile, columns); ++c)
        for (int64_t r = r0; r < std::min(r0 + tile, rows); ++r) std::memcpy(out + c * out_ld + r, in + r * ld + c, sizeof(V));
    }
}

// Left operands of products with the same rows, [rows, width]: of T, or with `half` of bfloat16 in rows of the stored depth.
template <typename T>
class Matrix {
 public:
  Matrix() = default;
  Matrix(const Gemm<T>& gemm, int64_t rows, int64_t width)
      : half_(gemm.half), rows_(rows), width_(width), ld_(gemm.depth(width)),
        data_(pooled({rows, ld_}, half_ ? at::kBFloat16 : c10::CppTypeToScalarType<T>::value)) {
    for (int64_t r = 0; ld_ > width && r < rows; ++r) halves()[r * ld_ + width] = Half(0.0F);
  }
  // The values of a contiguous tensor of T, or with `half` of bfloat16 and of even width, in place.
  Matrix(const Gemm<T>& gemm, const at::Tensor& values)
      : half_(gemm.half), rows_(values.size(0)), width_(values.size(1)), ld_(width_), data_(values) {}

  bool defined() const { return data_.defined(); }
  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }
  // The values [rows, width] to be written in place; null if they are stored in bfloat16.
  T* values() const { return half_ ? nullptr : data_.template data_ptr<T>(); }

  template <typename From>
  void write(int64_t row, int64_t column, const From* from, int64_t count) const {
    if (half_) round_to_half(from, count, halves() + row * ld_ + column);
    else std::copy_n(from, count, data_.template data_ptr<T>() + row * ld_ + column);
  }

  // Write the transpose of `from` [rows, rows of this].
  void write_transposed(const Left<T>& from, int64_t rows) const {
    if (!half_) return transpose(from.values, from.ld, rows, rows_, data_.template data_ptr<T>(), ld_);
    transpose(from.halves, from.ld, rows, rows_, halves(), ld_);
    for (int64_t r = 0; rows % 2 != 0 && r < rows_; ++r) halves()[r * ld_ + rows] = Half(0.0F);
  }

  Left<T> left(int64_t row = 0) const {
    return Left<T>{half_ ? nullptr : data_.template data_ptr<T>(), half_ ? halves() : nullptr, ld_}.at(row, 0);
  }

 private:
  Half* halves() const { return data_.template data_ptr<Half>(); }

  bool half_ = false;
  int64_t rows_ = 0, width_ = 0, ld_ = 0;
  at::Tensor data_;
};

// Pack rows k0 and k0 + 1 of B, or only the first if `second` is null, as pairs of bfloat16.
template <typename From>
inline void pack_pair(const From* __restrict first, const From* __restrict second, int64_t width, uint32_t* __restrict out) {
  if (second == nullptr) {
    for (int64_t j = 0; j < width; ++j) out[j] = half_bits(first[j]);
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) out[j] = half_bits(first[j]) | static_cast<uint32_t>(half_bits(second[j])) << 16;
}

// Pack B [count, width] to `out`, as Gemm reads it; `row(k)` is a pointer to its k-th row, of T or of Half.
template <typename T, typename Row>
void pack(const Gemm<T>& gemm, int64_t count, int64_t width, T* out, const Row& row) {
  if (!gemm.half) {
    if constexpr (!std::is_same_v<decltype(row(0)), const Half*>)
      for (int64_t k = 0; k < count; ++k) std::copy_n(row(k), width, out + k * width);
    return;
  }
  uint32_t* pairs = reinterpret_cast<uint32_t*>(out);
  for (int64_t k = 0; k < count; k += 2)
    pack_pair(row(k), k + 1 < count ? row(k + 1) : nullptr, width, pairs + k / 2 * width);
}

// The same for rows of other products' left operands, from `column` on.
template <typename T>
void pack(const Gemm<T>& gemm, int64_t count, int64_t width, T* out, const Left<T>* rows, int64_t column) {
  if (gemm.half) pack(gemm, count, width, out, [&](int64_t k) { return rows[k].halves + column; });
  else pack(gemm, count, width, out, [&](int64_t k) { return rows[k].values + column; });
}

// B [K, columns], packed slice by slice.
template <typename T>
class Panels {
 public:
  Panels(const Gemm<T>& gemm, int64_t K, int64_t columns)
      : gemm_(gemm), K_(K), depth_(gemm.depth(K)), slices_(columns), data_(depth_ * columns) {}

  // Fill columns [first, first + count) with the transpose of `count` rows of `source` (row stride `ld`).
  void pack_rows(int64_t first, int64_t count, const T* source, int64_t ld) {
    for (int64_t slice = 0; slice < slices_.count(); ++slice) {
      const int64_t start = slices_.begin(slice), w = slices_.width(slice);
      const int64_t begin = std::max(first, start), end = std::min(first + count, start + w);
      if (begin >= end) continue;
      const T* rows = source + (begin - first) * ld;
      if (gemm_.half) pack_row_pairs(rows, ld, end - begin, this->slice(slice), begin - start, w);
      else transpose(rows, ld, end - begin, K_, this->slice(slice) + begin - start, w);
    }
  }

  // Fill all columns; `row(k)` is a pointer to the k-th row.
  template <typename Row>
  void pack_columns(const Row& row) {
    for (int64_t slice = 0; slice < slices_.count(); ++slice) {
      const int64_t start = slices_.begin(slice);
      pack(gemm_, K_, slices_.width(slice), this->slice(slice), [&](int64_t k) { return row(k) + start; });
    }
  }

  // C [M, columns] = A [M, K] B, or += with `add`.
  void multiply(int64_t M, const Left<T>& A, T* C, int64_t ldc, bool add) const {
    for (int64_t slice = 0; slice < slices_.count(); ++slice) {
      const int64_t start = slices_.begin(slice), w = slices_.width(slice);
      for (int64_t m = 0; m < M; m += block_rows)
        for (int64_t k = 0; k < std::max<int64_t>(depth_, 1); k += block_depth)
          gemm_(std::min(block_rows, M - m), w, std::min(block_depth, depth_ - k), A.at(m, k), packed(slice, k),
                C + m * ldc + start, ldc, add || k > 0);
    }
  }

 private:
  // Rows of bfloat16 hold pairs for one column each, so pairs are transposed as values of 4 bytes.
  void pack_row_pairs(const T* rows, int64_t ld, int64_t count, T* out, int64_t column, int64_t w) {
    constexpr int64_t tile = 16;
    uint32_t pairs[tile * tile];
    uint32_t* to = reinterpret_cast<uint32_t*>(out) + column;
    for (int64_t c = 0; c < count; c += tile)
      for (int64_t p = 0; p < depth_ / 2; p += tile) {
        const int64_t height = std::min(tile, count - c), width = std::min(tile, depth_ / 2 - p);
        for (int64_t i = 0; i < height; ++i) {
          Half row[2 * tile] = {};
          round_to_half(rows + (c + i) * ld + 2 * p, std::min(2 * tile, K_ - 2 * p), row);
          std::memcpy(pairs + i * tile, row, sizeof(row));
        }
        transpose(pairs, tile, height, width, to + p * w + c, w);
      }
  }

  T* slice(int64_t index) const { return data_.data() + slices_.begin(index) * depth_ / ratio(); }
  const T* packed(int64_t index, int64_t k) const { return slice(index) + k * slices_.width(index) / ratio(); }
  // Values of bfloat16 in one of T; a depth of them is even.
  int64_t ratio() const { return gemm_.half ? sizeof(T) / sizeof(Half) : 1; }

  Gemm<T> gemm_;
  int64_t K_, depth_;
  Slices slices_;
  Array<T> data_;
};

}  // namespace rnnorm
