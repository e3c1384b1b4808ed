// Weight-only layers: the steps of a panel as floating point, and products with them, for any vector width.
#pragma once

#include "isa/isa.h"
#include "isa/vec.h"

namespace {

// Bytes of one vector of outputs, 4 k each, of a half step: layout.h. `flip` is the top bit where codes were stored signed.
template <int BITS>
inline u32v code_words(const uint8_t* w, int half, int field, int64_t i, uint32_t flip) {
  const auto each = [](uint32_t byte) { return u32v{} + byte * 0x01010101u; };
  const auto words = [&](int64_t at) { return load<u32v>(w + at + i * 4); };
  if constexpr (BITS == 8) {
    return words(half * 256 + field * 64) ^ each(flip);
  } else if constexpr (BITS == 4) {
    const u32v both = words(half * 128 + field / 2 * 64);
    return field % 2 ? ((both >> 4) & each(15)) ^ each(8) : both & each(15);
  } else if constexpr (BITS == 2) {
    const u32v codes = (words(half * 64) >> (2 * field)) & each(3);
    return field == 3 ? codes ^ each(2) : codes;
  } else if (half == 0) {
    return (words(field / 2 * 64) >> (field % 2 * 3)) & each(7);
  } else if (field < 2) {
    return (words(128) >> (field * 3)) & each(7);
  } else {
    return ((words((field - 2) * 64) >> 6) & each(3)) | ((words(128) >> (field + 2)) & each(4));
  }
}

// The bits of v rounded to bfloat16, in the upper half of each lane.
inline u32v rounded_bits(f32v v) {
  const u32v bits = (u32v)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

template <int BITS, qvgen::Dense FORM>
void dequantize_as(const uint8_t* w, int64_t steps, uint32_t flip, const float* scale, const float* zero_point, void* out) {
  constexpr int64_t PANEL = qvgen::PANEL;
  uint32_t* to = (uint32_t*)out;
  for (int64_t step = 0; step < steps; step++, w += 64 * BITS)
    for (int half = 0; half < 2; half++, to += (FORM == qvgen::Dense::pairs ? 2 : 4) * PANEL)
#pragma GCC unroll 4
      for (int field = 0; field < 4; field++)
#pragma GCC unroll 4
        for (int64_t i = 0; i < 16; i += LANES) {
          const int64_t n = field * 16 + i;
          const u32v codes = code_words<BITS>(w, half, field, i, flip);
          const f32v z = load<f32v>(zero_point + n), s = load<f32v>(scale + n);
          const auto value = [&](int k) { return (__builtin_convertvector((s32v)((codes >> (8 * k)) & 255u), f32v) - z) * s; };
          if constexpr (FORM == qvgen::Dense::pairs) {
            for (int k = 0; k < 4; k += 2)
              store(to + k / 2 * PANEL + n, (rounded_bits(value(k)) >> 16) | (rounded_bits(value(k + 1)) & 0xffff0000u));
          } else if constexpr (FORM == qvgen::Dense::rounded) {
            for (int k = 0; k < 4; k++) store(to + k * PANEL + n, rounded_bits(value(k)) & 0xffff0000u);
          } else {
            for (int k = 0; k < 4; k++) store(to + k * PANEL + n, value(k));
          }
        }
}

template <int BITS>
inline void dequantize_bits(
    const uint8_t* w, int64_t steps, uint32_t flip, const float* scale, const float* zero_point, qvgen::Dense form, void* out) {
  switch (form) {
    case qvgen::Dense::pairs: return dequantize_as<BITS, qvgen::Dense::pairs>(w, steps, flip, scale, zero_point, out);
    case qvgen::Dense::rounded: return dequantize_as<BITS, qvgen::Dense::rounded>(w, steps, flip, scale, zero_point, out);
    default: return dequantize_as<BITS, qvgen::Dense::floats>(w, steps, flip, scale, zero_point, out);
  }
}

void dequantize(
    int lane_bits, int weight_bits, const uint8_t* w, int64_t steps, const float* scale, const float* zero_point,
    qvgen::Dense form, void* out) {
  switch (lane_bits) {
    case 2: return dequantize_bits<2>(w, steps, 0, scale, zero_point, form, out);
    case 3: return dequantize_bits<3>(w, steps, 0, scale, zero_point, form, out);
    case 4: return dequantize_bits<4>(w, steps, 0, scale, zero_point, form, out);
    default: return dequantize_bits<8>(w, steps, weight_bits == 8 ? 128 : 0, scale, zero_point, form, out);
  }
}

// One instruction, and one element to all lanes of a register. In assembly for AVX-512, as in isa/avx512vnni.cpp and for the same
// reason.
#ifdef __AVX512F__
inline __attribute__((always_inline)) void multiply_add(f32v& sum, f32v a, f32v b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
inline __attribute__((always_inline)) f32v broadcast_word(const void* a) {
  f32v v;
  asm volatile("vbroadcastss %1, %0" : "=v"(v) : "m"(*(const float*)a));
  return v;
}
inline __attribute__((always_inline)) f32v load_words(const void* b) {
  f32v v;
  asm volatile("vmovups %1, %0" : "=v"(v) : "m"(*(const f32v*)b));
  return v;
}
constexpr int COLUMNS = 4;  // vectors of a tile
#else
inline void multiply_add(f32v& sum, f32v a, f32v b) { sum += a * b; }
inline f32v broadcast_word(const void* a) { return splat(*(const float*)a); }
inline f32v load_words(const void* b) { return load<f32v>(b); }
constexpr int COLUMNS = 2;
#endif
#ifdef __AVX512BF16__
inline __attribute__((always_inline)) void multiply_add_pairs(f32v& sum, f32v a, f32v b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
#endif

// out (ROWS, PANEL) = or += a (ROWS, words) times b (words, PANEL); a word is a float or a pair of bfloat16.
template <int ROWS, class F>
inline void dense_rows(const uint8_t* a, int64_t stride, const float* b, int64_t words, bool first, float* out, const F& product) {
  for (int64_t n = 0; n < qvgen::PANEL; n += COLUMNS * LANES) {
    f32v total[ROWS][COLUMNS];
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
      for (int i = 0; i < COLUMNS; i++) total[row][i] = splat(0.0f);
    const uint8_t *low = a, *high = a + 3 * stride;
    const float* column = b + n;
    for (int64_t word = 0; word < words; word++, low += 4, high += 4, column += qvgen::PANEL) {
      f32v right[COLUMNS];
#pragma GCC unroll 4
      for (int i = 0; i < COLUMNS; i++) right[i] = load_words(column + i * LANES);
#pragma GCC unroll 6
      for (int row = 0; row < ROWS; row++) {
        const f32v left = broadcast_word(row < 3 ? low + row * stride : high + (row - 3) * stride);
#pragma GCC unroll 4
        for (int i = 0; i < COLUMNS; i++) product(total[row][i], left, right[i]);
      }
    }
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
      for (int i = 0; i < COLUMNS; i++) {
        float* at = out + row * qvgen::PANEL + n + i * LANES;
        store(at, first ? total[row][i] : load<f32v>(at) + total[row][i]);
      }
  }
}

template <int ROWS>
void dense_as(qvgen::Dense form, const uint8_t* a, int64_t stride, const float* b, int64_t words, bool first, float* out) {
#ifdef __AVX512BF16__
  if (form == qvgen::Dense::pairs) {
    dense_rows<ROWS>(a, stride, b, words, first, out, [](f32v& sum, f32v l, f32v r) { multiply_add_pairs(sum, l, r); });
    return;
  }
#endif
  (void)form;
  dense_rows<ROWS>(a, stride, b, words, first, out, [](f32v& sum, f32v l, f32v r) { multiply_add(sum, l, r); });
}

void dense_tile(qvgen::Dense form, int rows, const void* a, int64_t stride, const void* b, int64_t words, bool first, float* out) {
  const uint8_t* left = (const uint8_t*)a;
  const float* right = (const float*)b;
  switch (rows) {
    case 1: return dense_as<1>(form, left, stride, right, words, first, out);
    case 2: return dense_as<2>(form, left, stride, right, words, first, out);
    case 3: return dense_as<3>(form, left, stride, right, words, first, out);
    case 4: return dense_as<4>(form, left, stride, right, words, first, out);
    case 5: return dense_as<5>(form, left, stride, right, words, first, out);
    default: return dense_as<6>(form, left, stride, right, words, first, out);
  }
}

}  // namespace
