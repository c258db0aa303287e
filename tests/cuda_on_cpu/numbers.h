// bfloat16 and half precision, to and from float, rounded to the nearest and then to even, as cvt.rn does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cuda_on_cpu {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float from_bf16(uint16_t x) { return float_of(uint32_t(x) << 16); }

inline uint16_t to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = bits_of(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Half precision: 1 sign, 5 exponent (15 is 2^0), 10 fraction.
inline float from_fp16(uint16_t x) {
  const uint32_t sign = uint32_t(x >> 15) << 31, exponent = x >> 10 & 31, fraction = x & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  return std::copysign(float(fraction) * 0x1p-24f, float_of(sign));  // subnormal
}

inline uint16_t to_fp16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = bits_of(x), sign = bits >> 31 << 15, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000) return sign | 0x7c00;                                           // 65536: infinite
  if (magnitude < 0x38800000) return sign | uint32_t(std::nearbyint(std::fabs(x) * 0x1p24f));  // subnormal
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | ((rounded - 0x38000000) >> 13);  // a carry reaches the exponent, and infinity, as it should
}

}  // namespace cuda_on_cpu
