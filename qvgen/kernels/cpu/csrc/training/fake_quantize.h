// Fake quantization in training, a row of one grid at a time, for any vector width: what quant/primitives.py defines, whose
// operations on the elements these repeat one by one.
#pragma once

#include "isa/isa.h"
#include "isa/vec.h"
#include "linear/rows.h"

namespace {

// Sums go into 16 lanes whatever the width of a register, so that they are the same on every instruction set that has a fused
// multiply-add.
constexpr int64_t SUM_LANES = 16, SUM_VECTORS = SUM_LANES / LANES;

struct RowSum {
  f32v part[SUM_VECTORS] = {};

  float total() const {
    float lanes[SUM_LANES];
    __builtin_memcpy(lanes, part, sizeof lanes);
    for (int64_t width = SUM_LANES / 2; width; width /= 2)
      for (int64_t i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
  }
};

// f(i, number of elements, index of their sum) for each vector of a row.
template <class F>
inline void each_summed_vector(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + SUM_LANES <= count; i += SUM_LANES)
#pragma GCC unroll 4
    for (int64_t j = 0; j < SUM_VECTORS; j++) f(i + j * LANES, LANES, j);
  for (int64_t j = 0; i < count; i += LANES, j++) f(i, count - i < LANES ? count - i : LANES, j);
}

// Codes before they are clamped. A number that is too large for ROUNDER stays one that is clamped; NaN stays NaN.
inline f32v unclamped(f32v x, const qvgen::FakeQuantizer& q, float scale, float zero_point) {
  f32v v = x / scale;
  if (q.float_zero_point) v += zero_point;
  v = (v + ROUNDER) - ROUNDER;
  return q.float_zero_point ? v : v + zero_point;
}

inline f32v clamped(f32v v, const qvgen::FakeQuantizer& q) {
  return maximum(splat(0.0f), minimum(splat(q.max_code), v));  // both give their second operand where one is NaN
}

void fake_quantize(const qvgen::FakeQuantizer& q, int64_t row, const float* x, float* out) {
  const float scale = q.scale[row], zero_point = q.zero_point[row];
  each_vector(q.features, [&](int64_t i, int64_t count) {
    const f32v code = clamped(unclamped(load_some<Dtype::f32>(x, i, count), q, scale, zero_point), q);
    store_some<Dtype::f32>(out, i, (code - zero_point) * scale, count);
  });
}

void fake_quantize_backward(
    const qvgen::FakeQuantizer& q, int64_t row, const float* grad, const float* x, float* grad_x, float* grad_scale,
    float* grad_zero_point) {
  const float scale = q.scale[row], zero_point = q.zero_point[row];
  RowSum by_values, by_x, all, kept;
  each_summed_vector(q.features, [&](int64_t i, int64_t count, int64_t j) {
    const f32v v = load_some<Dtype::f32>(x, i, count), g = load_some<Dtype::f32>(grad, i, count);
    const f32v code = unclamped(v, q, scale, zero_point), inside = clamped(code, q);
    const f32v through = (f32v)((s32v)g & (inside == code));
    store_some<Dtype::f32>(grad_x, i, through, count);
    by_values.part[j] += g * ((inside - zero_point) * scale);
    by_x.part[j] += through * v;
    all.part[j] += g;
    kept.part[j] += through;
  });
  grad_scale[row] = (by_values.total() - by_x.total()) / scale;
  grad_zero_point[row] = scale * (kept.total() - all.total());
}

}  // namespace
