// Strassen's algorithm (Numerische Mathematik 13, 1969), one level: 7 products of half-size matrices instead of 8. Sums and
// differences of 4-bit codes still fit into bytes, so that on integers it is exact, bit for bit the same result; for 8-bit codes
// they do not fit. It pays where the additions are few beside the products: see strassen_pays.
//
//   P0 = (A00 + A11)(B00 + B11)      C00 = P0 + P3 - P4 + P6
//   P1 = (A10 + A11) B00             C01 = P2 + P4
//   P2 = A00 (B01 - B11)             C10 = P1 + P3
//   P3 = A11 (B10 - B00)             C11 = P0 - P1 + P2 + P5
//   P4 = (A00 + A01) B11
//   P5 = (A10 - A00)(B00 + B01)
//   P6 = (A01 - A11)(B10 + B11)
//
// A: codes of 12 tokens, 6 above and 6 below, by the two halves of k. B: the two halves of k by two panels.
#pragma once

#include "block/block.h"

namespace qvgen {

constexpr int STRASSEN_TERMS = 7;
constexpr int STRASSEN_SHIFT = 15;  // added to differences of codes, which must not be negative
constexpr int64_t STRASSEN_TOKENS = 2 * TILE_ROWS;

bool strassen_pays(const Isa& isa, const qvgen_layer& layer, int64_t tokens, int threads);

// Outputs of `count` tokens, to `out` (count, N). Returns a qvgen_status.
int strassen_outputs(
    const Isa& isa, const qvgen_layer& layer, const Tokens& tokens, int64_t count, uint8_t* out, int threads);

}  // namespace qvgen
