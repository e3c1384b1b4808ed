// Codes of tokens in the order of tiles (tiles.h).
#pragma once

#include "tiles/tiles.h"

namespace qvgen {

// Steps of 64 k of a group; of the whole weight.
inline int64_t tile_group_steps(const Header& h) { return (group_steps(h) * STEP + TILE_K - 1) / TILE_K; }
inline int64_t tile_steps(const Header& h) { return h.groups * tile_group_steps(h); }

struct TileCodes {
  uint8_t* blocks;  // (tokens / 32, steps, 2, 16, 64)
  int64_t block_bytes;
  TokenGrid* grid;
  int32_t* sums;  // (tokens, groups)
  int64_t groups;
  float *scale, *zero_point, *sum;  // (tokens,), where there is one group; sum: of code - zero point

  static int64_t bytes(const Header& h, int64_t tokens) {
    const int64_t padded = round_up(tokens, TILE_TOKENS);
    return padded * (tile_steps(h) * TILE_K + int64_t(sizeof(TokenGrid)) + h.groups * 4 + 3 * int64_t(sizeof(float)));
  }
  static TileCodes in(uint8_t* memory, const Header& h, int64_t tokens) {
    const int64_t padded = round_up(tokens, TILE_TOKENS), block_bytes = tile_steps(h) * TILE_STEP_BYTES;
    TokenGrid* grid = reinterpret_cast<TokenGrid*>(memory + padded / TILE_TOKENS * block_bytes);
    int32_t* const sums = reinterpret_cast<int32_t*>(grid + padded);
    float* const floats = reinterpret_cast<float*>(sums + padded * h.groups);
    return {memory, block_bytes, grid, sums, h.groups, floats, floats + padded, floats + 2 * padded};
  }
  // The tokens from m on, a multiple of 32.
  TileCodes from(int64_t m) const {
    return {blocks + m / TILE_TOKENS * block_bytes, block_bytes, grid + m, sums + m * groups, groups, scale + m, zero_point + m, sum + m};
  }
  const uint8_t* step(int64_t block, int64_t index) const { return blocks + block * block_bytes + index * TILE_STEP_BYTES; }
};

// Where the codes of token m begin.
inline uint8_t* token_codes(const TileCodes& codes, int64_t m) {
  return codes.blocks + m / TILE_TOKENS * codes.block_bytes + m % TILE_TOKENS * TILE_K;
}

// Put the codes of token m, in their order along k with groups padded to STEP, into `codes`; null: zeros.
void write_token(const Header& h, const uint8_t* row, int64_t m, const TileCodes& codes);

// The outputs, or sums, of a block of tokens over panels, by one thread that has configured its tiles.
struct TileTask {
  const Isa& isa;
  const Header& h;
  const qvgen_layer* layer;  // null: `integers` are wanted
  TileCodes codes;
  int64_t tokens;
  uint8_t* out;       // (tokens, N)
  int32_t* integers;  // (tokens, N)
  bool stream;        // past the caches
};
void run_task(const TileTask& task, int64_t first_panel, int64_t end_panel);

}  // namespace qvgen
