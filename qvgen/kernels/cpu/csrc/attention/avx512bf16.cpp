// Attention in bfloat16 with AVX512_BF16 (64 multiply-adds per cycle on Zen 5 and newer Xeons): PyTorch's own attention on the CPU
// takes a third of a denoising step and runs at a sixth of that rate (LOG.md, `python -m bench.dit_step`).
//
// For each head, keys and values are first laid out in panels of 64, pairs of bfloat16 side by side as the instruction
// multiplies them. Then blocks of queries pass over blocks of keys that stay in the second-level cache, with the softmax
// kept up to date from block to block (Milakov and Gimelshein, arXiv 1805.02867). Sums and the softmax are in float32;
// probabilities are rounded to bfloat16 before they meet the values, as in PyTorch.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)

#include "attention/panels.h"

namespace {

#define INLINE inline __attribute__((always_inline))

constexpr int64_t WIDTH = qvgen::ATTENTION_WIDTH, QUERIES = 96;
constexpr int64_t ROWS = 6;         // of a tile
constexpr int64_t KEY_PANELS = 10;  // at most, in a block
constexpr int64_t MOST_FEATURES = 256;
constexpr float LOG2_E = 1.44269504f, INFINITE = 3e38f;

// One instruction each, as in isa/avx512vnni.cpp and for the same reason.
INLINE void dot(f32v& sum, s32v a, s32v b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
INLINE s32v broadcast(const uint16_t* pair) {
  s32v v;
  asm volatile("vpbroadcastd %1, %0" : "=v"(v) : "m"(*(const int32_t*)pair));
  return v;
}
INLINE s32v load_pairs(const uint32_t* pairs) {
  s32v v;
  asm volatile("vmovdqu64 %1, %0" : "=v"(v) : "m"(*(const s32v*)pairs));
  return v;
}
INLINE void store_rounded(uint16_t* out, f32v v) {
  u16v rounded;
  asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
  store(out, rounded);
}

// out (ROWS, WIDTH) = a (ROWS, 2 pairs) b (pairs, WIDTH).
template <int R>
void tile_rows(const uint16_t* a, int64_t stride, const uint32_t* b, int64_t pairs, float* out) {
  f32v total[R][4];
#pragma GCC unroll 6
  for (int row = 0; row < R; row++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) total[row][i] = splat(0.0f);
  const uint16_t* a3 = a + 3 * stride;
  for (int64_t pair = 0; pair < pairs; pair++, a += 2, a3 += 2, b += WIDTH) {
    s32v column[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) column[i] = load_pairs(b + i * LANES);
#pragma GCC unroll 6
    for (int row = 0; row < R; row++) {
      const s32v v = broadcast(row < 3 ? a + row * stride : a3 + (row - 3) * stride);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) dot(total[row][i], v, column[i]);
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < R; row++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) store(out + row * WIDTH + i * LANES, total[row][i]);
}

void tile(int64_t rows, const uint16_t* a, int64_t stride, const uint32_t* b, int64_t pairs, float* out) {
  switch (rows) {
    case 1: return tile_rows<1>(a, stride, b, pairs, out);
    case 2: return tile_rows<2>(a, stride, b, pairs, out);
    case 3: return tile_rows<3>(a, stride, b, pairs, out);
    case 4: return tile_rows<4>(a, stride, b, pairs, out);
    case 5: return tile_rows<5>(a, stride, b, pairs, out);
    default: return tile_rows<6>(a, stride, b, pairs, out);
  }
}

using Shape = qvgen::AttentionShape;

struct alignas(64) State {  // of a block of queries
  float out[QUERIES][MOST_FEATURES];
  float most[QUERIES], total[QUERIES];  // of the scores so far, in powers of two; of 2^(score - most)
  float scores[KEY_PANELS][ROWS * WIDTH];
  uint16_t probabilities[ROWS][KEY_PANELS * WIDTH];
  float product[ROWS * WIDTH];
};

// Scores of one row over `panels` panels to probabilities; what was there before shrinks to the new maximum.
void update_softmax(const Shape& s, State& state, int64_t query, int64_t row, int64_t panels, int64_t valid) {
  for (int64_t key = valid; key < panels * WIDTH; key++) state.scores[key / WIDTH][row * WIDTH + key % WIDTH] = -INFINITE;
  f32v high = splat(-INFINITE);
  for (int64_t p = 0; p < panels; p++)
    for (int64_t i = 0; i < WIDTH; i += LANES) {
      float* at = state.scores[p] + row * WIDTH + i;
      const f32v v = load<f32v>(at) * (s.scale * LOG2_E);
      store(at, v);
      high = maximum(v, high);
    }
  const float before = state.most[query], most = largest(maximum(high, splat(before)));
  f32v total = {};
  for (int64_t p = 0; p < panels; p++)
    for (int64_t i = 0; i < WIDTH; i += LANES) {
      const f32v v = power_of_two(load<f32v>(state.scores[p] + row * WIDTH + i) - most);
      total += v;
      store_rounded(state.probabilities[row] + p * WIDTH + i, v);
    }
  const float shrink = power_of_two(splat(before - most))[0];
  state.most[query] = most;
  state.total[query] = state.total[query] * shrink + sum(total);
  if (shrink != 1)
    for (int64_t f = 0; f < s.features; f += LANES)
      store(&state.out[query][f], load<f32v>(&state.out[query][f]) * shrink);
}

void attend(const Shape& s, const uint16_t* q, int64_t queries, const uint32_t* panels, uint16_t* out, void* memory) {
  State& state = *(State*)memory;
  for (int64_t i = 0; i < queries; i++) {
    state.most[i] = -INFINITE, state.total[i] = 0;
    __builtin_memset(state.out[i], 0, sizeof state.out[i]);
  }
  const uint32_t *keys = panels, *values = panels + s.key_panels() * s.panel_keys();
  const int64_t blocks = (s.key_panels() + KEY_PANELS - 1) / KEY_PANELS, size = (s.key_panels() + blocks - 1) / blocks;
  for (int64_t first = 0; first < s.key_panels(); first += size) {
    const int64_t count = s.key_panels() - first < size ? s.key_panels() - first : size;
    for (int64_t query = 0; query < queries; query += ROWS) {
      const int64_t rows = queries - query < ROWS ? queries - query : ROWS;
      for (int64_t p = 0; p < count; p++)
        tile(rows, q + query * s.stride(), s.stride(), keys + (first + p) * s.panel_keys(), s.features / 2, state.scores[p]);
      for (int64_t row = 0; row < rows; row++)
        update_softmax(s, state, query + row, row, count, s.keys - first * WIDTH);
      for (int64_t f = 0; f < s.feature_panels(); f++)
        for (int64_t p = 0; p < count; p++) {
          const uint32_t* b = values + (first + p) * s.panel_values() + f * (WIDTH / 2 * WIDTH);
          tile(rows, state.probabilities[0] + p * WIDTH, KEY_PANELS * WIDTH, b, WIDTH / 2, state.product);
          for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < WIDTH; i += LANES) {
              float* at = &state.out[query + row][f * WIDTH + i];
              store(at, load<f32v>(at) + load<f32v>(state.product + row * WIDTH + i));
            }
        }
    }
  }
  for (int64_t i = 0; i < queries; i++)
    for (int64_t f = 0; f < s.features; f += LANES)
      store_float<Dtype::bf16>(out + i * s.stride(), f, load<f32v>(&state.out[i][f]) * (1 / state.total[i]));
}

bool supported() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

}  // namespace

const qvgen::AttentionKernel* qvgen::attention_avx512bf16() {
  static constexpr AttentionKernel kernel = {"avx512bf16", supported, MOST_FEATURES, QUERIES, int64_t(sizeof(State)), lay_out, attend};
  return &kernel;
}

#else
#include "attention/attention.h"

const qvgen::AttentionKernel* qvgen::attention_avx512bf16() { return nullptr; }

#endif
