// Attention of sequences so short that the scores of a query fit in a buffer: in float32, for any vector width and dtype.
// PyTorch's own spends longer on being called.
#pragma once

#include "attention/panels.h"
#include "linear/floats.h"

namespace {

// Keys of one head as panels (features, PANEL) and values as (keys, PANEL) for each panel of features; zeros beyond the last.
template <Dtype D>
inline void lay_out_short(const qvgen::ShortAttention& s, const void* k, const void* v, float* keys, float* values) {
  constexpr int64_t PANEL = qvgen::PANEL;
  alignas(64) float rows[LANES * qvgen::SHORT_FEATURES];
  for (int64_t first = 0; first < s.padded_keys(); first += LANES) {
    for (int64_t key = first; key < first + LANES; key++)
      for (int64_t f = 0; f < s.features; f += LANES)
        store(rows + (key - first) * s.features + f, key < s.keys ? load_float<D>(k, key * s.stride + f) : splat(0.0f));
    float* panel = keys + first / PANEL * s.features * PANEL + first % PANEL;
    for (int64_t f = 0; f < s.features; f += LANES)
      transpose((const uint32_t*)(rows + f), s.features, (uint32_t*)(panel + f * PANEL), PANEL);
  }
  for (int64_t f = 0; f < s.padded_features(); f += LANES) {
    float* to = values + f / PANEL * s.keys * PANEL + f % PANEL;
    for (int64_t key = 0; key < s.keys; key++)
      store(to + key * PANEL, f < s.features ? load_float<D>(v, key * s.stride + f) : splat(0.0f));
  }
}

// Scores of a query to 2^(score - largest); returns the inverse of their sum.
inline float short_softmax(const qvgen::ShortAttention& s, const float* scores, int64_t panel_stride, float* probabilities) {
  constexpr int64_t PANEL = qvgen::PANEL;
  constexpr float LEAST = -3e38f;
  f32v high = splat(LEAST), total = {};
  for (int64_t key = 0; key < s.keys; key += LANES) {
    f32v v = load<f32v>(scores + key / PANEL * panel_stride + key % PANEL);
    for (int64_t i = s.keys - key; i < LANES; i++) v[i] = LEAST;
    store(probabilities + key, v);
    high = maximum(v, high);
  }
  const float most = largest(high);
  for (int64_t key = 0; key < s.keys; key += LANES) {
    const f32v v = power_of_two(load<f32v>(probabilities + key) - most);
    store(probabilities + key, v);
    total += v;
  }
  return 1 / sum(total);
}

template <Dtype D>
void attend_short(const qvgen::ShortAttention& s, const void* q, const void* k, const void* v, void* out, float* memory) {
  constexpr int64_t ROWS = qvgen::TILE_ROWS, PANEL = qvgen::PANEL;
  const int64_t padded = s.padded_keys();
  float *keys = memory, *values = keys + padded * s.features;
  float *scores = values + s.keys * s.padded_features(), *probabilities = scores + ROWS * padded;
  alignas(64) float queries[ROWS * qvgen::SHORT_FEATURES], product[ROWS * PANEL];
  lay_out_short<D>(s, k, v, keys, values);
  for (int64_t query = 0; query < s.queries; query += ROWS) {
    const int rows = int(s.queries - query < ROWS ? s.queries - query : ROWS);
    for (int row = 0; row < rows; row++)
      for (int64_t f = 0; f < s.features; f += LANES)  // in powers of two
        store(queries + row * s.features + f, load_float<D>(q, (query + row) * s.stride + f) * (s.scale * 1.44269504f));
    for (int64_t key = 0; key < padded; key += PANEL)
      dense_tile(
          qvgen::Dense::floats, rows, queries, s.features * 4, keys + key * s.features, s.features, true, scores + key * ROWS);
    float inverse[ROWS];
    for (int row = 0; row < rows; row++)
      inverse[row] = short_softmax(s, scores + row * PANEL, ROWS * PANEL, probabilities + row * padded);
    for (int64_t f = 0; f < s.features; f += PANEL) {
      dense_tile(
          qvgen::Dense::floats, rows, probabilities, padded * 4, values + f * s.keys, s.keys, true, product);
      for (int row = 0; row < rows; row++)
        for (int64_t i = 0; i < PANEL && f + i < s.features; i += LANES)
          store_float<D>(out, (query + row) * s.stride + f + i, load<f32v>(product + row * PANEL + i) * inverse[row]);
    }
  }
}

void short_attention(
    int dtype, const qvgen::ShortAttention& s, const void* q, const void* k, const void* v, void* out, float* memory) {
  if (dtype == int(Dtype::f32)) return attend_short<Dtype::f32>(s, q, k, v, out, memory);
  attend_short<Dtype::bf16>(s, q, k, v, out, memory);
}

}  // namespace
