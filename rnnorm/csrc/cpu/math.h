// Nonlinearities in plain arithmetic that a compiler turns into vectors, for float; the standard library's for double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// A call would keep the loop around it from becoming vectors.
#define RNNORM_INLINE inline __attribute__((always_inline))

namespace rnnorm {

// e^x by 2^n * polynomial on [-ln2/2, ln2/2] (Cephes), relative error below 2e-7; saturates instead of overflowing.
RNNORM_INLINE float exponential(float x) {
  x = x < -87.f ? -87.f : x;
  x = x > 88.f ? 88.f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.f;  // rounds x / ln2 to an integer in the low bits
  const float n = shifted - 12582912.f;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + (127 << 23);
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

RNNORM_INLINE float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

RNNORM_INLINE float tangent(float x) {
  // Near 0 an odd polynomial (Cephes) keeps relative precision, where 1 - e^-2x would cancel.
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = p * z * x + x;
  const float size = std::fabs(x);
  const float e = exponential(-2.f * size);
  const float large = std::copysign((1.f - e) / (1.f + e), x);
  return size < 0.625f ? small : large;
}

RNNORM_INLINE double exponential(double x) { return std::exp(x); }
RNNORM_INLINE double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
RNNORM_INLINE double tangent(double x) { return std::tanh(x); }

}  // namespace rnnorm
