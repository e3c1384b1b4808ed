// Vectors of GCC and Clang: one source becomes zmm, ymm, xmm or NEON registers, depending on the flags of the file that includes
// it. Always of the width of one register: GCC takes wider ones apart through memory (a token quantizer of 64-byte vectors ran
// at a third of its speed on AVX2, LOG.md).
//
// Everything here, as in every header that the files of isa/ share, has internal linkage: were one copy of a function
// shared, the linker could choose the one that was compiled for a newer processor than the one at hand.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
#define QVGEN_LANES 16
#elif defined(__AVX2__)
#define QVGEN_LANES 8
#else
#define QVGEN_LANES 4
#endif
constexpr int64_t LANES = QVGEN_LANES;  // of 32 bits; a register holds so many

typedef float f32v __attribute__((vector_size(LANES * 4)));
typedef int32_t s32v __attribute__((vector_size(LANES * 4)));
typedef uint32_t u32v __attribute__((vector_size(LANES * 4)));
typedef uint64_t u64v __attribute__((vector_size(LANES * 4)));  // half as many lanes
typedef uint16_t u16v __attribute__((vector_size(LANES * 2)));
typedef uint8_t u8v __attribute__((vector_size(LANES)));

enum class Dtype : int { f32 = 0, bf16 = 1 };

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

inline f32v splat(float value) { return f32v{} + value; }
inline s32v splat(int32_t value) { return s32v{} + value; }

// The second operand where either is NaN.
#ifdef __AVX512F__
// GCC 12 makes a comparison and a masked move of the expressions below.
inline f32v minimum(f32v a, f32v b) {
  asm("vminps %1, %0, %0" : "+v"(a) : "v"(b));
  return a;
}
inline f32v maximum(f32v a, f32v b) {
  asm("vmaxps %1, %0, %0" : "+v"(a) : "v"(b));
  return a;
}
#else
inline f32v minimum(f32v a, f32v b) { return a < b ? a : b; }
inline f32v maximum(f32v a, f32v b) { return a > b ? a : b; }
#endif
inline f32v absolute(f32v v) { return (f32v)((u32v)v & 0x7fffffffu); }

#ifdef __clang__
#define QVGEN_SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define QVGEN_SHUFFLE(v, ...) __builtin_shuffle(v, s32v{__VA_ARGS__})
#endif

// Halve until one lane is left: f is applied to lanes 8 apart, then 4, 2, 1.
template <class V, class F>
inline auto reduce(V v, F f) {
#if QVGEN_LANES == 16
  v = f(v, QVGEN_SHUFFLE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = f(v, QVGEN_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = f(v, QVGEN_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = f(v, QVGEN_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#else
#if QVGEN_LANES == 8
  v = f(v, QVGEN_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = f(v, QVGEN_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5));
  v = f(v, QVGEN_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
  v = f(v, QVGEN_SHUFFLE(v, 2, 3, 0, 1));
  v = f(v, QVGEN_SHUFFLE(v, 1, 0, 3, 2));
#endif
#endif
  return v[0];
}

inline float largest(f32v v) { return reduce(v, [](f32v a, f32v b) { return maximum(a, b); }); }
inline float smallest(f32v v) { return -largest(-v); }
inline float sum(f32v v) { return reduce(v, [](f32v a, f32v b) { return a + b; }); }
inline int32_t sum(s32v v) { return reduce(v, [](s32v a, s32v b) { return a + b; }); }

// Round half to even for |v| < 2^22: adding 1.5 * 2^23 leaves no fraction bits, and the sum's own bits hold the integer.
constexpr float ROUNDER = 12582912.0f;
constexpr int32_t ROUNDER_BITS = 0x4b400000;

template <Dtype D>
inline f32v load_float(const void* source, int64_t index) {
  if constexpr (D == Dtype::f32) {
    return load<f32v>((const float*)source + index);
  } else {
    auto bits = __builtin_convertvector(load<u16v>((const uint16_t*)source + index), u32v);
    return (f32v)(bits << 16);
  }
}

// Round to nearest even, as torch does; NaN stays NaN.
#ifdef __AVX512BF16__
// One instruction for seven. It takes numbers below 2^-126 for zero.
inline u16v to_bf16(f32v v) {
  u16v rounded;
  asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
  return rounded;
}
#else
inline u16v to_bf16(f32v v) {
  const u32v bits = (u32v)v, even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v == v ? even : (u32v{} + 0x7fc0u), u16v);
}
#endif

// 1 / v to the last bit or two.
#ifdef __AVX512F__
inline f32v reciprocal(f32v v) {
  f32v r;
  asm("vrcp14ps %1, %0" : "=v"(r) : "v"(v));
  return r * (2.0f - v * r);  // one step of Newton's method: from 14 to 28 bits
}
#else
inline f32v reciprocal(f32v v) { return 1.0f / v; }
#endif

template <Dtype D>
inline void store_float(void* target, int64_t index, f32v v) {
  if constexpr (D == Dtype::f32) {
    store((float*)target + index, v);
  } else {
    store((uint16_t*)target + index, to_bf16(v));
  }
}

template <Dtype D>
constexpr int64_t dtype_size = D == Dtype::f32 ? 4 : 2;

// The last, incomplete vector of a row: `count` < LANES elements, the rest zero.
template <Dtype D>
inline f32v load_partial(const void* source, int64_t index, int64_t count) {
  alignas(64) uint8_t buffer[LANES * dtype_size<D>] = {};
  __builtin_memcpy(buffer, (const uint8_t*)source + index * dtype_size<D>, size_t(count * dtype_size<D>));
  return load_float<D>(buffer, 0);
}

template <Dtype D>
inline void store_partial(void* target, int64_t index, f32v v, int64_t count) {
  alignas(64) uint8_t buffer[LANES * dtype_size<D>];
  store_float<D>(buffer, 0, v);
  __builtin_memcpy((uint8_t*)target + index * dtype_size<D>, buffer, size_t(count * dtype_size<D>));
}

// e^v for v <= 88, 0 below -87: 2^n by exponent bits times a polynomial on [-ln2/2, ln2/2]; relative error below 2e-7
// (tests/kernels/test_elementwise.py).
inline f32v exponential(f32v v) {
  v = maximum(v, splat(-87.0f));
  v = minimum(v, splat(88.0f));
  const f32v raised = v * 1.44269504f + ROUNDER, n = raised - ROUNDER;
  f32v r = v - n * 0.693359375f + n * 2.12194440e-4f;
  f32v p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (f32v)(((s32v)raised - (ROUNDER_BITS - 127)) << 23);
}

// GELU in its tanh form, the activation of Wan's and CogVideoX's feed-forward: v / (1 + e^-2u), u = sqrt(2/pi) (v + .044715 v^3).
inline f32v gelu_tanh(f32v v) {
  f32v u = v * (1.5957691216f + 0.0713548162726f * v * v);
  return v * reciprocal(1.0f + exponential(-u));
}

}  // namespace
