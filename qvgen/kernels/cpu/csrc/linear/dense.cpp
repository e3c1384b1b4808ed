// Weight-only layers: a piece of a panel becomes floating point, meets every token of a block, and is forgotten.
//
// Weights are those of the reference to the last bit: (q - z) scale in float32, rounded to bfloat16 where inputs are bfloat16.
// Products are summed in float32, in pieces of k whose sums are then added up.
#include "linear/dense.h"

#include <chrono>
#include <cstring>

#include "threads/parallel.h"
#include "threads/workspace.h"
#include "tiles/tiles.h"

namespace qvgen {
namespace {

constexpr int64_t BLOCK_TOKENS = 768;         // that share a dequantized piece
constexpr int64_t PIECE_BYTES = 24 << 10;     // which stays in the first-level cache
constexpr int64_t WORTH_A_THREAD = 1 << 18;   // multiply-adds

thread_local Workspace input_memory, piece_memory, value_memory;

// The instruction for pairs makes 64 multiply-adds per cycle on Zen 5 and 15 on Sapphire Rapids, that for floats 32 on both.
bool pairs_are_faster(const Isa& isa) {
  if (!isa.burst_pairs) return false;
  static const bool faster = [&] {
    const auto rate = [](int64_t (*burst)(int64_t)) {
      double best = 0;
      for (int i = 0; i < 8; i++) {
        const auto started = std::chrono::steady_clock::now();
        const int64_t products = burst(1 << 10);
        const double rate = double(products) / std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
        if (rate > best) best = rate;
      }
      return best;
    };
    return rate(isa.burst_pairs) > rate(isa.burst_floats);
  }();
  return faster;
}

float as_float(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// `count` elements of x from `first` on, as `form` wants them, zeros up to `padded`.
void copy_elements(const Tokens& tokens, int64_t m, int64_t first, int64_t count, int64_t padded, Dense form, uint8_t* to) {
  const int64_t size = form == Dense::pairs ? 2 : 4;
  const uint8_t* from = static_cast<const uint8_t*>(tokens.at(m)) + first * (tokens.dtype ? 2 : 4);
  if (form == Dense::rounded) {
    float* values = reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < count; i++) {
      uint16_t half;
      memcpy(&half, from + 2 * i, sizeof half);
      values[i] = as_float(half);
    }
  } else {
    memcpy(to, from, size_t(count * size));
  }
  memset(to + count * size, 0, size_t((padded - count) * size));
}

struct Input {
  const uint8_t* x;
  int64_t stride;  // bytes
};

// Panel p for `count` tokens from token m on.
void outputs(const Isa& isa, const qvgen_layer& layer, int64_t p, Dense form, const Input& input, int64_t m, int64_t count) {
  const Header& h = header(layer);
  const int64_t steps = group_steps(h), size = form == Dense::pairs ? 2 : 4, most = PIECE_BYTES / (PANEL * size * STEP);
  uint8_t* const piece = piece_memory.get(PIECE_BYTES);
  float* const values = reinterpret_cast<float*>(value_memory.get(count * PANEL * int64_t(sizeof(float))));
  for (int64_t g = 0; g < h.groups; g++) {
    const PanelGrid& grid = panel_grid(h, p, g);
    alignas(64) float zero_point[PANEL];
    read_zero_points(h, grid, zero_point);
    for (int64_t step = 0; step < steps; step += most) {
      const int64_t some = steps - step < most ? steps - step : most, at = g * steps + step;
      isa.dequantize(
          h.lane_bits, h.weight_bits, panel(h, p) + at * step_bytes(h), some, grid.scale, zero_point, form, piece);
      for (int64_t i = 0; i < count; i += TILE_ROWS) {
        const int rows = int(count - i < TILE_ROWS ? count - i : TILE_ROWS);
        const uint8_t* x = input.x + (m + i) * input.stride + at * STEP * size;
        isa.dense_tile(form, rows, x, input.stride, piece, some * STEP * size / 4, at == 0, values + i * PANEL);
      }
    }
  }
  TokenGrid ones[TILE_ROWS];
  for (TokenGrid& grid : ones) grid = {1, 0};
  const PanelTarget target(layer, p);
  for (int64_t i = 0; i < count; i += TILE_ROWS)
    isa.finish_groups(
        values + i * PANEL, int(count - i < TILE_ROWS ? count - i : TILE_ROWS), ones, target.at(m + i, layer.out));
}

}  // namespace

void read_zero_points(const Header& h, const PanelGrid& grid, float* zero_point) {
  for (int64_t n = 0; n < PANEL; n++)
    zero_point[n] = float(grid.zero_whole[n] + field_offset(h.weight_bits, int(n / FIELD))) + grid.zero_fraction[n];
}

int dense_outputs(const Isa& isa, const qvgen_layer& layer, const Tokens& tokens, int64_t total, int threads) {
  if (dense_tiles_pay(isa, tokens, total)) return dense_tile_outputs(isa, layer, tokens, total, threads);
  const Header& h = header(layer);
  const Dense form = !tokens.dtype ? Dense::floats : pairs_are_faster(isa) ? Dense::pairs : Dense::rounded;
  const int64_t worth = 1 + total * h.k * h.n / WORTH_A_THREAD, size = group_size(h), padded = group_steps(h) * STEP;
  if (worth < threads) threads = int(worth);
  Input input = {static_cast<const uint8_t*>(tokens.x), h.k * (tokens.dtype ? 2 : 4)};
  if (padded != size || form == Dense::rounded) {
    const int64_t bytes = form == Dense::pairs ? 2 : 4;
    input.stride = h.groups * padded * bytes;
    uint8_t* const copy = input_memory.get(total * input.stride);
    input.x = copy;
    const int status = parallel_for(threads, total, [&](int64_t m) {
      for (int64_t g = 0; g < h.groups; g++)
        copy_elements(tokens, m, g * size, size, padded, form, copy + m * input.stride + g * padded * bytes);
    });
    if (status) return status;
  }
  const int64_t blocks = (total + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
  const int64_t most = round_up((total + blocks - 1) / blocks, TILE_ROWS);
  return parallel_for(threads, panels(h) * blocks, [&](int64_t i) {
    const int64_t m = i % blocks * most, left = total - m;
    if (left > 0) outputs(isa, layer, i / blocks, form, input, m, left < most ? left : most);
  });
}

}  // namespace qvgen
