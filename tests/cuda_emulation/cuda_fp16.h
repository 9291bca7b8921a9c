// float16 for cuda_runtime.h's emulation.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float size = exponent == 0 ? ldexpf(static_cast<float>(fraction), -24)
                             : ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
  if (exponent == 31) size = fraction == 0 ? INFINITY : NAN;
  return (x.bits & 0x8000) != 0 ? -size : size;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  const float size = fabsf(x);
  if (x != x) return {0x7fff};
  if (size == 0.0f) return {sign};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  frexpf(size, &exponent);                                     // size in [2^(exponent - 1), 2^exponent)
  const int step = exponent - 11 > -24 ? exponent - 11 : -24;  // of the last place
  // Rounds to even. One more in the last place may carry into the exponent, as it should.
  const int places = static_cast<int>(nearbyintf(ldexpf(size, -step)));
  return {static_cast<uint16_t>(sign | (places + (step + 24) * 1024))};
}

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
