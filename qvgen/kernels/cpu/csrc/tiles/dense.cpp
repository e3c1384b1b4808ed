// Weight-only layers on tiles, for inputs in bfloat16: a piece of a panel becomes pairs of bfloat16, as in linear/dense.cpp, and
// meets every token of a block, 32 at a time, whose rows are tiles where they lie.
#include "linear/dense.h"

#include <cstring>

#include "threads/parallel.h"
#include "threads/workspace.h"
#include "tiles/tiles.h"

namespace qvgen {
namespace {

constexpr int64_t PIECE_STEPS = 24;           // 24 KiB, which stay in the first level
constexpr int64_t TILE_PAIRS = 16;            // of k
constexpr int64_t BLOCK_BYTES = 1 << 20;      // of inputs, which stay in the second level
constexpr int64_t LEAST_BLOCK = 256;          // tokens that share a piece all the same
constexpr int64_t LEAST_TOKENS = 16;          // at 12 rows of registers are as fast, at 24 tiles 1.6 times
constexpr int64_t WORTH_A_THREAD = 1 << 20;   // multiply-adds

thread_local Workspace input_memory, piece_memory, value_memory, rest_memory;

struct Input {
  const uint8_t* x;
  int64_t stride, group_stride;  // bytes
};

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Panel p for `count` tokens from token m on.
void outputs(const Isa& isa, const qvgen_layer& layer, int64_t p, const Input& input, int64_t m, int64_t count) {
  constexpr int64_t WORD = 4, STEP_WORDS = STEP / 2, PIECE_BYTES = PIECE_STEPS * STEP_WORDS * PANEL * WORD;
  constexpr int64_t REST_STRIDE = PIECE_STEPS * STEP_WORDS * WORD + 64;  // not a multiple of 256: rows would share cache sets
  const Header& h = header(layer);
  const Configured configured(*isa.tiles);
  const int64_t steps = group_steps(h), padded = round_up(count, TILE_TOKENS), whole = count / TILE_TOKENS * TILE_TOKENS;
  uint8_t* const piece = piece_memory.get(PIECE_BYTES);
  uint8_t* const rest = rest_memory.get(TILE_TOKENS * REST_STRIDE);
  float* const values = reinterpret_cast<float*>(value_memory.get(padded * PANEL * int64_t(sizeof(float))));
  for (int64_t g = 0; g < h.groups; g++) {
    const PanelGrid& grid = panel_grid(h, p, g);
    alignas(64) float zero_point[PANEL];
    read_zero_points(h, grid, zero_point);
    for (int64_t step = 0; step < steps; step += PIECE_STEPS) {
      const int64_t some = least(steps - step, PIECE_STEPS), words = round_up(some * STEP_WORDS, TILE_PAIRS);
      const uint8_t* const weight = panel(h, p) + (g * steps + step) * step_bytes(h);
      isa.dequantize(h.lane_bits, h.weight_bits, weight, some, grid.scale, zero_point, Dense::pairs, piece);
      memset(piece + some * STEP_WORDS * PANEL * WORD, 0, size_t((words - some * STEP_WORDS) * PANEL * WORD));
      const uint8_t* const x = input.x + m * input.stride + g * input.group_stride + step * STEP_WORDS * WORD;
      const bool first = g == 0 && step == 0;
      for (int64_t i = 0; i < whole; i += TILE_TOKENS)
        isa.tiles->multiply_bf16(x + i * input.stride, input.stride, piece, words, first, values + i * PANEL);
      if (whole == count) continue;
      for (int64_t i = 0; i < TILE_TOKENS; i++) {  // tokens that do not exist are zeros
        uint8_t* const to = rest + i * REST_STRIDE;
        if (whole + i < count) {
          memcpy(to, x + (whole + i) * input.stride, size_t(words * WORD));
        } else {
          memset(to, 0, size_t(words * WORD));
        }
      }
      isa.tiles->multiply_bf16(rest, REST_STRIDE, piece, words, first, values + whole * PANEL);
    }
  }
  TokenGrid ones[TILE_ROWS];
  for (TokenGrid& grid : ones) grid = {1, 0};
  const PanelTarget target(layer, p);
  for (int64_t i = 0; i < count; i += TILE_ROWS)
    isa.finish_groups(values + i * PANEL, int(least(count - i, TILE_ROWS)), ones, target.at(m + i, layer.out));
}

}  // namespace

bool dense_tiles_pay(const Isa& isa, const Tokens& tokens, int64_t total) {
  return isa.tiles && tokens.dtype && total >= LEAST_TOKENS && tiles_multiply_bf16();
}

int dense_tile_outputs(const Isa& isa, const qvgen_layer& layer, const Tokens& tokens, int64_t total, int threads) {
  constexpr int64_t SIZE = 2;
  const Header& h = header(layer);
  const int64_t worth = 1 + total * h.k * h.n / WORTH_A_THREAD, size = group_size(h), padded = round_up(size, TILE_PAIRS * 2);
  if (worth < threads) threads = int(worth);
  Input input = {static_cast<const uint8_t*>(tokens.x), h.k * SIZE, size * SIZE};
  if (padded != size) {  // groups to whole tiles: what would be read beyond them may be NaN, which no zero of a weight hides
    input.group_stride = padded * SIZE, input.stride = h.groups * input.group_stride;
    uint8_t* const copy = input_memory.get(total * input.stride);
    input.x = copy;
    const int status = parallel_for(threads, total, [&](int64_t m) {
      for (int64_t g = 0; g < h.groups; g++) {
        uint8_t* const to = copy + m * input.stride + g * input.group_stride;
        memcpy(to, static_cast<const uint8_t*>(tokens.at(m)) + g * size * SIZE, size_t(size * SIZE));
        memset(to + size * SIZE, 0, size_t((padded - size) * SIZE));
      }
    });
    if (status) return status;
  }
  const int64_t near = BLOCK_BYTES / input.stride, most = near < LEAST_BLOCK ? LEAST_BLOCK : near;
  const int64_t blocks = (total + most - 1) / most, block = round_up((total + blocks - 1) / blocks, TILE_TOKENS);
  return parallel_for(threads, panels(h) * blocks, [&](int64_t i) {
    const int64_t m = i / panels(h) * block, left = total - m;
    if (left > 0) outputs(isa, layer, i % panels(h), input, m, least(left, block));
  });
}

}  // namespace qvgen
