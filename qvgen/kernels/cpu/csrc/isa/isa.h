// What the code of one instruction set offers to the drivers, which are compiled once for all of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace qvgen {

constexpr int TILE_ROWS = 6;

// The grid of one token, and sums of its codes per group of the weight.
struct TokenGrid {
  float scale;         // NaN if the token holds NaN or Inf
  int32_t zero_point;
};

// A tile: up to TILE_ROWS tokens by the outputs of one panel, over one group of k.
struct Tile {
  int rows;
  const uint8_t* a;       // codes of the first token at the group's first k
  ptrdiff_t stride;       // bytes between tokens
  const uint8_t* weight;  // panel at the group's first step
  int64_t steps;
  int max_code;           // largest activation code
  const int32_t* a_sum;   // sum of the codes of each token over the group; elements apart: sum_stride
  ptrdiff_t sum_stride;
  int32_t* out;           // (rows, PANEL): sum over k of a (q - offset)
  const uint8_t* next = nullptr;  // codes that will be wanted next: a line per step may be prefetched from here
};

// Whether all partial results of an output are integers of float32.
inline bool sums_are_small(int max_code, int weight_bits, int64_t k) { return (int64_t(max_code) << weight_bits) * k < 1 << 24; }

// Where a tile's outputs go, and which of the panel are wanted.
struct Target {
  int64_t columns;    // of the panel that exist
  const float* bias;  // (PANEL,)
  bool gelu;
  int dtype;
  void* out;       // first token's first output of this panel
  int64_t stride;  // elements between tokens
  int64_t first = 0, end = PANEL;  // whole vectors
};

// Normalization of rows of `features` elements; absent parts are null. Modulation (scale, shift) is (groups, features).
struct LayerNorm {
  int64_t features;
  float eps;
  const float *weight, *bias, *scale, *shift;
};

struct RmsNorm {
  int64_t features, head_features;
  float eps;
  const float *weight, *cosine, *sine;  // cosine, sine: (positions, head_features)
};

// Fake quantization in training: rows of `features` numbers with a grid each.
struct FakeQuantizer {
  int64_t features;
  float max_code;
  bool float_zero_point;            // added before rounding; else after it
  const float *scale, *zero_point;  // (rows,)
};

// Attention of one head whose keys are few. Matrices have rows of `stride` elements.
constexpr int64_t SHORT_KEYS = 512, SHORT_FEATURES = 256;  // at most; features are whole vectors of 16
struct ShortAttention {
  int64_t queries, keys, features, stride;
  float scale;

  int64_t padded_keys() const { return (keys + PANEL - 1) / PANEL * PANEL; }
  int64_t padded_features() const { return (features + PANEL - 1) / PANEL * PANEL; }
  // Floats that short_attention works in.
  int64_t memory() const { return padded_keys() * (features + 2 * TILE_ROWS) + keys * padded_features(); }
};

struct TileKernel;

// Weights of a weight-only layer for its products: float32, float32 rounded to bfloat16, or pairs of bfloat16, (k / 2, PANEL).
enum class Dense : int { floats, rounded, pairs };

struct Isa {
  const char* name;
  bool (*supported)();
  const char* (*refusal)();  // why not, where more is to be said than that the processor lacks it; else null
  void (*tile)(int lane_bits, int weight_bits, const Tile&);
  // Range of a token, always including 0; NaN where it holds NaN or Inf.
  void (*token_range)(int dtype, const void* x, int64_t k, float* lower, float* upper);
  // Codes of a token; returns their sum.
  int32_t (*token_codes)(int dtype, const void* x, int64_t k, const TokenGrid&, int max_code, uint8_t* codes);
  int32_t (*code_sum)(const uint8_t* codes, int64_t count);
  // A tile of a weight with one group: outputs.
  void (*finish)(const PanelGrid&, const Tile&, const TokenGrid* tokens, int weight_bits, int64_t k, const Target&);
  // A tile of one group of several: values (rows, PANEL) without the token's scale, set by the first group, else added to.
  void (*add_group)(
      const PanelGrid&, const Tile&, const TokenGrid* tokens, int64_t group_size, bool first, float* values);
  // Outputs from the values of all groups.
  void (*finish_groups)(const float* values, int rows, const TokenGrid* tokens, const Target&);
  // One row each: ((x - mean) / deviation * weight + bias) * (1 + scale) + shift; RMS norm, then rotary embedding; x + y * gate.
  void (*layer_norm)(int dtype, const void* x, const LayerNorm&, int64_t group, void* out);
  void (*rms_norm)(int dtype, const void* x, const RmsNorm&, int64_t position, void* out);
  void (*add_gated)(int dtype, const void* x, const void* y, const float* gate, int64_t features, void* out);
  // softmax(q k^T scale) v of one head; `memory`: aligned to a register.
  void (*short_attention)(
      int dtype, const ShortAttention&, const void* q, const void* k, const void* v, void* out, float* memory);
  // One row: its values on the grid; gradients of the row, and of its scale and zero point at [row].
  void (*fake_quantize)(const FakeQuantizer&, int64_t row, const float* x, float* out);
  void (*fake_quantize_backward)(
      const FakeQuantizer&, int64_t row, const float* grad, const float* x, float* grad_x, float* grad_scale,
      float* grad_zero_point);
  // Steps of Strassen's algorithm (strassen_terms.h); null where tiles of 8 lane bits do not take any signed byte as weight.
  void (*token_terms)(
      const uint8_t* above, const uint8_t* below, int64_t half, uint8_t* out, int64_t term_stride, uint8_t shift);
  void (*weight_terms)(int term, const uint8_t* left, const uint8_t* right, int64_t bytes, uint8_t* out);
  void (*add_product)(const int32_t* product, int sign, const int32_t* start, int32_t* total);
  // As many of the instructions that tiles are made of as can run at a time, and nothing else; returns the multiply-adds.
  int64_t (*burst)(int64_t rounds);
  // Weight-only layers: `steps` of a panel, as (k, PANEL); (rows, PANEL) set to or added to by rows, `stride` bytes apart, of
  // words (a float or a pair of bfloat16) times (words, PANEL).
  void (*dequantize)(
      int lane_bits, int weight_bits, const uint8_t* w, int64_t steps, const float* scale, const float* zero_point, Dense form,
      void* out);
  void (*dense_tile)(
      Dense form, int rows, const void* a, int64_t stride, const void* b, int64_t words, bool first, float* out);
  // As `burst`, of the instructions of dense tiles; pairs: null where there is none.
  int64_t (*burst_floats)(int64_t rounds);
  int64_t (*burst_pairs)(int64_t rounds);
  const TileKernel* tiles;  // products of larger tiles, with instructions made for them (tiles/tiles.h); null: none
};

const Isa* find_isa(const char* name);  // null: unknown, or not on this machine
const Isa* isa_amx();
const Isa* isa_avx512bf16();
const Isa* isa_avx512vnni();
const Isa* isa_avxvnni();
const Isa* isa_avx2();
const Isa* isa_neon_dotprod();
const Isa* isa_neon();
const Isa* isa_portable();

// Multiply-adds per cycle of the instruction that tiles of `isa` are made of, measured (a third of a millisecond); 0: unknown.
double peak(const Isa& isa);

TokenGrid token_grid(float lower, float upper, float clip_lower, float clip_upper, int bits, bool symmetric);

}  // namespace qvgen
