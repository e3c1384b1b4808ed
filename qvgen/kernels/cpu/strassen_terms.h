// The sums and differences of strassen.h, for any vector width.
#pragma once

#include "isa.h"
#include "vec.h"

namespace {

typedef uint8_t u8x64 __attribute__((vector_size(64)));
constexpr int64_t BYTES = 64;

// Factors A of one token above and one below, whose halves of k are `half` bytes each: term r to out + r * term_stride. Writes
// up to the next multiple of 64.
void token_terms(const uint8_t* above, const uint8_t* below, int64_t half, uint8_t* out, int64_t term_stride, uint8_t shift) {
  for (int64_t i = 0; i < half; i += BYTES) {
    const u8x64 a00 = load<u8x64>(above + i), a01 = load<u8x64>(above + half + i);
    const u8x64 a10 = load<u8x64>(below + i), a11 = load<u8x64>(below + half + i);
    store(out + i, a00 + a11);
    store(out + 1 * term_stride + i, a10 + a11);
    store(out + 2 * term_stride + i, a00);
    store(out + 3 * term_stride + i, a11);
    store(out + 4 * term_stride + i, a00 + a01);
    store(out + 5 * term_stride + i, a10 - a00 + shift);
    store(out + 6 * term_stride + i, a01 - a11 + shift);
  }
}

struct Nibbles {
  u8x64 low, high;
  explicit Nibbles(const uint8_t* w) {
    const u8x64 both = load<u8x64>(w);
    low = both & 15;
    high = ((both >> 4) ^ 8) - 8;  // signed, as it is stored
  }
};

template <int TERM>
inline u8x64 combined(u8x64 b00, u8x64 b01, u8x64 b10, u8x64 b11) {
  switch (TERM) {
    case 0: return b00 + b11;
    case 1: return b00;
    case 2: return b01 - b11;
    case 3: return b10 - b00;
    case 4: return b11;
    case 5: return b00 + b01;
    default: return b10 + b11;
  }
}

// Factor B number TERM of two 4-bit panels, in the layout of 8-bit panels; `bytes` of a half of k of one of them.
template <int TERM>
void weight_term(const uint8_t* left, const uint8_t* right, int64_t bytes, uint8_t* out) {
  for (int64_t i = 0; i < bytes; i += BYTES, out += 2 * BYTES) {
    const Nibbles b00(left + i), b10(left + bytes + i), b01(right + i), b11(right + bytes + i);
    store(out, combined<TERM>(b00.low, b01.low, b10.low, b11.low));
    store(out + BYTES, combined<TERM>(b00.high, b01.high, b10.high, b11.high));
  }
}

void weight_terms(int term, const uint8_t* left, const uint8_t* right, int64_t bytes, uint8_t* out) {
  switch (term) {
    case 0: return weight_term<0>(left, right, bytes, out);
    case 1: return weight_term<1>(left, right, bytes, out);
    case 2: return weight_term<2>(left, right, bytes, out);
    case 3: return weight_term<3>(left, right, bytes, out);
    case 4: return weight_term<4>(left, right, bytes, out);
    case 5: return weight_term<5>(left, right, bytes, out);
    default: return weight_term<6>(left, right, bytes, out);
  }
}

// total (TILE_ROWS, PANEL) += sign * product; `start` (PANEL,), if given, instead of what is in total.
void add_product(const int32_t* product, int sign, const int32_t* start, int32_t* total) {
  for (int64_t i = 0; i < qvgen::TILE_ROWS * qvgen::PANEL; i += LANES) {
    const s32x16 p = load<s32x16>(product + i);
    const s32x16 before = start ? load<s32x16>(start + i % qvgen::PANEL) : load<s32x16>(total + i);
    store(total + i, sign > 0 ? before + p : before - p);
  }
}

inline qvgen::Isa with_strassen(qvgen::Isa isa) {
  isa.token_terms = token_terms, isa.weight_terms = weight_terms, isa.add_product = add_product;
  return isa;
}

}  // namespace
