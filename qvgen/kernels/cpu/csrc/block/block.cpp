#include "block/block.h"

#include <cstring>

namespace qvgen {
namespace {

void read_bias(const qvgen_layer& layer, int64_t first, int64_t count, float* bias) {
  memset(bias, 0, PANEL * sizeof(float));
  if (!layer.bias) return;
  if (layer.bias_dtype == 0) {
    memcpy(bias, static_cast<const float*>(layer.bias) + first, size_t(count) * sizeof(float));
    return;
  }
  const uint16_t* source = static_cast<const uint16_t*>(layer.bias) + first;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = uint32_t(source[i]) << 16;
    memcpy(bias + i, &bits, sizeof bits);
  }
}

}  // namespace

bool same_codes(const qvgen_layer& a, const qvgen_layer& b) {
  return a.activation_bits == b.activation_bits && a.activation_symmetric == b.activation_symmetric &&
         a.groups == b.groups && a.clips == b.clips && !memcmp(a.clip_lower, b.clip_lower, a.clips * 4) &&
         !memcmp(a.clip_upper, b.clip_upper, a.clips * 4);
}

int64_t Codes::row_stride(const Header& h) {
  int64_t stride = round_up(padded_k(h), 64);
  return stride % 4096 ? stride : stride + 64;  // rows a page apart would share few cache sets
}

int64_t Codes::bytes(const Header& h, int64_t tokens) {
  return tokens * (row_stride(h) + int64_t(sizeof(TokenGrid)) + h.groups * 4);
}

Codes Codes::in(uint8_t* memory, const Header& h, int64_t tokens) {
  TokenGrid* grid = reinterpret_cast<TokenGrid*>(memory + tokens * row_stride(h));
  return {memory, row_stride(h), grid, reinterpret_cast<int32_t*>(grid + tokens)};
}

Range token_range(const Isa& isa, const Tokens& tokens, int64_t m) {
  Range range;
  isa.token_range(tokens.dtype, tokens.at(m), tokens.k, &range.lower, &range.upper);
  return range;
}

TokenGrid grid_of(const qvgen_layer& layer, const Tokens& tokens, int64_t m, Range range) {
  const int64_t clip = tokens.timestep_group(m);
  return token_grid(
      range.lower, range.upper, layer.clip_lower[clip], layer.clip_upper[clip], layer.activation_bits,
      layer.activation_symmetric);
}

void quantize_token(
    const Isa& isa, const qvgen_layer& layer, const Tokens& tokens, int64_t m, Range range, const Codes& codes) {
  const Header& h = header(layer);
  const int64_t size = group_size(h), padded = group_steps(h) * STEP;
  const TokenGrid grid = codes.grid[m] = grid_of(layer, tokens, m, range);
  uint8_t* a = codes.a + m * codes.stride;
  int32_t* sums = codes.sums + m * h.groups;
  sums[0] = isa.token_codes(tokens.dtype, tokens.at(m), h.k, grid, max_code(layer), a);
  if (padded != size) {  // spread the groups out, the last one first
    for (int64_t g = h.groups - 1; g >= 0; g--) {
      memmove(a + g * padded, a + g * size, size);
      memset(a + g * padded + size, 0, padded - size);
    }
  }
  if (h.groups > 1)
    for (int64_t g = 0; g < h.groups; g++) sums[g] = isa.code_sum(a + g * padded, size);
}

PanelTarget::PanelTarget(const qvgen_layer& layer, int64_t p) : layer_(layer), n_(p * PANEL) {
  const int64_t left = header(layer).n - n_;
  columns_ = left < PANEL ? left : PANEL;
  read_bias(layer, n_, columns_, bias_);
}

Target PanelTarget::at(int64_t m, void* out) const {
  const int64_t n = layer_.out_features, size = layer_.out_dtype ? 2 : 4;
  return {columns_, bias_, layer_.gelu != 0, layer_.out_dtype, static_cast<uint8_t*>(out) + (m * n + n_) * size, n};
}

void panel_outputs(const Isa& isa, const qvgen_layer& layer, int64_t p, const Codes& codes, int64_t count, void* out) {
  const Header& h = header(layer);
  const int64_t steps = group_steps(h);
  const PanelTarget target(layer, p);
  alignas(64) int32_t sums[TILE_ROWS * PANEL];
  alignas(64) float values[TILE_ROWS * PANEL];
  for (int64_t m = 0; m < count; m += TILE_ROWS) {
    const int rows = int(count - m < TILE_ROWS ? count - m : TILE_ROWS);
    const Codes here = codes.from(m, h);
    for (int64_t g = 0; g < h.groups; g++) {
      const uint8_t* weight = panel(h, p) + g * steps * step_bytes(h);
      const Tile tile = {rows, here.a + g * steps * STEP, here.stride, weight, steps, max_code(layer),
                         here.sums + g, h.groups, sums, here.a + TILE_ROWS * here.stride};
      isa.tile(h.lane_bits, h.weight_bits, tile);
      if (h.groups == 1) {
        isa.finish(panel_grid(h, p, 0), tile, here.grid, h.weight_bits, h.k, target.at(m, out));
      } else {
        isa.add_group(panel_grid(h, p, g), tile, here.grid, group_size(h), g == 0, values);
      }
    }
    if (h.groups > 1) isa.finish_groups(values, rows, here.grid, target.at(m, out));
  }
}

}  // namespace qvgen
