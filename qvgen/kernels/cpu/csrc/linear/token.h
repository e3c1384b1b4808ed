// Quantization of one token, for any vector width.
#pragma once

#include "isa/isa.h"
#include "isa/vec.h"

namespace {

// Two vectors at a time. Of bfloat16, one vector takes the even and one the odd elements, which are the halves of 32-bit words:
// two operations instead of two widening conversions.
constexpr int64_t PAIR = 2 * LANES;

template <Dtype D>
inline void load_pair(const void* x, int64_t i, f32v (&v)[2]) {
  if constexpr (D == Dtype::f32) {
    v[0] = load<f32v>((const float*)x + i), v[1] = load<f32v>((const float*)x + i + LANES);
  } else {
    u32v words = load<u32v>((const uint16_t*)x + i);
    v[0] = (f32v)(words << 16), v[1] = (f32v)(words & 0xffff0000u);
  }
}

// The low byte, and the low half, of each lane.
#ifdef __AVX512F__
// GCC 12 takes a vector that was one of floats apart, byte by byte.
inline u8v low_byte(s32v v) {
  u8v bytes;
  asm("vpmovdb %1, %0" : "=v"(bytes) : "v"(v));
  return bytes;
}
inline u16v low_half(s32v v) {
  u16v halves;
  asm("vpmovdw %1, %0" : "=v"(halves) : "v"(v));
  return halves;
}
#else
inline u8v low_byte(s32v v) { return __builtin_convertvector(v, u8v); }
inline u16v low_half(s32v v) { return __builtin_convertvector(v, u16v); }
#endif

template <Dtype D>
inline void store_pair(uint8_t* codes, const s32v (&q)[2]) {
  if constexpr (D == Dtype::f32) {
    store(codes, low_byte(q[0])), store(codes + LANES, low_byte(q[1]));
  } else {
    store(codes, low_half(q[0] | q[1] << 8));
  }
}

// f(x, i, number of elements) for each pair of vectors; the last, incomplete ones from a copy that ends with zeros.
template <Dtype D, class F>
inline void each_pair(const void* x, int64_t first, int64_t end, F f) {
  int64_t i = first;
  for (; i + PAIR <= end; i += PAIR) f((const uint8_t*)x + i * dtype_size<D>, i, PAIR);
  if (i == end) return;
  alignas(64) uint8_t rest[PAIR * dtype_size<D>] = {};
  __builtin_memcpy(rest, (const uint8_t*)x + i * dtype_size<D>, size_t((end - i) * dtype_size<D>));
  f(rest, i, end - i);
}

void token_range_f32(const void* x, int64_t k, float* lower, float* upper) {
  f32v low[2] = {}, high[2] = {}, bad[2] = {};
  each_pair<Dtype::f32>(x, 0, k, [&](const uint8_t* from, int64_t, int64_t) {
    f32v v[2];
    load_pair<Dtype::f32>(from, 0, v);
    for (int u = 0; u < 2; u++) {
      low[u] = minimum(v[u], low[u]), high[u] = maximum(v[u], high[u]);
      bad[u] = v[u] * 0.0f + bad[u];  // NaN from NaN and from Inf
    }
  });
  const float nan = sum(bad[0] + bad[1]);
  *lower = smallest(minimum(low[0], low[1])) + nan;
  *upper = largest(maximum(high[0], high[1])) + nan;
}

// The bits of bfloat16, as signed integers, are in order as far as they are positive, and unsigned those of negative numbers are in
// reverse order; so two integer maxima are the range, a fourth of the operations. NaN and Inf are beyond all numbers.
void token_range_bf16(const void* x, int64_t k, float* lower, float* upper) {
  typedef int16_t signed_v __attribute__((vector_size(LANES * 4)));
  typedef uint16_t unsigned_v __attribute__((vector_size(LANES * 4)));
  signed_v high = {};
  unsigned_v low = {};
  each_pair<Dtype::bf16>(x, 0, k, [&](const uint8_t* from, int64_t, int64_t) {
    const signed_v v = load<signed_v>(from);
    high = v > high ? v : high, low = (unsigned_v)v > low ? (unsigned_v)v : low;
  });
  const auto most = [](u32v halves) {
    const auto greater = [](u32v a, u32v b) { return a > b ? a : b; };
    return reduce(greater(halves & 0xffffu, halves >> 16), greater);
  };
  constexpr uint32_t INFINITE = 0x7f80, SIGN = 0x8000;
  uint32_t positive = most((u32v)high), negative = most((u32v)low);
  if (negative < SIGN) negative = SIGN;
  if (positive >= INFINITE || negative >= (SIGN | INFINITE)) positive = negative = 0x7fc0;  // NaN
  positive <<= 16, negative <<= 16;
  __builtin_memcpy(upper, &positive, 4), __builtin_memcpy(lower, &negative, 4);
}

void token_range(int dtype, const void* x, int64_t k, float* lower, float* upper) {
  dtype == int(Dtype::f32) ? token_range_f32(x, k, lower, upper) : token_range_bf16(x, k, lower, upper);
}

// Codes are round(x / s) + z, and x times 1 / s rounds differently where x / s is near k + 1/2. So: multiply by a little less and
// by a little more than 1 / s. Where both round to the same integer, so does the quotient between them; the few chunks in
// which they do not once are divided again. (Ties are among these, so that z may be added before rounding.)
constexpr int64_t CHUNK = 1024;
constexpr float MARGIN = 0x1p-21f;  // more than the errors of 1 / s, of its product with 1 -+ MARGIN and x, and of x / s

struct CodeRange {
  f32v low, high;  // of x: the input is clamped, not the quotient, which could overflow
  float scale, less, more, rounder;
  int32_t zero_point;

  CodeRange(const qvgen::TokenGrid& grid, int max_code)
      : low(splat(-float(grid.zero_point) * grid.scale)), high(splat(float(max_code - grid.zero_point) * grid.scale)),
        scale(grid.scale), less(1 / grid.scale * (1 - MARGIN)), more(1 / grid.scale * (1 + MARGIN)),
        rounder(ROUNDER + float(grid.zero_point)), zero_point(grid.zero_point) {}
};

// Codes of elements [first, end), and ROUNDER_BITS more than each is added to `total`; returns whether one is undecided.
template <Dtype D, bool DIVIDE>
inline bool chunk_codes(const void* x, int64_t first, int64_t end, const CodeRange& range, uint8_t* codes, u32v& total) {
  const f32v low = range.low, high = range.high;
  const float scale = range.scale, less = range.less, more = range.more, rounder = range.rounder;
  const int32_t zero_point = range.zero_point;
  u32v differences = {}, sums = {};
  each_pair<D>(x, first, end, [&](const uint8_t* from, int64_t i, int64_t count) {
    f32v v[2];
    s32v q[2];
    load_pair<D>(from, 0, v);
    for (int u = 0; u < 2; u++) {
      v[u] = minimum(maximum(v[u], low), high);
      if constexpr (DIVIDE) {
        q[u] = (s32v)(v[u] / scale + ROUNDER) + zero_point;
      } else {
        q[u] = (s32v)(v[u] * less + rounder);
        differences |= (u32v)q[u] ^ (u32v)(v[u] * more + rounder);
      }
      sums += (u32v)q[u];
    }
    if (count == PAIR) {
      store_pair<D>(codes + i, q);
    } else {
      uint8_t rest[PAIR];
      store_pair<D>(rest, q);
      __builtin_memcpy(codes + i, rest, size_t(count));
      sums[0] -= uint32_t(PAIR - count) * uint32_t(ROUNDER_BITS + zero_point);  // of the zeros
    }
  });
  if (reduce(differences, [](u32v a, u32v b) { return a | b; })) return true;
  total += sums;
  return false;
}

template <Dtype D>
int32_t token_codes_of(const void* x, int64_t k, const qvgen::TokenGrid& grid, int max_code, uint8_t* codes) {
  const CodeRange range(grid, max_code);
  const bool invertible = grid.scale > 0x1p-100f && grid.scale < 0x1p100f;
  u32v total = {};
  for (int64_t i = 0; i < k; i += CHUNK) {
    const int64_t end = k - i < CHUNK ? k : i + CHUNK;
    if (!invertible || chunk_codes<D, false>(x, i, end, range, codes, total)) chunk_codes<D, true>(x, i, end, range, codes, total);
  }
  return int32_t(reduce(total, [](u32v a, u32v b) { return a + b; }) - uint32_t(k) * uint32_t(ROUNDER_BITS));
}

int32_t token_codes(int dtype, const void* x, int64_t k, const qvgen::TokenGrid& grid, int max_code, uint8_t* codes) {
  if (grid.scale != grid.scale) {  // the outputs will be NaN whatever the codes are
    __builtin_memset(codes, 0, size_t(k));
    return 0;
  }
  if (dtype == int(Dtype::f32)) return token_codes_of<Dtype::f32>(x, k, grid, max_code, codes);
  return token_codes_of<Dtype::bf16>(x, k, grid, max_code, codes);
}

int32_t code_sum(const uint8_t* codes, int64_t count) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; i++) total += codes[i];
  return total;
}

}  // namespace
