// Attention in bfloat16 on AMX tiles: twice 32 queries and 512 keys at a time, so that keys and values, which come from the
// second-level cache, are read once for both.
//
// Scores, softmax and products with values follow one another. Softmax between the products was tried, in slices of 4 to 40
// vectors: no gain, because beside products of tiles vectors run at less than half their rate (LOG.md).
//
// Panels, softmax and rounding are those of avx512bf16.cpp; sums of products are in another order.
#if defined(__x86_64__) && (defined(QVGEN_HAVE_AMX) || defined(QVGEN_AMX_EMULATED))

#include "attention/panels.h"
#include "isa/tiles.h"
#include "tiles/tiles.h"

namespace {

constexpr int64_t WIDTH = qvgen::ATTENTION_WIDTH, LINE = WIDTH * 4;  // bytes from line to line of a tile in a panel
constexpr int64_t ROWS = 32;    // queries of a unit
constexpr int64_t UNITS = 2;
constexpr int64_t CHUNK = 32;   // keys, or features, of four tiles
constexpr int64_t KEYS = 512;   // of a unit, at most
constexpr int64_t QUARTER = 256;  // elements of a tile of sums
constexpr int64_t MOST_FEATURES = 256, QUERIES = 192;
// Elements from chunk to chunk: were it 4096 bytes, all numbers of a row would lie in one set of the first-level cache.
constexpr int64_t SCORES = ROWS * CHUNK + 16, PROBABILITIES = ROWS * CHUNK + 32;
constexpr float LOG2_E = 1.44269504f, INFINITE = 3e38f;

using Shape = qvgen::AttentionShape;

// 2^v, 0 far below: to less than a bfloat16's rounding where the processor has the two instructions for it.
INLINE f32v power(f32v v) {
#ifdef __AVX512F__
  f32v n, raised;
  asm("vrndscaleps $8, %1, %0" : "=v"(n) : "v"(v));
  const f32v r = v - n;
  f32v p = splat(9.6181291e-3f);
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  asm("vscalefps %2, %1, %0" : "=v"(raised) : "v"(p), "v"(n));
  return raised;
#else
  return power_of_two(v);
#endif
}

// Of 32 queries, for as long as their keys last. Element (i, j) of sums: chunk j / 32; in it tile (i / 16, j % 32 / 16); in it
// (i % 16, j % 16).
struct alignas(64) Block {
  float out[MOST_FEATURES / CHUNK][ROWS * CHUNK];
  float most[ROWS], total[ROWS];  // of the scores so far; of 2^(score - most)
};

// 32 queries and up to 512 keys.
struct alignas(64) Unit {
  float scores[KEYS / CHUNK][SCORES];
  uint16_t probabilities[KEYS / CHUNK][PROBABILITIES];  // (chunk, row, 32)
  float shrink[ROWS];                                   // of what was there before, for the new maximum
};

struct alignas(64) State {
  uint16_t queries[UNITS][MOST_FEATURES / CHUNK][ROWS * CHUNK];
  Block blocks[UNITS];
  Unit units[UNITS];
};

INLINE int64_t place(int64_t row) { return row / 16 * 2 * QUARTER + row % 16 * 16; }

// f(score, probability, half) for each vector of a row.
template <class F>
INLINE void each_score(Unit& unit, int64_t row, int64_t chunks, const F& f) {
  for (int64_t j = 0; j < chunks; j++)
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; half++)
      for (int64_t i = 0; i < 16; i += LANES)
        f(unit.scores[j] + place(row) + half * QUARTER + i, unit.probabilities[j] + row * CHUNK + half * 16 + i, half);
}

// Scores to probabilities; `scale` of scores, in powers of two; `start`: of the block's keys.
void softmax(Unit& unit, Block& block, float scale, int64_t chunks, int64_t keys, bool start) {
  for (int64_t row = 0; row < ROWS; row++) {
    for (int64_t key = keys; key < chunks * CHUNK; key++)
      unit.scores[key / CHUNK][place(row) + key % CHUNK / 16 * QUARTER + key % 16] = -INFINITE;
    if (start) block.most[row] = -INFINITE, block.total[row] = 0;
    f32v high[2] = {splat(-INFINITE), splat(-INFINITE)};
    each_score(unit, row, chunks, [&](const float* score, uint16_t*, int64_t half) {
      high[half] = maximum(load<f32v>(score), high[half]);
    });
    const float before = block.most[row], most = largest(maximum(maximum(high[0], high[1]), splat(before)));
    block.most[row] = most, unit.shrink[row] = start ? 1 : power(splat((before - most) * scale))[0];
    const f32v factor = splat(scale), minus = splat(-most * scale);
    f32v total[2] = {};
    each_score(unit, row, chunks, [&](const float* score, uint16_t* to, int64_t half) {
      const f32v v = power(load<f32v>(score) * factor + minus);
      total[half] += v;
      store(to, to_bf16(v));
    });
    block.total[row] = block.total[row] * unit.shrink[row] + sum(total[0] + total[1]);
  }
}

// The four tiles of sums, one after the other.
INLINE void store_sums(float* to) {
  tile_store<0>(to, 64), tile_store<1>(to + QUARTER, 64);
  tile_store<2>(to + 2 * QUARTER, 64), tile_store<3>(to + 3 * QUARTER, 64);
}
INLINE void load_sums(const float* from) {
  tile_load<0>(from, 64), tile_load<1>(from + QUARTER, 64);
  tile_load<2>(from + 2 * QUARTER, 64), tile_load<3>(from + 3 * QUARTER, 64);
}
INLINE void zero_sums() { tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(); }

// Sums += a (32, 32) times b (32, 32).
INLINE void multiply(const uint16_t* a, const uint32_t* b) {
  tile_load<4>(a, 64), tile_load<6>(b, LINE), tile_dot_bf16<0, 4, 6>();
  tile_load<7>(b + 16, LINE), tile_dot_bf16<1, 4, 7>();
  tile_load<5>(a + 16 * CHUNK, 64), tile_dot_bf16<2, 5, 6>(), tile_dot_bf16<3, 5, 7>();
}

// Scores of `chunks` x 32 keys from chunk `first` on, of `count` units.
void multiply_keys(const Shape& s, State& state, const uint32_t* keys, int64_t first, int64_t chunks, int64_t count) {
  for (int64_t j = 0; j < chunks; j++)
    for (int64_t unit = 0; unit < count; unit++) {
      const uint32_t* b = keys + (first + j) / 2 * s.panel_keys() + (first + j) % 2 * CHUNK;
      zero_sums();
      for (int64_t piece = 0; piece < s.pairs() / 16; piece++, b += 16 * WIDTH) multiply(state.queries[unit][piece], b);
      store_sums(state.units[unit].scores[j]);
    }
}

// Add probabilities x values to what there was, shrunk to the new maximum.
void multiply_values(
    const Shape& s, State& state, const uint32_t* values, int64_t first, int64_t chunks, bool start, int64_t count) {
  for (int64_t piece = 0; piece < s.pairs() / 16; piece++)
    for (int64_t u = 0; u < count; u++) {
      const Unit& unit = state.units[u];
      float* out = state.blocks[u].out[piece];
      if (start) {
        zero_sums();
      } else {
        for (int64_t row = 0; row < ROWS; row++)
          if (const float shrink = unit.shrink[row]; shrink != 1)
            for (int64_t i = 0; i < CHUNK; i += LANES) {
              float* at = out + place(row) + i / 16 * QUARTER + i % 16;
              store(at, load<f32v>(at) * shrink);
            }
        load_sums(out);
      }
      for (int64_t j = 0; j < chunks; j++) {
        const uint32_t* b = values + (first + j) / 2 * s.panel_values() + piece / 2 * (WIDTH / 2 * WIDTH) +
                            (first + j) % 2 * 16 * WIDTH + piece % 2 * CHUNK;
        multiply(unit.probabilities[j], b);
      }
      store_sums(out);
    }
}

// The queries from row `first` of `q`, zeros beyond the last, in tiles.
void read_queries(const Shape& s, const uint16_t* q, int64_t first, int64_t queries, uint16_t (*to_pieces)[ROWS * CHUNK]) {
  for (int64_t piece = 0; piece < s.pairs() / 16; piece++) {
    const int64_t wanted = s.features - piece * CHUNK, count = wanted < CHUNK ? wanted : CHUNK;
    for (int64_t row = 0; row < ROWS; row++) {
      uint16_t* to = to_pieces[piece] + row * CHUNK;
      const int64_t there = first + row < queries ? count : 0;
      const uint16_t* from = q + (first + row) * s.stride() + piece * CHUNK;
      if (there == CHUNK) {
        __builtin_memcpy(to, from, CHUNK * 2);
        continue;
      }
      if (there) __builtin_memcpy(to, from, size_t(there * 2));
      if (there < CHUNK) __builtin_memset(to + there, 0, size_t((CHUNK - there) * 2));
    }
  }
}

void write_outputs(const Shape& s, const Block& block, int64_t first, int64_t queries, uint16_t* out) {
  for (int64_t row = 0; row < ROWS && first + row < queries; row++)
    for (int64_t f = 0; f < s.features; f += LANES) {
      const f32v v = load<f32v>(block.out[f / CHUNK] + place(row) + f % CHUNK / 16 * QUARTER + f % 16);
      store_float<Dtype::bf16>(out + (first + row) * s.stride(), f, v * (1 / block.total[row]));
    }
}

void attend(const Shape& s, const uint16_t* q, int64_t queries, const uint32_t* panels, uint16_t* out, void* memory) {
  State& state = *(State*)memory;
  const uint32_t *keys = panels, *values = panels + s.key_panels() * s.panel_keys();
  const int64_t all = 2 * s.key_panels(), parts = (all * CHUNK + KEYS - 1) / KEYS, size = (all + parts - 1) / parts;
  tile_configure();
  for (int64_t row = 0; row < queries; row += UNITS * ROWS) {
    const int64_t left = (queries - row + ROWS - 1) / ROWS, count = left < UNITS ? left : UNITS;
    for (int64_t u = 0; u < count; u++) read_queries(s, q, row + u * ROWS, queries, state.queries[u]);
    for (int64_t first = 0; first < all; first += size) {
      const int64_t chunks = all - first < size ? all - first : size;
      multiply_keys(s, state, keys, first, chunks, count);
      for (int64_t u = 0; u < count; u++)
        softmax(state.units[u], state.blocks[u], s.scale * LOG2_E, chunks, s.keys - first * CHUNK, first == 0);
      multiply_values(s, state, values, first, chunks, first == 0, count);
    }
    for (int64_t u = 0; u < count; u++) write_outputs(s, state.blocks[u], row + u * ROWS, queries, out);
  }
  tile_release();
}

}  // namespace

const qvgen::AttentionKernel* qvgen::attention_amx() {
  static constexpr AttentionKernel kernel = {
      "amx", tiles_multiply_bf16, MOST_FEATURES, QUERIES, int64_t(sizeof(State)), lay_out, attend};
  return &kernel;
}

#else
#include "attention/attention.h"

const qvgen::AttentionKernel* qvgen::attention_amx() { return nullptr; }

#endif
