// Attention in bfloat16 on AMX tiles: 32 queries and 512 keys at a time.
//
// The softmax, in registers, takes longer than the products, on tiles (on Sapphire Rapids 16 cycles for 16 scores of 32 queries
// against 8). So it runs between them: while the scores of one unit of work become probabilities, the tiles multiply those of
// the unit before with their values and make the scores of the one after. The processor does both at once, for a tile's
// product takes 16 cycles of an execution port that vectors hardly use.
//
// Panels, softmax and rounding are those of avx512bf16.cpp; sums of products are in another order.
#if defined(__x86_64__) && (defined(QVGEN_HAVE_AMX) || defined(QVGEN_AMX_EMULATED))

#include "attention/panels.h"
#include "isa/tiles.h"
#include "tiles/tiles.h"

namespace {

constexpr int64_t WIDTH = qvgen::ATTENTION_WIDTH, LINE = WIDTH * 4;  // bytes from line to line of a tile in a panel
constexpr int64_t ROWS = 32;    // queries of a unit
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
  uint16_t queries[MOST_FEATURES / CHUNK][ROWS * CHUNK];
  Block blocks[2];
  Unit units[2];
};

INLINE int64_t place(int64_t row) { return row / 16 * 2 * QUARTER + row % 16 * 16; }

// f(score, probability) for each vector of the chunks from `first` to `end` of a row.
template <class F>
INLINE void each_score(Unit& unit, int64_t row, int64_t first, int64_t end, const F& f) {
  for (int64_t j = first; j < end; j++)
    for (int64_t half = 0; half < 2; half++)
      for (int64_t i = 0; i < 16; i += LANES)
        f(unit.scores[j] + place(row) + half * QUARTER + i, unit.probabilities[j] + row * CHUNK + half * 16 + i);
}

// Scores to probabilities, row by row, in slices that fit between products.
struct Softmax {
  static constexpr int SLICES = 4;  // of a row: the maximum, then a third of the exponentials each
  Unit* unit = nullptr;
  Block* block = nullptr;
  float scale = 0;  // of scores, in powers of two
  int64_t chunks = 0, keys = 0;
  bool first = false;  // of the block's keys
  int64_t next = 0, products = 0;  // the next slice; products that it may run beside
  f32v total{};
  float most = 0;

  int64_t left() const { return unit ? ROWS * SLICES - next : 0; }

  INLINE void beside_a_product() {
    const int64_t some = products > 0 ? (left() + products - 1) / products : left();
    products--;
    for (int64_t i = 0; i < some; i++) slice();
  }
  INLINE void finish() {
    while (left()) slice();
  }

  INLINE void slice() {
    const int64_t row = next / SLICES, part = next % SLICES;
    next++;
    if (part == 0) return maximum_of(row);
    const f32v factor = splat(scale), minus = splat(-most * scale);
    f32v sums = total;
    const int64_t start = (part - 1) * chunks / (SLICES - 1), end = part * chunks / (SLICES - 1);
    each_score(*unit, row, start, end, [&](const float* score, uint16_t* to) {
      const f32v v = power(load<f32v>(score) * factor + minus);
      sums += v;
      store(to, to_bf16(v));
    });
    total = sums;
    if (part == SLICES - 1) block->total[row] = block->total[row] * unit->shrink[row] + sum(total);
  }

  INLINE void maximum_of(int64_t row) {
    for (int64_t key = keys; key < chunks * CHUNK; key++)
      unit->scores[key / CHUNK][place(row) + key % CHUNK / 16 * QUARTER + key % 16] = -INFINITE;
    if (first) block->most[row] = -INFINITE, block->total[row] = 0;
    f32v high = splat(-INFINITE), other = high;
    for (int64_t j = 0; j < chunks; j++)
      for (int64_t i = 0; i < 16; i += LANES) {
        const float* at = unit->scores[j] + place(row) + i;
        high = maximum(load<f32v>(at), high), other = maximum(load<f32v>(at + QUARTER), other);
      }
    const float before = block->most[row];
    most = largest(maximum(maximum(high, other), splat(before)));
    block->most[row] = most, unit->shrink[row] = first ? 1 : power(splat((before - most) * scale))[0];
    total = f32v{};
  }
};

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

// unit.scores of `chunks` x 32 keys from chunk `first` on.
void multiply_keys(
    const Shape& s, const State& state, const uint32_t* keys, int64_t first, int64_t chunks, Unit& unit, Softmax& beside) {
  for (int64_t j = 0; j < chunks; j++) {
    const uint32_t* b = keys + (first + j) / 2 * s.panel_keys() + (first + j) % 2 * CHUNK;
    zero_sums();
    for (int64_t piece = 0; piece < s.pairs() / 16; piece++, b += 16 * WIDTH) {
      multiply(state.queries[piece], b);
      beside.beside_a_product();
    }
    store_sums(unit.scores[j]);
  }
}

// block.out += probabilities x values.
void multiply_values(
    const Shape& s, const Unit& unit, const uint32_t* values, int64_t first, int64_t chunks, bool start, Block& block,
    Softmax& beside) {
  for (int64_t piece = 0; piece < s.pairs() / 16; piece++) {
    float* out = block.out[piece];
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
      beside.beside_a_product();
    }
    store_sums(out);
  }
}

// The queries from row `first` of `q`, zeros beyond the last, in tiles.
void read_queries(const Shape& s, const uint16_t* q, int64_t first, int64_t queries, State& state) {
  for (int64_t piece = 0; piece < s.pairs() / 16; piece++) {
    const int64_t wanted = s.features - piece * CHUNK, count = wanted < CHUNK ? wanted : CHUNK;
    for (int64_t row = 0; row < ROWS; row++) {
      uint16_t* to = state.queries[piece] + row * CHUNK;
      const int64_t there = first + row < queries ? count : 0;
      if (there) __builtin_memcpy(to, q + (first + row) * s.stride() + piece * CHUNK, size_t(there * 2));
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
  const int64_t units = (queries + ROWS - 1) / ROWS * parts;
  const auto first_chunk = [&](int64_t u) { return u % parts * size; };
  const auto chunks = [&](int64_t u) { return all - first_chunk(u) < size ? all - first_chunk(u) : size; };
  tile_configure();
  for (int64_t u = -1; u <= units; u++) {  // softmax of unit u beside the products of u - 1 and u + 1
    Softmax softmax;
    if (u >= 0 && u < units) {
      softmax.unit = &state.units[u % 2], softmax.block = &state.blocks[u / parts % 2];
      softmax.scale = s.scale * LOG2_E, softmax.first = u % parts == 0;
      softmax.chunks = chunks(u), softmax.keys = s.keys - first_chunk(u) * CHUNK;
    }
    const int64_t before = u - 1, after = u + 1;
    softmax.products = ((before >= 0 ? chunks(before) : 0) + (after < units ? chunks(after) : 0)) * (s.pairs() / 16);
    if (before >= 0) {
      Block& block = state.blocks[before / parts % 2];
      const Unit& unit = state.units[before % 2];
      multiply_values(s, unit, values, first_chunk(before), chunks(before), before % parts == 0, block, softmax);
      if (u % parts == 0) write_outputs(s, block, before / parts * ROWS, queries, out);
    }
    if (after < units) {
      if (after % parts == 0) read_queries(s, q, after / parts * ROWS, queries, state);
      multiply_keys(s, state, keys, first_chunk(after), chunks(after), state.units[after % 2], softmax);
    }
    softmax.finish();
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
