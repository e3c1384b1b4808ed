// The sums and differences of strassen.h, for any vector width.
#pragma once

#include "isa/isa.h"
#include "isa/vec.h"

namespace {

constexpr int64_t BYTES = 4 * LANES;
typedef uint8_t bytes_v __attribute__((vector_size(BYTES)));

// Factors A of one token above and one below, whose halves of k are `half` bytes each: term r to out + r * term_stride. Writes
// up to the next multiple of 64.
void token_terms(const uint8_t* above, const uint8_t* below, int64_t half, uint8_t* out, int64_t term_stride, uint8_t shift) {
  for (int64_t i = 0; i < half; i += BYTES) {
    const bytes_v a00 = load<bytes_v>(above + i), a01 = load<bytes_v>(above + half + i);
    const bytes_v a10 = load<bytes_v>(below + i), a11 = load<bytes_v>(below + half + i);
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
  bytes_v low, high;
  explicit Nibbles(const uint8_t* w) {
    const bytes_v both = load<bytes_v>(w);
    low = both & 15;
    high = ((both >> 4) ^ 8) - 8;  // signed, as it is stored
  }
};

template <int TERM>
inline bytes_v combined(bytes_v b00, bytes_v b01, bytes_v b10, bytes_v b11) {
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
  for (int64_t i = 0; i < bytes; i += BYTES) {
    const Nibbles b00(left + i), b10(left + bytes + i), b01(right + i), b11(right + bytes + i);
    uint8_t* to = out + i / 64 * 128 + i % 64;  // two vectors of 64 bytes for one: fields, see layout.h
    store(to, combined<TERM>(b00.low, b01.low, b10.low, b11.low));
    store(to + 64, combined<TERM>(b00.high, b01.high, b10.high, b11.high));
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
    const s32v p = load<s32v>(product + i);
    const s32v before = start ? load<s32v>(start + i % qvgen::PANEL) : load<s32v>(total + i);
    store(total + i, sign > 0 ? before + p : before - p);
  }
}

constexpr qvgen::Isa with_strassen(qvgen::Isa isa) {
  isa.token_terms = token_terms, isa.weight_terms = weight_terms, isa.add_product = add_product;
  return isa;
}

}  // namespace
