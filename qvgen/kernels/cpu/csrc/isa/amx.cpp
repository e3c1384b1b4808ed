// AMX (Sapphire Rapids and after): products of tiles. Whatever else a linear layer needs runs in registers: tiles/amx.cpp.
#if defined(__x86_64__) && (defined(QVGEN_HAVE_AMX) || defined(QVGEN_AMX_EMULATED))

#include "isa/tiles.h"
#include "tiles/outputs.h"
#include "tiles/quantize.h"
#include "tiles/tiles.h"

namespace {

typedef uint8_t line_v __attribute__((vector_size(64)));

INLINE line_v load_line(const uint8_t* from) {
  line_v v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
INLINE void store_line(uint8_t* to, line_v v) { __builtin_memcpy(to, &v, sizeof v); }

// The fields of both half steps as signed bytes: layout.h. Of those that nobody uses nothing is computed.
template <int BITS>
INLINE void unpack_step(const uint8_t* w, line_v (&f)[2][4]) {
  if constexpr (BITS == 3) {
    const line_v a = load_line(w), b = load_line(w + 64), c = load_line(w + 128);
    f[0][0] = a & 7, f[0][1] = a >> 3 & 7, f[0][2] = b & 7, f[0][3] = b >> 3 & 7;
    f[1][0] = c & 7, f[1][1] = c >> 3 & 7, f[1][2] = a >> 6 | (c >> 4 & 4), f[1][3] = b >> 6 | (c >> 5 & 4);
    return;
  }
  for (int half = 0; half < 2; half++) {
    if constexpr (BITS == 8) {
      for (int i = 0; i < 4; i++) f[half][i] = load_line(w + half * 256 + i * 64);
    } else if constexpr (BITS == 4) {
      for (int i = 0; i < 4; i += 2) {
        const line_v both = load_line(w + half * 128 + i * 32);
        f[half][i] = both & 15, f[half][i + 1] = (both >> 4 ^ 8) - 8;
      }
    } else {
      const line_v all = load_line(w + half * 64);
      f[half][0] = all & 3, f[half][1] = all >> 2 & 3, f[half][2] = all >> 4 & 3, f[half][3] = (all >> 6 ^ 2) - 2;
    }
  }
}

template <int BITS, int HALF>
void unpack_half(const uint8_t* w, int64_t steps, uint8_t* out) {
  constexpr int64_t STEPS = qvgen::TILE_K / qvgen::STEP;
  for (int64_t step = 0; step < qvgen::round_up(steps, STEPS); step++, w += 64 * BITS) {
    line_v f[2][4] = {};
    if (step < steps) unpack_step<BITS>(w, f);
    uint8_t* const to = out + step / STEPS * qvgen::TILE_STEP_BYTES + step % STEPS * 128;
    for (int line = 0; line < 2; line++)
      for (int i = 0; i < 2; i++) store_line(to + line * 64 + i * 1024, f[line][HALF * 2 + i]);
  }
}

template <int BITS>
void unpack_bits(const uint8_t* w, int64_t steps, int half, uint8_t* out) {
  half ? unpack_half<BITS, 1>(w, steps, out) : unpack_half<BITS, 0>(w, steps, out);
}

void unpack(int lane_bits, const uint8_t* w, int64_t steps, int half, uint8_t* out) {
  switch (lane_bits) {
    case 2: return unpack_bits<2>(w, steps, half, out);
    case 3: return unpack_bits<3>(w, steps, half, out);
    case 4: return unpack_bits<4>(w, steps, half, out);
    default: return unpack_bits<8>(w, steps, half, out);
  }
}

INLINE void prefetch(qvgen::Ahead& ahead) {
  for (int i = 0; i < ahead.lines && ahead.next < ahead.end; i++, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 2);
}

// Tile I of the sums: 0, 1 are the outputs of the first 16 tokens, 2, 3 of the others.
template <int I>
INLINE int32_t* corner(const qvgen::TileSums& sums) {
  return sums.first + I / 2 * TILE_LINES * sums.stride + I % 2 * 16;
}
template <int I>
INLINE void store_sums(const qvgen::TileSums& to) {
  tile_store<I>(corner<I>(to), to.stride * 4);
}
// Late, just before the tile is wanted: stored at the end of their block, all four would wait for its last product.
template <int I>
INLINE void exchange(const qvgen::TileBlock& b) {
  if (b.before.first) store_sums<I>(b.before);
  if (b.from.first) {
    tile_load<I>(corner<I>(b.from), b.from.stride * 4);
  } else {
    tile_zero<I>();
  }
}

constexpr int64_t LATE = 4;  // steps until rows are finished: earlier, their loads would wait for the stores

template <class Rest>
INLINE void multiply_and(const qvgen::TileBlock& block, qvgen::Shadow& shadow, Rest&& rest) {
  const uint8_t *a = block.codes, *b = block.weight;
  const int64_t steps = block.steps, slots = steps - LATE;
  const int rows = slots < 1 ? 0 : int((shadow.rows + slots - 1) / slots);  // a step
  tile_load_once<4>(a, 64), tile_load<6>(b, 64), exchange<0>(block), tile_dot<0, 4, 6>();
  tile_load<7>(b + 1024, 64), exchange<1>(block), tile_dot<1, 4, 7>();
  tile_load_once<5>(a + 1024, 64), exchange<2>(block), tile_dot<2, 5, 6>();
  exchange<3>(block), tile_dot<3, 5, 7>();
  prefetch(shadow.weight), prefetch(shadow.codes);
  for (int64_t step = 1; step < steps; step++) {
    a += qvgen::TILE_STEP_BYTES, b += qvgen::TILE_STEP_BYTES;
    tile_load_once<4>(a, 64), tile_load<6>(b, 64), tile_dot<0, 4, 6>();
    tile_load<7>(b + 1024, 64), tile_dot<1, 4, 7>();
    tile_load_once<5>(a + 1024, 64), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
    prefetch(shadow.weight), prefetch(shadow.codes);
    if (step >= LATE && shadow.rows) {
      const int some = rows < shadow.rows ? rows : shadow.rows;
      rest(some), shadow.rows -= some;
    }
  }
  if (shadow.rows) rest(shadow.rows), shadow.rows = 0;
}

// f(Rows) for the kind of outputs that are wanted.
template <class F>
INLINE void with_rows(const qvgen::TileOutputs& o, const F& f) {
  if (o.dtype == int(Dtype::f32)) return o.gelu ? f(Rows<Dtype::f32, true>(o)) : f(Rows<Dtype::f32, false>(o));
  o.gelu ? f(Rows<Dtype::bf16, true>(o)) : f(Rows<Dtype::bf16, false>(o));
}

void multiply(const qvgen::TileBlock& block, qvgen::Shadow& shadow) {
  if (!shadow.rows) return multiply_and(block, shadow, [](int) {});
  if (!shadow.outputs) return multiply_and(block, shadow, [&](int some) { shadow.finish(shadow.context, some); });
  with_rows(*shadow.outputs, [&](auto rows) {
    multiply_and(block, shadow, [&](int some) {
      for (int i = 0; i < some; i++) rows.next();
    });
  });
}

void finish_rows(const qvgen::TileOutputs& outputs, int count) {
  with_rows(outputs, [&](auto rows) {
    for (int i = 0; i < count; i++) rows.next();
  });
}

void multiply_bf16(const uint8_t* a, int64_t stride, const uint8_t* b, int64_t words, bool first, float* out) {
  constexpr int64_t LINE = qvgen::PANEL * 4, TILE_WORDS = 16;
  for (int half = 0; half < 2; half++, out += 32, b += TILE_BYTES * 2) {
    float* const below = out + TILE_LINES * qvgen::PANEL;
    if (first) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
      tile_load<0>(out, LINE), tile_load<1>(out + 16, LINE), tile_load<2>(below, LINE), tile_load<3>(below + 16, LINE);
    }
    const uint8_t *left = a, *right = b;
    for (int64_t word = 0; word < words; word += TILE_WORDS, left += TILE_BYTES, right += TILE_WORDS * LINE) {
      tile_load<4>(left, stride), tile_load<6>(right, LINE), tile_dot_bf16<0, 4, 6>();
      tile_load<7>(right + TILE_BYTES, LINE), tile_dot_bf16<1, 4, 7>();
      tile_load<5>(left + TILE_LINES * stride, stride), tile_dot_bf16<2, 5, 6>(), tile_dot_bf16<3, 5, 7>();
    }
    tile_store<0>(out, LINE), tile_store<1>(out + 16, LINE), tile_store<2>(below, LINE), tile_store<3>(below + 16, LINE);
  }
}

void store(const qvgen::TileSums& to) { store_sums<0>(to), store_sums<1>(to), store_sums<2>(to), store_sums<3>(to); }

void begin() { tile_configure(); }
void end() { tile_release(); }

#ifdef QVGEN_AMX_EMULATED
constexpr bool EMULATED = true;
int64_t products(int64_t) { return 0; }
#else
constexpr bool EMULATED = false;
int64_t products(int64_t rounds) {
  alignas(64) static const uint8_t zeros[TILE_LINES * TILE_BYTES] = {};
  rounds /= 16;  // each of them takes as long as sixteen rounds of registers
  begin();
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  tile_load<4>(zeros, 64), tile_load<5>(zeros, 64), tile_load<6>(zeros, 64), tile_load<7>(zeros, 64);
  for (int64_t i = 0; i < rounds; i++) tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
  end();
  return rounds * 4 * 16 * 16 * 64;
}
#endif

constexpr qvgen::TileKernel KERNEL = {EMULATED, begin, end, unpack, multiply, store, finish_rows, tile_codes, multiply_bf16, products};

}  // namespace

// A constant, because this is asked on every processor, and what is compiled here runs on few.
const qvgen::TileKernel* qvgen::tiles_amx() { return &KERNEL; }

#elif defined(__x86_64__)
#include "tiles/tiles.h"
const qvgen::TileKernel* qvgen::tiles_amx() { return nullptr; }  // the assembler does not know them
#endif
