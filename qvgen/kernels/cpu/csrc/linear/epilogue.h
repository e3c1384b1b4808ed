// From a tile's integers to outputs, for any vector width:
//
//   scale_a scale_w [ sum (a - z_a)(q - offset) - (z_w - offset) sum (a - z_a) ] + bias
//
// The sums are exact, in int32 or, where no partial result can leave the integers of float32, in float32, which is faster.
#pragma once

#include "isa/isa.h"
#include "isa/vec.h"

namespace {

struct Tokens {
  int32_t zero_point[qvgen::TILE_ROWS], centred_sum[qvgen::TILE_ROWS];  // centred_sum: sum of (a - zero_point)
  float float_zero_point[qvgen::TILE_ROWS], float_sum[qvgen::TILE_ROWS];

  Tokens(const qvgen::Tile& tile, const qvgen::TokenGrid* grids, int64_t k) {
    for (int i = 0; i < tile.rows; i++) {
      zero_point[i] = grids[i].zero_point;
      centred_sum[i] = tile.a_sum[i * tile.sum_stride] - int32_t(k) * zero_point[i];
      float_zero_point[i] = float(zero_point[i]), float_sum[i] = float(centred_sum[i]);
    }
  }
};

// One vector of outputs of each token of a tile, without the token's scale: f(row, values).
template <bool SMALL, class F>
inline void weighted(const qvgen::PanelGrid& grid, const qvgen::Tile& tile, const Tokens& tokens, int64_t n, const F& f) {
  const u32v row_sum = load<u32v>(grid.row_sum + n), zero = load<u32v>(grid.zero_whole + n);
  const f32v fraction = load<f32v>(grid.zero_fraction + n), scale = load<f32v>(grid.scale + n);
  const f32v float_sum = __builtin_convertvector((s32v)row_sum, f32v);
  const f32v float_zero = __builtin_convertvector((s32v)zero, f32v);
  const int32_t* out = tile.out + n;
  for (int row = 0; row < tile.rows; row++, out += qvgen::PANEL) {
    const u32v dots = load<u32v>(out);
    f32v v;
    if constexpr (SMALL) {
      v = __builtin_convertvector((s32v)dots, f32v) - float_sum * tokens.float_zero_point[row];
      v -= float_zero * tokens.float_sum[row];  // exact so far: all are whole numbers below 2^24
      v -= fraction * tokens.float_sum[row];
    } else {
      // Unsigned: a partial result may leave 32 bits, the whole one does not (backend.py limits K).
      const u32v exact = dots - row_sum * uint32_t(tokens.zero_point[row]) - zero * uint32_t(tokens.centred_sum[row]);
      v = __builtin_convertvector((s32v)exact, f32v) - fraction * tokens.float_sum[row];
    }
    f(row, v * scale);
  }
}

// `count` outputs of one token, at most one vector.
template <Dtype D, bool GELU>
inline void output(f32v v, float scale, f32v bias, void* out, int64_t count) {
  v = v * scale + bias;
  if constexpr (GELU) v = gelu_tanh(v);
  if (count < LANES) {
    if (count > 0) store_partial<D>(out, 0, v, count);
  } else {
    store_float<D>(out, 0, v);
  }
}

template <Dtype D, bool GELU, bool SMALL>
void finish_as(
    const qvgen::PanelGrid& grid, const qvgen::Tile& tile, const qvgen::TokenGrid* grids, const Tokens& tokens,
    const qvgen::Target& t) {
  for (int64_t n = t.first; n < t.end; n += LANES) {
    const f32v bias = load<f32v>(t.bias + n);
    uint8_t* out = (uint8_t*)t.out + n * dtype_size<D>;
    const int64_t count = t.columns - n, stride = t.stride * dtype_size<D>;
    weighted<SMALL>(grid, tile, tokens, n, [&](int row, f32v v) {
      output<D, GELU>(v, grids[row].scale, bias, out, count);
      out += stride;
    });
  }
}

template <Dtype D, bool SMALL>
inline void finish_gelu(
    const qvgen::PanelGrid& grid, const qvgen::Tile& tile, const qvgen::TokenGrid* grids, const Tokens& tokens,
    const qvgen::Target& t) {
  t.gelu ? finish_as<D, true, SMALL>(grid, tile, grids, tokens, t) : finish_as<D, false, SMALL>(grid, tile, grids, tokens, t);
}

void finish(
    const qvgen::PanelGrid& grid, const qvgen::Tile& tile, const qvgen::TokenGrid* grids, int weight_bits, int64_t k,
    const qvgen::Target& t) {
  const Tokens tokens(tile, grids, k);
  const bool floats = qvgen::sums_are_small(tile.max_code, weight_bits, k);
  if (t.dtype == int(Dtype::f32)) {
    floats ? finish_gelu<Dtype::f32, true>(grid, tile, grids, tokens, t)
           : finish_gelu<Dtype::f32, false>(grid, tile, grids, tokens, t);
  } else {
    floats ? finish_gelu<Dtype::bf16, true>(grid, tile, grids, tokens, t)
           : finish_gelu<Dtype::bf16, false>(grid, tile, grids, tokens, t);
  }
}

void add_group(
    const qvgen::PanelGrid& grid, const qvgen::Tile& tile, const qvgen::TokenGrid* grids, int64_t group_size, bool first,
    float* values) {
  const Tokens tokens(tile, grids, group_size);
  for (int64_t n = 0; n < qvgen::PANEL; n += LANES)
    weighted<false>(grid, tile, tokens, n, [&](int row, f32v v) {
      float* value = values + row * qvgen::PANEL + n;
      store(value, first ? v : load<f32v>(value) + v);
    });
}

template <Dtype D, bool GELU>
void finish_groups_as(const float* values, int rows, const qvgen::TokenGrid* grids, const qvgen::Target& t) {
  for (int row = 0; row < rows; row++)
    for (int64_t n = 0; n < qvgen::PANEL; n += LANES) {
      uint8_t* out = (uint8_t*)t.out + (row * t.stride + n) * dtype_size<D>;
      const f32v v = load<f32v>(values + row * qvgen::PANEL + n);
      output<D, GELU>(v, grids[row].scale, load<f32v>(t.bias + n), out, t.columns - n);
    }
}

void finish_groups(const float* values, int rows, const qvgen::TokenGrid* grids, const qvgen::Target& t) {
  if (t.dtype == int(Dtype::f32)) {
    t.gelu ? finish_groups_as<Dtype::f32, true>(values, rows, grids, t) : finish_groups_as<Dtype::f32, false>(values, rows, grids, t);
  } else {
    t.gelu ? finish_groups_as<Dtype::bf16, true>(values, rows, grids, t)
           : finish_groups_as<Dtype::bf16, false>(values, rows, grids, t);
  }
}

}  // namespace
