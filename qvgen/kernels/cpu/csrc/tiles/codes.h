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

  static int64_t bytes(const Header& h, int64_t tokens) {
    const int64_t padded = round_up(tokens, TILE_TOKENS);
    return padded * (tile_steps(h) * TILE_K + int64_t(sizeof(TokenGrid)) + h.groups * 4);
  }
  static TileCodes in(uint8_t* memory, const Header& h, int64_t tokens) {
    const int64_t padded = round_up(tokens, TILE_TOKENS), block_bytes = tile_steps(h) * TILE_STEP_BYTES;
    TokenGrid* grid = reinterpret_cast<TokenGrid*>(memory + padded / TILE_TOKENS * block_bytes);
    return {memory, block_bytes, grid, reinterpret_cast<int32_t*>(grid + padded), h.groups};
  }
  // The tokens from m on, a multiple of 32.
  TileCodes from(int64_t m) const {
    return {blocks + m / TILE_TOKENS * block_bytes, block_bytes, grid + m, sums + m * groups, groups};
  }
  const uint8_t* step(int64_t block, int64_t index) const { return blocks + block * block_bytes + index * TILE_STEP_BYTES; }
};

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
