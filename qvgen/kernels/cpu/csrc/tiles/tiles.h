// Linear layers on tiles of 16 x 64 bytes (AMX): what an instruction set offers to the driver, and the driver.
//
//   Codes of tokens   blocks of 32 tokens; in each, steps of 64 k; in each, two tiles of 16 tokens x 64 k: 2 KiB a step
//   Unpacked weight   32 outputs, half a panel; steps of 64 k; in each, two tiles, line r: k 4 r to 4 r + 3 of 16 outputs
//   Sums              (32 tokens, 32 outputs), four tiles
//
// A panel lies in memory in the layout of all instruction sets (layout.h), whose half steps are lines of such tiles already.
// Its codes are unpacked once for each block of tokens, into a buffer that stays in the nearer caches.
#pragma once

#include "api.h"
#include "block/block.h"

namespace qvgen {

constexpr int64_t TILE_TOKENS = 32, TILE_OUTPUTS = 32, TILE_K = 64;
constexpr int64_t TILE_STEP_BYTES = 2048;  // of codes of 32 tokens, or of 32 outputs
constexpr int64_t TILE_SUMS = TILE_TOKENS * TILE_OUTPUTS;

// Lines to bring into the second-level cache meanwhile, so many a step.
struct Ahead {
  const uint8_t *next = nullptr, *end = nullptr;
  int lines = 0;
};

// How a row of 32 outputs is written. Past the caches, two rows of bfloat16 that are neighbours go together: the first is staged.
enum class Write { plain, stage, stream };

// Outputs of 32 tokens by 32 outputs whose sums are integers of float32.
struct TileOutputs {
  int dtype;
  bool gelu;
  const PanelGrid* grid;
  const float* bias;  // (PANEL,)
  int64_t first;      // of the panel's outputs: 0 or 32
  struct {
    const float *scale, *zero_point, *sum;  // sum: of code - zero point
  } tokens;
  const int32_t* sums;  // (32, 32)
  Write how;
  void* out;       // first token's first output
  int64_t stride;  // bytes between tokens
  uint8_t* stage;  // (32, 64 bytes)
};

// What is done between the products.
struct Shadow {
  Ahead weight, codes;
  int rows = 0;  // that are left of the block before, whose sums are whole
  const TileOutputs* outputs = nullptr;
  void (*finish)(void* context, int rows) = nullptr;  // without `outputs`: the next `rows` rows
  void* context = nullptr;
};

struct TileSums {
  int32_t* first = nullptr;
  int64_t stride = 0;  // elements between tokens
};

// 32 tokens by 32 outputs over `steps` x 64 k. The sums stay in the tiles.
struct TileBlock {
  const uint8_t *codes, *weight;
  int64_t steps;
  TileSums before;  // where the sums go that the tiles hold still; null: nowhere
  TileSums from;    // what this block's begin with; null: zeros
};

struct TileKernel {
  bool emulated;
  void (*begin)();  // on the thread that calls what follows
  void (*end)();
  // 32 outputs, half a panel, of `steps` of layout.h from w on, to (tile steps, 2, 16, 64); what is missing of the last 64 k is
  // filled with zeros.
  void (*unpack)(int lane_bits, const uint8_t* w, int64_t steps, int half, uint8_t* out);
  void (*multiply)(const TileBlock&, Shadow&);
  void (*store)(const TileSums&);  // the sums that the tiles hold
  void (*finish)(const TileOutputs&, int rows);
  // Codes of one token, as Isa::token_codes, each 64 of them a step after the last 64; zeros fill the last. `ahead`: bytes from x
  // on to what will be quantized soon.
  int32_t (*quantize)(int dtype, const void* x, int64_t k, const TokenGrid&, int max_code, int64_t ahead, uint8_t* codes);
  // (32, PANEL) floats set to or added to by 32 tokens, `stride` bytes apart, of pairs of bfloat16 times (words, PANEL), a
  // multiple of 16 of them.
  void (*multiply_bf16)(const uint8_t* a, int64_t stride, const uint8_t* b, int64_t words, bool first, float* out);
  int64_t (*products)(int64_t rounds);  // as Isa::burst; 0 where it would say nothing
};

// Tiles of this thread, for as long as it lives.
struct Configured {
  const TileKernel& kernel;
  explicit Configured(const TileKernel& k) : kernel(k) { kernel.begin(); }
  ~Configured() { kernel.end(); }
};

const TileKernel* tiles_amx();  // null: not in this build
bool tiles_multiply_bf16();     // whether "amx" can run here, and its tiles multiply bfloat16

// Whether `tokens` are enough for tiles: below it the instructions of `isa` for registers are faster.
bool tiles_pay(const Isa& isa, int64_t tokens);

// Outputs of `total` tokens; layers that read the same input. Returns a qvgen_status.
int tile_outputs(const Isa& isa, const qvgen_layer* layers, int count, const Tokens& tokens, int64_t total, int threads);

// Weight-only layers with inputs in bfloat16: whether tiles are used, and their outputs.
bool dense_tiles_pay(const Isa& isa, const Tokens& tokens, int64_t total);
int dense_tile_outputs(const Isa& isa, const qvgen_layer& layer, const Tokens& tokens, int64_t total, int threads);

// For tests: as qvgen_integer_part.
void tile_integers(const Isa& isa, const Header& h, const uint8_t* a, int64_t m, int32_t* out);

}  // namespace qvgen
