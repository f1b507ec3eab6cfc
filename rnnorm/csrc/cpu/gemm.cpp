#include "gemm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

#include <exception>

namespace rnnorm {

bool micro_kernel_works() {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  static const bool works = [] {
    try {
      const float a[16 * 16] = {}, b[16 * 16] = {};
      float c[16 * 16];
      at::native::cpublas::brgemm(16, 16, 16, 16, 16, 16, false, a, b, c, false);
      at::native::cpublas::brgemm_release(false);
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }();
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
