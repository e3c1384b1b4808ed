// What a transformer block does between its linear layers, row by row, for any vector width: in float32 from one load to one
// store, where PyTorch makes a pass over memory for each of normalize, scale, shift, convert.
#pragma once

#include "isa/isa.h"
#include "isa/vec.h"

namespace {

// f(i, number of elements) for each vector of a row.
template <class F>
inline void each_vector(int64_t count, const F& f) {
  for (int64_t i = 0; i < count; i += LANES) f(i, count - i < LANES ? count - i : LANES);
}

template <Dtype D>
inline f32v load_some(const void* x, int64_t i, int64_t count) {
  return count == LANES ? load_float<D>(x, i) : load_partial<D>(x, i, count);
}

template <Dtype D>
inline void store_some(void* x, int64_t i, f32v v, int64_t count) {
  count == LANES ? store_float<D>(x, i, v) : store_partial<D>(x, i, v, count);
}

inline f32v first_lanes(f32v v, int64_t count) {
  for (int64_t i = count; i < LANES; i++) v[i] = 0;
  return v;
}

inline float inverse_root(float v) { return 1 / __builtin_sqrtf(v); }

template <Dtype D>
void layer_norm_row(const void* x, const qvgen::LayerNorm& norm, int64_t group, void* out) {
  constexpr Dtype F32 = Dtype::f32;
  f32v total = {}, squares = {};
  each_vector(norm.features, [&](int64_t i, int64_t count) { total += load_some<D>(x, i, count); });
  const float mean = sum(total) / float(norm.features);
  each_vector(norm.features, [&](int64_t i, int64_t count) {
    f32v centred = load_some<D>(x, i, count) - mean;
    if (count < LANES) centred = first_lanes(centred, count);
    squares += centred * centred;
  });
  const float scale = inverse_root(sum(squares) / float(norm.features) + norm.eps);
  const int64_t modulation = group * norm.features;
  each_vector(norm.features, [&](int64_t i, int64_t count) {
    f32v v = (load_some<D>(x, i, count) - mean) * scale;
    if (norm.weight) v *= load_some<F32>(norm.weight, i, count);
    if (norm.bias) v += load_some<F32>(norm.bias, i, count);
    if (norm.scale) v *= 1.0f + load_some<F32>(norm.scale, modulation + i, count);
    if (norm.shift) v += load_some<F32>(norm.shift, modulation + i, count);
    store_some<D>(out, i, v, count);
  });
}

// Rotate pairs (x0, x1) to (x0 cos - x1 sin, x0 sin + x1 cos), the cosine of a pair in its even, the sine in its odd place.
inline f32v rotated(f32v x, f32v cosine, f32v sine) {
  const u64v pairs = (u64v)x, c = (u64v)cosine & 0xffffffffu, s = (u64v)sine >> 32;
  const f32v swapped = (f32v)(pairs << 32 | pairs >> 32);
  const f32v cosines = (f32v)(c | c << 32), sines = (f32v)(s << 32 | (s ^ 0x80000000u));
  return x * cosines + swapped * sines;
}

template <Dtype D>
void rms_norm_row(const void* x, const qvgen::RmsNorm& norm, int64_t position, void* out) {
  f32v squares = {};
  each_vector(norm.features, [&](int64_t i, int64_t count) {
    const f32v v = load_some<D>(x, i, count);
    squares += v * v;
  });
  const float scale = inverse_root(sum(squares) / float(norm.features) + norm.eps);
  each_vector(norm.features, [&](int64_t i, int64_t count) {
    f32v v = load_some<D>(x, i, count) * scale;
    if (norm.weight) v *= load_some<Dtype::f32>(norm.weight, i, count);
    if (norm.cosine) {  // whole vectors only: heads have a multiple of 16 features
      const int64_t at = position * norm.head_features + i % norm.head_features;
      v = rotated(v, load<f32v>(norm.cosine + at), load<f32v>(norm.sine + at));
    }
    store_some<D>(out, i, v, count);
  });
}

template <Dtype D>
void add_gated_row(const void* x, const void* y, const float* gate, int64_t features, void* out) {
  each_vector(features, [&](int64_t i, int64_t count) {
    f32v v = load_some<D>(y, i, count);
    if (gate) v *= load_some<Dtype::f32>(gate, i, count);
    store_some<D>(out, i, load_some<D>(x, i, count) + v, count);
  });
}

void layer_norm(int dtype, const void* x, const qvgen::LayerNorm& norm, int64_t group, void* out) {
  if (dtype == int(Dtype::f32)) return layer_norm_row<Dtype::f32>(x, norm, group, out);
  layer_norm_row<Dtype::bf16>(x, norm, group, out);
}

void rms_norm(int dtype, const void* x, const qvgen::RmsNorm& norm, int64_t position, void* out) {
  if (dtype == int(Dtype::f32)) return rms_norm_row<Dtype::f32>(x, norm, position, out);
  rms_norm_row<Dtype::bf16>(x, norm, position, out);
}

void add_gated(int dtype, const void* x, const void* y, const float* gate, int64_t features, void* out) {
  if (dtype == int(Dtype::f32)) return add_gated_row<Dtype::f32>(x, y, gate, features, out);
  add_gated_row<Dtype::bf16>(x, y, gate, features, out);
}

}  // namespace
