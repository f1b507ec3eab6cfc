#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

#include <exception>

namespace rnnorm {

#if defined(CPUBLAS_BRGEMM_F32F32F32)
// One small product, of integers, so that every sum is exact: the layout of pairs is not part of torch's documentation.
template <typename Product>
static bool tried() {
  constexpr bool half = std::is_same_v<Product, Half>;
  constexpr int n = 16;
  Product a[n * n], b[n * n];
  float c[n * n];
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < n; ++k) {
      a[i * n + k] = static_cast<float>(i - k);
      b[half ? k / 2 * 2 * n + 2 * i + k % 2 : k * n + i] = static_cast<float>(2 * k - i);
    }
  try {
    at::native::cpublas::brgemm(n, n, n, n, n, n, false, a, b, c, half);
    at::native::cpublas::brgemm_release(half);
  } catch (const std::exception&) {
    return false;
  }
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      int sum = 0;
      for (int k = 0; k < n; ++k) sum += (i - k) * (2 * k - j);
      if (c[i * n + j] != static_cast<float>(sum)) return false;
    }
  return true;
}
#endif

template <>
bool micro_kernel_works<float>() {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  static const bool works = tried<float>();
  return works;
#else
  return false;
#endif
}

template <>
bool micro_kernel_works<Half>() {
// Without the instructions oneDNN emulates them, slower than float32.
#if defined(CPUBLAS_BRGEMM_F32F32F32) && defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(__AVX512BF16__)
  // torch asks its switch at each product, and a program may turn it at any time.
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool works = tried<Half>();
  return works;
#else
  return false;
#endif
}

template <typename T>
void blas(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc, bool add) {
  const at::AutoDispatchBelowAutograd below;
  const auto options = at::TensorOptions(c10::CppTypeToScalarType<T>::value);
  const at::Tensor a = at::from_blob(const_cast<T*>(A), {M, K}, {lda, 1}, options);
  const at::Tensor b = at::from_blob(const_cast<T*>(B), {K, N}, {ldb, 1}, options);
  at::Tensor c = at::from_blob(C, {M, N}, {ldc, 1}, options);
  at::addmm_out(c, c, a, b, add ? 1 : 0, 1);
}

template void blas<float>(int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, bool);
template void blas<double>(int64_t, int64_t, int64_t, const double*, int64_t, const double*, int64_t, double*, int64_t, bool);

}  // namespace rnnorm
