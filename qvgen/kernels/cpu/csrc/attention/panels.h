// How keys and values lie for attention, in the order in which both kernels multiply them; compiled for each.
#pragma once

#include "attention/attention.h"
#include "isa/vec.h"

namespace {

// One panel of keys, [pair of features][key], and of values, [panel of features][pair of keys][feature]; zeros beyond the last.
inline void lay_out(
    const qvgen::AttentionShape& s, const uint16_t* k, const uint16_t* v, int64_t panel, uint32_t* keys, uint32_t* values) {
  constexpr int64_t WIDTH = qvgen::ATTENTION_WIDTH;
  const int64_t first = panel * WIDTH, count = s.keys - first < WIDTH ? s.keys - first : WIDTH;
  for (int64_t key = 0; key < WIDTH; key++) {
    const uint16_t* row = k + (first + key) * s.stride();
    for (int64_t pair = 0; pair < s.pairs(); pair++) {
      uint32_t word = 0;
      if (key < count && 2 * pair < s.features) __builtin_memcpy(&word, row + 2 * pair, 4);
      keys[pair * WIDTH + key] = word;
    }
  }
  for (int64_t p = 0; p < s.feature_panels(); p++)
    for (int64_t pair = 0; pair < WIDTH / 2; pair++, values += WIDTH) {
      const int64_t width = s.features - p * WIDTH < WIDTH ? s.features - p * WIDTH : WIDTH;
      const uint16_t* low = v + (first + 2 * pair) * s.stride() + p * WIDTH;
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
