// AVX-512 with VNNI: 4 multiply-adds of bytes per 32-bit lane and instruction, 64 per instruction. Also isa/avx512bf16.cpp, for
// processors that round to bfloat16 in one instruction (Zen 4 and after, Sapphire Rapids).
#ifdef __AVX512VNNI__

#include "isa/common.h"
#include "strassen/terms.h"

namespace {

// One instruction each, because of what GCC 12 does to 24 accumulators of intrinsics: it spills them, and the loop runs at
// 48 instead of 126 multiply-adds per cycle (measured on Zen 5, LOG.md). `volatile` keeps loads where they are written:
// moved ahead they would need more registers than there are.
#define INLINE inline __attribute__((always_inline))
typedef uint16_t u16w __attribute__((vector_size(64)));

INLINE void dot(s32v& sum, s32v a, s32v w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w)); }
INLINE s32v broadcast(const uint8_t* a) {
  s32v v;
  asm volatile("vpbroadcastd %1, %0" : "=v"(v) : "m"(*(const int32_t*)a));
  return v;
}
INLINE s32v load_weight(const uint8_t* w) {
  s32v v;
  asm volatile("vmovdqu64 %1, %0" : "=v"(v) : "m"(*(const s32v*)w));
  return v;
}
INLINE s32v repeated(int byte) { return splat(int32_t(byte * 0x01010101)); }
INLINE s32v low(s32v v, int mask) {
  s32v field;
  asm volatile("vpandd %2, %1, %0" : "=v"(field) : "v"(v), "v"(repeated(mask)));
  return field;
}
INLINE s32v shifted(s32v v, int bits) { return (s32v)((u16w)v >> bits); }  // crosses bytes: mask it
INLINE s32v select(int mask, s32v a, s32v b) { return (a & repeated(mask)) | (b & ~repeated(mask)); }

// The four operands of one half step: nested fields, see layout.h. `half` is known when compiled.
template <int BITS>
INLINE void unpack(const uint8_t* w, int half, s32v (&f)[4]) {
  if constexpr (BITS == 8) {
    for (int i = 0; i < 4; i++) f[i] = load_weight(w + half * 256 + i * 64);
  } else if constexpr (BITS == 4) {
    f[1] = load_weight(w + half * 128), f[0] = low(f[1], 15);
    f[3] = load_weight(w + half * 128 + 64), f[2] = low(f[3], 15);
  } else if constexpr (BITS == 2) {
    f[3] = load_weight(w + half * 64);
    f[0] = low(f[3], 3), f[1] = low(f[3], 15), f[2] = low(f[3], 63);
  } else if (half == 0) {
    f[1] = load_weight(w), f[3] = load_weight(w + 64);
    f[0] = low(f[1], 7), f[1] = low(f[1], 63);
    f[2] = low(f[3], 7), f[3] = low(f[3], 63);
  } else {
    const s32v b = load_weight(w + 128);
    f[0] = low(b, 7), f[1] = low(b, 63);
    // Field 2 has two bits in the first vector and its third in bit 6 of b; field 3 likewise, second vector and bit 7.
    f[2] = low(select(3, shifted(load_weight(w), 6), shifted(b, 4)), 7);
    f[3] = low(select(24, shifted(load_weight(w + 64), 3), shifted(b, 2)), 56) | f[2];
  }
}

// Dot products with nested operands, back to dot products with fields.
template <int BITS>
INLINE void separate(s32v (&sum)[4]) {
  if constexpr (BITS == 2) {
    sum[3] = (sum[3] - sum[2]) >> 6;
    sum[2] = (sum[2] - sum[1]) >> 4;
    sum[1] = (sum[1] - sum[0]) >> 2;
  } else if constexpr (BITS < 8) {
    sum[1] = (sum[1] - sum[0]) >> BITS;
    sum[3] = (sum[3] - sum[2]) >> BITS;
  }
}

template <int BITS, int ROWS>
void tile_rows(const qvgen::Tile& t) {
  // With few rows the sums of the two half steps are kept apart: otherwise each would wait for the last.
  constexpr int PARTS = ROWS <= 2 ? 2 : 1;
  s32v sum[PARTS][ROWS][4];
#pragma GCC unroll 6
  for (int part = 0; part < PARTS; part++)
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) sum[part][row][i] = splat(0);
  const uint8_t *w = t.weight, *a = t.a, *b = t.a + 3 * t.stride;
  const uint8_t* next = t.next ? t.next : t.a;
  const ptrdiff_t stride = t.stride;
  constexpr int BYTES = 64 * BITS;
  for (int64_t step = t.steps; step; step--) {
    if constexpr (ROWS > 1) __builtin_prefetch(next), next += 64;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      s32v f[4];
      unpack<BITS>(w, half, f);
      if constexpr (ROWS > 1)
        for (int line = 0; line < BYTES / 2; line += 64) __builtin_prefetch(w + half * BYTES / 2 + line + 2048);
#pragma GCC unroll 6
      for (int row = 0; row < ROWS; row++) {
        s32v v = broadcast((row < 3 ? a + row * stride : b + (row - 3) * stride) + half * 4);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) dot(sum[half % PARTS][row][i], v, f[i]);
      }
    }
    a += qvgen::STEP, b += qvgen::STEP, w += BYTES;
  }
#pragma GCC unroll 6
  for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      if (PARTS == 2) sum[0][row][i] += sum[PARTS - 1][row][i];
    separate<BITS>(sum[0][row]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) store(t.out + row * qvgen::PANEL + i * LANES, sum[0][row][i]);
  }
}

template <int BITS>
void tile_bits(const qvgen::Tile& t) {
  switch (t.rows) {
    case 1: return tile_rows<BITS, 1>(t);
    case 2: return tile_rows<BITS, 2>(t);
    case 3: return tile_rows<BITS, 3>(t);
    case 4: return tile_rows<BITS, 4>(t);
    case 5: return tile_rows<BITS, 5>(t);
    default: return tile_rows<BITS, 6>(t);
  }
}

void tile(int lane_bits, int, const qvgen::Tile& t) {
  switch (lane_bits) {
    case 2: return tile_bits<2>(t);
    case 3: return tile_bits<3>(t);
    case 4: return tile_bits<4>(t);
    default: return tile_bits<8>(t);
  }
}

int64_t products(int64_t rounds) {
  return burst<s32v>(rounds, [](s32v& sum, u32v a, u32v w) { dot(sum, (s32v)a, (s32v)w); });
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")
#ifdef __AVX512BF16__
         && __builtin_cpu_supports("avx512bf16")
#endif
      ;
}

}  // namespace

#ifdef __AVX512BF16__
const qvgen::Isa* qvgen::isa_avx512bf16() {
  static constexpr Isa isa = with_strassen(make_isa("avx512bf16", supported, tile, products));
  return &isa;
}
#else
const qvgen::Isa* qvgen::isa_avx512vnni() {
  static constexpr Isa isa = with_strassen(make_isa("avx512vnni", supported, tile, products));
  return &isa;
}
#endif

#endif
