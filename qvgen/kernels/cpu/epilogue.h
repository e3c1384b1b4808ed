// From a tile's integers to outputs, for any vector width:
//
//   scale_a scale_w [ sum (a - z_a)(q - offset) - (z_w - offset) sum (a - z_a) ] + bias
//
// The sums are exact, in int32 or, where no partial result can leave the integers of float32, in float32, which is faster.
#pragma once

#include "isa.h"
#include "vec.h"

namespace {

constexpr int64_t EXACT_FLOAT = 1 << 24;

struct Token {
  int32_t zero_point, centred_sum;  // centred_sum: sum of (a - zero_point)
};

struct Tokens {
  Token row[qvgen::TILE_ROWS];

  Tokens(const qvgen::Tile& tile, const qvgen::TokenGrid* grids, int64_t k) {
    for (int i = 0; i < tile.rows; i++) {
      const int32_t zero_point = grids[i].zero_point;
      row[i] = {zero_point, tile.a_sum[i * tile.sum_stride] - int32_t(k) * zero_point};
    }
  }
};

// 16 outputs of each token of a tile, without the token's scale: f(row, values).
template <bool SMALL, class F>
inline void weighted(
    const qvgen::PanelGrid& grid, const qvgen::Tile& tile, const Tokens& tokens, int64_t n, const F& f) {
  const u32x16 row_sum = load<u32x16>(grid.row_sum + n), zero = load<u32x16>(grid.zero_whole + n);
  const f32x16 fraction = load<f32x16>(grid.zero_fraction + n), scale = load<f32x16>(grid.scale + n);
  const f32x16 float_sum = __builtin_convertvector((s32x16)row_sum, f32x16);
  const f32x16 float_zero = __builtin_convertvector((s32x16)zero, f32x16) + fraction;
  for (int row = 0; row < tile.rows; row++) {
    const u32x16 dots = load<u32x16>(tile.out + row * qvgen::PANEL + n);
    const Token& token = tokens.row[row];
    f32x16 v;
    if constexpr (SMALL) {
      v = __builtin_convertvector((s32x16)dots, f32x16) - float_sum * float(token.zero_point);
      v -= float_zero * float(token.centred_sum);
    } else {
      // Unsigned: a partial result may leave 32 bits, the whole one does not (backend.py limits K).
      const u32x16 exact = dots - row_sum * uint32_t(token.zero_point) - zero * uint32_t(token.centred_sum);
      v = __builtin_convertvector((s32x16)exact, f32x16) - fraction * float(token.centred_sum);
    }
    f(row, v * scale);
  }
}

template <Dtype D>
inline void output(f32x16 v, float scale, f32x16 bias, int row, int64_t n, const qvgen::Target& t) {
  v = v * scale + bias;
  if (t.gelu) v = gelu_tanh(v);
  if (t.columns - n < LANES) {
    if (t.columns > n) store_partial<D>(t.out, row * t.stride + n, v, t.columns - n);
  } else {
    store_float<D>(t.out, row * t.stride + n, v);
  }
}

template <Dtype D, bool SMALL>
void finish_as(
    const qvgen::PanelGrid& grid, const qvgen::Tile& tile, const qvgen::TokenGrid* grids, const Tokens& tokens,
    const qvgen::Target& t) {
  for (int64_t n = 0; n < qvgen::PANEL; n += LANES) {
    const f32x16 bias = load<f32x16>(t.bias + n);
    weighted<SMALL>(grid, tile, tokens, n, [&](int row, f32x16 v) { output<D>(v, grids[row].scale, bias, row, n, t); });
  }
}

inline bool small(const qvgen::Tile& tile, int weight_bits, int64_t k) {
  return (int64_t(tile.max_code) << weight_bits) * k < EXACT_FLOAT;
}

void finish(
    const qvgen::PanelGrid& grid, const qvgen::Tile& tile, const qvgen::TokenGrid* grids, int weight_bits, int64_t k,
    const qvgen::Target& t) {
  const Tokens tokens(tile, grids, k);
  const bool floats = small(tile, weight_bits, k);
  if (t.dtype == int(Dtype::f32)) {
    floats ? finish_as<Dtype::f32, true>(grid, tile, grids, tokens, t) : finish_as<Dtype::f32, false>(grid, tile, grids, tokens, t);
  } else {
    floats ? finish_as<Dtype::bf16, true>(grid, tile, grids, tokens, t)
           : finish_as<Dtype::bf16, false>(grid, tile, grids, tokens, t);
  }
}

void add_group(
    const qvgen::PanelGrid& grid, const qvgen::Tile& tile, const qvgen::TokenGrid* grids, int64_t group_size, bool first,
    float* values) {
  const Tokens tokens(tile, grids, group_size);
  for (int64_t n = 0; n < qvgen::PANEL; n += LANES)
    weighted<false>(grid, tile, tokens, n, [&](int row, f32x16 v) {
      float* value = values + row * qvgen::PANEL + n;
      store(value, first ? v : load<f32x16>(value) + v);
    });
}

void finish_groups(const float* values, int rows, const qvgen::TokenGrid* grids, const qvgen::Target& t) {
  for (int row = 0; row < rows; row++)
    for (int64_t n = 0; n < qvgen::PANEL; n += LANES) {
      const f32x16 v = load<f32x16>(values + row * qvgen::PANEL + n), bias = load<f32x16>(t.bias + n);
      if (t.dtype == int(Dtype::f32)) {
        output<Dtype::f32>(v, grids[row].scale, bias, row, n, t);
      } else {
        output<Dtype::bf16>(v, grids[row].scale, bias, row, n, t);
      }
    }
}

}  // namespace
