// How keys and values lie for attention, in the order in which both kernels multiply them; compiled for each.
#pragma once

#include "attention/attention.h"
#include "isa/vec.h"

namespace {

// Word i of row j to word j of row i: LANES rows, `from_stride` and `to_stride` words apart.
inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
#if defined(__clang__)
  for (int64_t i = 0; i < LANES; i++)
    for (int64_t j = 0; j < LANES; j++) to[i * to_stride + j] = from[j * from_stride + i];
#else
  u32v rows[LANES];
  for (int64_t i = 0; i < LANES; i++) rows[i] = load<u32v>(from + i * from_stride);
#pragma GCC unroll 4
  for (int64_t distance = LANES / 2; distance; distance /= 2) {
    s32v first, second;  // of rows `distance` apart: the words that stay or come from the other one
    for (int64_t l = 0; l < LANES; l++) {
      first[l] = int32_t(l & distance ? LANES + l - distance : l);
      second[l] = int32_t(l & distance ? LANES + l : l + distance);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; i++) {
      if (i & distance) continue;
      const u32v a = rows[i], b = rows[i + distance];
      rows[i] = __builtin_shuffle(a, b, first), rows[i + distance] = __builtin_shuffle(a, b, second);
    }
  }
  for (int64_t i = 0; i < LANES; i++) store(to + i * to_stride, rows[i]);
#endif
}

// One panel of keys, [pair of features][key], and of values, [panel of features][pair of keys][feature]; zeros beyond the last.
inline void lay_out(
    const qvgen::AttentionShape& s, const uint16_t* k, const uint16_t* v, int64_t panel, uint32_t* keys, uint32_t* values) {
  constexpr int64_t WIDTH = qvgen::ATTENTION_WIDTH;
  const int64_t first = panel * WIDTH, count = s.keys - first < WIDTH ? s.keys - first : WIDTH;
  const int64_t whole = s.features / 2 / LANES * LANES, whole_keys = count / LANES * LANES;
  for (int64_t key = 0; key < whole_keys; key += LANES)
    for (int64_t pair = 0; pair < whole; pair += LANES)
      transpose((const uint32_t*)(k + (first + key) * s.stride() + 2 * pair), s.stride() / 2, keys + pair * WIDTH + key, WIDTH);
  for (int64_t key = 0; key < WIDTH; key++) {
    const uint16_t* row = k + (first + key) * s.stride();
    for (int64_t pair = key < whole_keys ? whole : 0; pair < s.pairs(); pair++) {
      uint32_t word = 0;
      if (key < count && 2 * pair < s.features) __builtin_memcpy(&word, row + 2 * pair, 4);
      keys[pair * WIDTH + key] = word;
    }
  }
  for (int64_t p = 0; p < s.feature_panels(); p++)
    for (int64_t pair = 0; pair < WIDTH / 2; pair++, values += WIDTH) {
      const int64_t width = s.features - p * WIDTH < WIDTH ? s.features - p * WIDTH : WIDTH;
      const uint16_t* low = v + (first + 2 * pair) * s.stride() + p * WIDTH;
      if (width == WIDTH && 2 * pair + 1 < count) {
        for (int64_t f = 0; f < WIDTH; f += LANES)
          store(values + f, __builtin_convertvector(load<u16v>(low + f), u32v) |
                                __builtin_convertvector(load<u16v>(low + s.stride() + f), u32v) << 16);
        continue;
      }
      for (int64_t f = 0; f < WIDTH; f++) {
        const uint32_t even = f < width && 2 * pair < count ? low[f] : 0;
        const uint32_t odd = f < width && 2 * pair + 1 < count ? low[s.stride() + f] : 0;
        values[f] = even | odd << 16;
      }
    }
}

// 2^v: e^v without its first multiplication. NaN stays NaN.
inline f32v power_of_two(f32v v) {
  v = maximum(splat(-126.0f), v);
  const f32v raised = v + ROUNDER, r = v - (raised - ROUNDER);
  f32v p = splat(1.3333558e-3f);  // 2^r on [-1/2, 1/2]
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return p * (f32v)(((s32v)raised - (ROUNDER_BITS - 127)) << 23);
}

}  // namespace
