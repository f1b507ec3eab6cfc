// Nonlinearities: plain arithmetic for float, which the compiler vectorizes; the standard library's for double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// A function call in a loop would prevent vectorization.
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

// An odd rational function, minimax up to 7.9, then constant; exactly 1 from 8.67 on, else the derivative would never vanish.
// Relative error a few ulp.
RNNORM_INLINE float tanh(float x) {
  const float limit = std::copysign(1.f, x);
  const bool flat = x * x > 8.67f * 8.67f;
  x = x < -7.9f ? -7.9f : x;
  x = x > 7.9f ? 7.9f : x;
  const float z = x * x;
  float p = -2.76076847742355e-16f;
  p = p * z + 2.00018790482477e-13f;
  p = p * z - 8.60467152213735e-11f;
  p = p * z + 5.12229709037114e-08f;
  p = p * z + 1.48572235717979e-05f;
  p = p * z + 6.37261928875436e-04f;
  p = p * z + 4.89352455891786e-03f;
  float q = 1.19825839466702e-06f;
  q = q * z + 1.18534705686654e-04f;
  q = q * z + 2.26843463243900e-03f;
  q = q * z + 4.89352518554385e-03f;
  return flat ? limit : x * p / q;
}

RNNORM_INLINE double exponential(double x) { return std::exp(x); }
RNNORM_INLINE double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
RNNORM_INLINE double tanh(double x) { return std::tanh(x); }

}  // namespace rnnorm
