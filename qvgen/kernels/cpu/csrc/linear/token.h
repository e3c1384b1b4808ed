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

template <Dtype D>
inline void store_pair(uint8_t* codes, const s32v (&q)[2]) {
  if constexpr (D == Dtype::f32) {
    store(codes, __builtin_convertvector(q[0], u8v)), store(codes + LANES, __builtin_convertvector(q[1], u8v));
  } else {
    store(codes, __builtin_convertvector(q[0] | q[1] << 8, u16v));
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

template <Dtype D>
void token_range_of(const void* x, int64_t k, float* lower, float* upper) {
  f32v low[2] = {}, high[2] = {}, bad[2] = {};
  each_pair<D>(x, 0, k, [&](const uint8_t* from, int64_t, int64_t) {
    f32v v[2];
    load_pair<D>(from, 0, v);
    for (int u = 0; u < 2; u++) {
      low[u] = minimum(v[u], low[u]), high[u] = maximum(v[u], high[u]);
      bad[u] = v[u] * 0.0f + bad[u];  // NaN from NaN and from Inf
    }
  });
  const float nan = sum(bad[0] + bad[1]);
  *lower = smallest(minimum(low[0], low[1])) + nan;
  *upper = largest(maximum(high[0], high[1])) + nan;
}

void token_range(int dtype, const void* x, int64_t k, float* lower, float* upper) {
  if (dtype == int(Dtype::f32)) return token_range_of<Dtype::f32>(x, k, lower, upper);
  token_range_of<Dtype::bf16>(x, k, lower, upper);
}

// Codes are round(x / s) + z, and x times 1 / s rounds differently where x / s is near k + 1/2. So: multiply, note how near
// the products come to k + 1/2, and divide the few chunks again in which one is within the error of the product.
constexpr int64_t CHUNK = 1024;

struct CodeRange {
  float low, high;  // of round(x / s)
  int32_t zero_point;
};

// Codes of elements [first, end); returns the largest distance of a quotient from an integer.
template <Dtype D, bool DIVIDE>
inline float chunk_codes(
    const void* x, int64_t first, int64_t end, float scale, const CodeRange& range, uint8_t* codes, s32v& total) {
  const float inverse = 1 / scale;
  // The input is clamped, not the quotient: before it could overflow, and so that product and sum become one operation.
  const f32v low = splat(range.low * scale), high = splat(range.high * scale);
  u32v farthest = {};
  each_pair<D>(x, first, end, [&](const uint8_t* from, int64_t i, int64_t count) {
    f32v v[2];
    s32v q[2];
    load_pair<D>(from, 0, v);
    for (int u = 0; u < 2; u++) {
      v[u] = minimum(maximum(v[u], low), high);
      const f32v raised = DIVIDE ? v[u] / scale + ROUNDER : v[u] * inverse + ROUNDER;
      // As integers, positive floats are ordered as they are as floats.
      const u32v distance = (u32v)absolute(v[u] * inverse - (raised - ROUNDER));
      farthest = distance > farthest ? distance : farthest;
      q[u] = (s32v)raised - (ROUNDER_BITS - range.zero_point);
      total += q[u];
    }
    if (count == PAIR) {
      store_pair<D>(codes + i, q);
    } else {
      uint8_t rest[PAIR];
      store_pair<D>(rest, q);
      __builtin_memcpy(codes + i, rest, size_t(count));
      total[0] -= int32_t(PAIR - count) * range.zero_point;  // of the zeros
    }
  });
  return largest((f32v)farthest);
}

template <Dtype D>
int32_t token_codes_of(const void* x, int64_t k, const qvgen::TokenGrid& grid, int max_code, uint8_t* codes) {
  const CodeRange range = {-float(grid.zero_point), float(max_code - grid.zero_point), grid.zero_point};
  // |product - quotient| <= 1.5 * 2^-23 |quotient|, which is at most max_code + 1/2 where it matters.
  const float undecided = 0.5f - float(max_code + 1) * 0x1p-22f;
  const bool invertible = grid.scale > 0x1p-100f && grid.scale < 0x1p100f;
  s32v total = {};
  for (int64_t i = 0; i < k; i += CHUNK) {
    const int64_t end = k - i < CHUNK ? k : i + CHUNK;
    const s32v before = total;
    if (invertible && chunk_codes<D, false>(x, i, end, grid.scale, range, codes, total) < undecided) continue;
    total = before;
    chunk_codes<D, true>(x, i, end, grid.scale, range, codes, total);
  }
  return sum(total);
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
