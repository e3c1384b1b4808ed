// Sixteen lanes in the vector types of GCC and Clang: one source becomes a zmm, two ymm or four NEON registers, depending
// on the flags of the file that includes it.
//
// Everything here, as in every header that the isa_*.cpp files share, has internal linkage: were one copy of a function
// shared, the linker could choose the one that was compiled for a newer processor than the one at hand.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t s32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

enum class Dtype : int { f32 = 0, bf16 = 1 };

constexpr int64_t LANES = 16;

template <class V>
inline V load(const void* source) {
  V v;
  __builtin_memcpy(&v, source, sizeof(V));
  return v;
}

template <class V>
inline void store(void* target, V v) {
  __builtin_memcpy(target, &v, sizeof(V));
}

inline f32x16 splat(float value) { return f32x16{} + value; }
inline s32x16 splat(int32_t value) { return s32x16{} + value; }

// The second operand where either is NaN.
#ifdef __AVX512F__
// GCC 12 makes a comparison and a masked move of the expressions below.
inline f32x16 minimum(f32x16 a, f32x16 b) {
  asm("vminps %1, %0, %0" : "+v"(a) : "v"(b));
  return a;
}
inline f32x16 maximum(f32x16 a, f32x16 b) {
  asm("vmaxps %1, %0, %0" : "+v"(a) : "v"(b));
  return a;
}
#else
inline f32x16 minimum(f32x16 a, f32x16 b) { return a < b ? a : b; }
inline f32x16 maximum(f32x16 a, f32x16 b) { return a > b ? a : b; }
#endif
inline f32x16 absolute(f32x16 v) { return (f32x16)((u32x16)v & 0x7fffffffu); }

// Halve until one lane is left: f is applied to lanes 8 apart, then 4, 2, 1.
template <class V, class F>
inline auto reduce(V v, F f) {
  v = f(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = f(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = f(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = f(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return v[0];
}

inline float largest(f32x16 v) { return reduce(v, [](f32x16 a, f32x16 b) { return maximum(a, b); }); }
inline float smallest(f32x16 v) { return -largest(-v); }
inline float sum(f32x16 v) { return reduce(v, [](f32x16 a, f32x16 b) { return a + b; }); }
inline int32_t sum(s32x16 v) { return reduce(v, [](s32x16 a, s32x16 b) { return a + b; }); }

// Round half to even for |v| < 2^22: adding 1.5 * 2^23 leaves no fraction bits, and the sum's own bits hold the integer.
constexpr float ROUNDER = 12582912.0f;
constexpr int32_t ROUNDER_BITS = 0x4b400000;

template <Dtype D>
inline f32x16 load_float(const void* source, int64_t index) {
  if constexpr (D == Dtype::f32) {
    return load<f32x16>((const float*)source + index);
  } else {
    auto bits = __builtin_convertvector(load<u16x16>((const uint16_t*)source + index), u32x16);
    return (f32x16)(bits << 16);
  }
}

// Round to nearest even, as torch does; NaN stays NaN.
inline u16x16 to_bf16(f32x16 v) {
  const u32x16 bits = (u32x16)v, even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v == v ? even : (u32x16{} + 0x7fc0u), u16x16);
}

// 1 / v to the last bit or two.
#ifdef __AVX512F__
inline f32x16 reciprocal(f32x16 v) {
  f32x16 r;
  asm("vrcp14ps %1, %0" : "=v"(r) : "v"(v));
  return r * (2.0f - v * r);  // one step of Newton's method: from 14 to 28 bits
}
#else
inline f32x16 reciprocal(f32x16 v) { return 1.0f / v; }
#endif

template <Dtype D>
inline void store_float(void* target, int64_t index, f32x16 v) {
  if constexpr (D == Dtype::f32) {
    store((float*)target + index, v);
  } else {
    store((uint16_t*)target + index, to_bf16(v));
  }
}

template <Dtype D>
constexpr int64_t dtype_size = D == Dtype::f32 ? 4 : 2;

// The last, incomplete vector of a row: `count` < 16 elements, the rest zero.
template <Dtype D>
inline f32x16 load_partial(const void* source, int64_t index, int64_t count) {
  alignas(64) uint8_t buffer[LANES * dtype_size<D>] = {};
  __builtin_memcpy(buffer, (const uint8_t*)source + index * dtype_size<D>, size_t(count * dtype_size<D>));
  return load_float<D>(buffer, 0);
}

template <Dtype D>
inline void store_partial(void* target, int64_t index, f32x16 v, int64_t count) {
  alignas(64) uint8_t buffer[LANES * dtype_size<D>];
  store_float<D>(buffer, 0, v);
  __builtin_memcpy((uint8_t*)target + index * dtype_size<D>, buffer, size_t(count * dtype_size<D>));
}

// e^v for v <= 88, 0 below -87: 2^n by exponent bits times a polynomial on [-ln2/2, ln2/2]; relative error below 2e-7
// (tests/kernels/test_elementwise.py).
inline f32x16 exponential(f32x16 v) {
  v = maximum(v, splat(-87.0f));
  v = minimum(v, splat(88.0f));
  const f32x16 raised = v * 1.44269504f + ROUNDER, n = raised - ROUNDER;
  f32x16 r = v - n * 0.693359375f + n * 2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (f32x16)(((s32x16)raised - (ROUNDER_BITS - 127)) << 23);
}

// GELU in its tanh form, the activation of Wan's and CogVideoX's feed-forward: v / (1 + e^-2u), u = sqrt(2/pi) (v + .044715 v^3).
inline f32x16 gelu_tanh(f32x16 v) {
  f32x16 u = v * (1.5957691216f + 0.0713548162726f * v * v);
  return v * reciprocal(1.0f + exponential(-u));
}

}  // namespace
