// For registers too small or too few for a tile of 6 tokens by 64 outputs: the panel in passes. Each takes two operands of one
// register from every half step, so that 6 tokens need 12 sums.
#pragma once

#include "isa/common.h"

#ifdef __aarch64__
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t VECTOR = 4 * LANES;    // bytes, of a register
constexpr int PARTS = int(64 / VECTOR);  // registers in a vector of the layout
constexpr int PASSES = 2 * PARTS;        // one takes two fields and one part of them

// First output of operand i = 0, 1.
template <int PASS>
constexpr int64_t first_output(int i) {
  return (PASS / PARTS * 2 + i) * qvgen::FIELD + PASS % PARTS * LANES;
}

// Where in a half step operand i lies. Of 8 bits each has a vector; else the two have one, and at 2 bits all four.
template <int BITS, int PASS>
constexpr int64_t operand_byte(int half, int i) {
  constexpr int64_t PAIR = PASS / PARTS, PART = PASS % PARTS * VECTOR;
  return PART + (BITS == 8 ? half * 256 + (PAIR * 2 + i) * 64 : BITS == 4 ? half * 128 + PAIR * 64 : half * 64);
}

// Where a step of 3 bits has the codes of the first half step, or the low bits of the second's fields 2 and 3; and the rest.
template <int PASS>
constexpr int64_t three_bits_byte(int vector) {
  return vector * 64 + PASS % PARTS * VECTOR;
}

#ifdef __AVX2__
// One instruction each and `volatile`, for the reasons given in isa/avx512vnni.cpp. Masks are read from memory: in registers
// they would drive out sums.
template <uint32_t WORD>
alignas(VECTOR) constexpr uint32_t REPEATED[LANES] = {WORD, WORD, WORD, WORD, WORD, WORD, WORD, WORD};

INLINE u32v load_weight(const uint8_t* w) {
  u32v v;
  asm volatile("vmovdqu %1, %0" : "=x"(v) : "m"(*(const u32v*)w));
  return v;
}
INLINE u32v broadcast(const uint8_t* a) {
  u32v v;
  asm volatile("vpbroadcastd %1, %0" : "=x"(v) : "m"(*(const int32_t*)a));
  return v;
}
template <uint32_t BYTE>
INLINE u32v masked(u32v v) {
  u32v field;
  asm("vpand %2, %1, %0" : "=x"(field) : "x"(v), "m"(REPEATED<BYTE * 0x01010101>));
  return field;
}
template <uint32_t BYTE>
INLINE u32v flipped(u32v v) {
  u32v field;
  asm("vpxor %2, %1, %0" : "=x"(field) : "x"(v), "m"(REPEATED<BYTE * 0x01010101>));
  return field;
}
#else
INLINE u32v load_weight(const uint8_t* w) { return load<u32v>(w); }
#ifdef __aarch64__
INLINE u32v broadcast(const uint8_t* a) { return (u32v)vld1q_dup_u32((const uint32_t*)a); }  // GCC would go by a general register
#else
INLINE u32v broadcast(const uint8_t* a) { return u32v{} + load<uint32_t>(a); }
#endif
template <uint32_t BYTE>
INLINE u32v masked(u32v v) {
  return v & BYTE * 0x01010101;
}
template <uint32_t BYTE>
INLINE u32v flipped(u32v v) {
  return v ^ BYTE * 0x01010101;
}
#endif

template <int N>
struct Constant {
  static constexpr int value = N;
};

// f(Constant<rows>).
template <class F>
INLINE void with_rows(int rows, const F& f) {
  switch (rows) {
    case 1: return f(Constant<1>{});
    case 2: return f(Constant<2>{});
    case 3: return f(Constant<3>{});
    case 4: return f(Constant<4>{});
    case 5: return f(Constant<5>{});
    default: return f(Constant<6>{});
  }
}

template <template <int, int> class Pass, int BITS, int PASS = 0>
void each_pass(const qvgen::Tile& t) {
  if constexpr (PASS < PASSES) {
    with_rows(t.rows, [&](auto rows) { Pass<BITS, PASS>::template run<decltype(rows)::value>(t); });
    each_pass<Pass, BITS, PASS + 1>(t);
  }
}

template <template <int, int> class Pass>
void tile_in_passes(int lane_bits, int, const qvgen::Tile& t) {
  switch (lane_bits) {
    case 2: return each_pass<Pass, 2>(t);
    case 3: return each_pass<Pass, 3>(t);
    case 4: return each_pass<Pass, 4>(t);
    default: return each_pass<Pass, 8>(t);
  }
}

}  // namespace
