// bfloat16 for cuda_runtime.h's emulation.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __int_as_float(static_cast<int32_t>(uint32_t{x.bits} << 16)); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = static_cast<uint32_t>(__float_as_int(x));
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
