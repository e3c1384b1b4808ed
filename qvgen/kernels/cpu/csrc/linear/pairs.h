// Tiles where products of bytes are summed by pairs into 16 bits, which are emptied into 32 bits before they could overflow.
// Weights are therefore taken as unsigned numbers of at most 4 bits: those stored as q - offset are turned back into q, and
// the offset times the sum of the codes is subtracted at the end; bytes are split into halves.
//
// `Arithmetic` does the products: types Weights (an operand), Codes (4 codes of a token), Sum (of 16 bits); weights(vector),
// codes(vector), add(sum, codes, weights), total(sum): 32-bit sums of neighbouring 16-bit ones.
#pragma once

#include "linear/passes.h"

namespace {

// Two operands of a half step: fields of 4 bits or fewer, or the halves of field FIELD of 8 bits.
template <int BITS, int PASS, int FIELD>
INLINE void unpack(const uint8_t* w, int half, u32v (&f)[2]) {
  constexpr bool UPPER = PASS / PARTS;
  const u32v v = load_weight(w + (BITS == 3 ? three_bits_byte<PASS>(half ? 2 : UPPER) : operand_byte<BITS, PASS>(half, FIELD)));
  if constexpr (BITS >= 4) {
    f[0] = masked<15>(v), f[1] = flipped<8>(masked<15>(v >> 4));
  } else if constexpr (BITS == 2) {
    f[0] = masked<3>(UPPER ? v >> 4 : v), f[1] = masked<3>(UPPER ? v >> 6 : v >> 2);
    if constexpr (UPPER) f[1] = flipped<2>(f[1]);
  } else if (half == 0 || !UPPER) {
    f[0] = masked<7>(v), f[1] = masked<7>(v >> 3);
  } else {
    f[0] = masked<3>(load_weight(w + three_bits_byte<PASS>(0)) >> 6) | masked<4>(v >> 4);
    f[1] = masked<3>(load_weight(w + three_bits_byte<PASS>(1)) >> 6) | masked<4>(v >> 5);
  }
}

// What that has added to operand 1, in units of its field.
template <int BITS, int PASS>
constexpr int32_t ADDED = BITS >= 4 ? 8 : BITS == 2 && PASS / PARTS ? 2 : 0;

// Steps until a 16-bit sum could overflow: each adds the products of 4 k.
template <int BITS>
INLINE int64_t safe_steps(int max_code) {
  return 32767 / (4 * (BITS >= 4 ? 15 : (1 << BITS) - 1) * max_code);
}

template <class Arithmetic, int BITS, int PASS, int FIELD, int ROWS>
void pass(const qvgen::Tile& t) {
  s32v total[ROWS][2] = {};
  const uint8_t *w = t.weight, *a = t.a, *b = t.a + 3 * t.stride;
  const ptrdiff_t stride = t.stride;
  const int64_t safe = safe_steps<BITS>(t.max_code);
  for (int64_t left = t.steps; left > 0; left -= safe) {
    typename Arithmetic::Sum sum[ROWS][2] = {};
    for (int64_t step = left < safe ? left : safe; step; step--) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        u32v f[2];
        unpack<BITS, PASS, FIELD>(w, half, f);
        const auto w0 = Arithmetic::weights(f[0]), w1 = Arithmetic::weights(f[1]);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
          const uint8_t* codes = row < 3 ? a + row * stride : b + (row - 3) * stride;
          const auto v = Arithmetic::codes(broadcast(codes + half * 4));
          Arithmetic::add(sum[row][0], v, w0), Arithmetic::add(sum[row][1], v, w1);
        }
      }
      a += qvgen::STEP, b += qvgen::STEP, w += 64 * BITS;
    }
    for (int row = 0; row < ROWS; row++)
      for (int i = 0; i < 2; i++) total[row][i] += Arithmetic::total(sum[row][i]);
  }
  for (int row = 0; row < ROWS; row++) {
    int32_t* out = t.out + row * qvgen::PANEL;
    if constexpr (ADDED<BITS, PASS> != 0) total[row][1] -= ADDED<BITS, PASS> * t.a_sum[row * t.sum_stride];
    if constexpr (BITS == 8) {
      store(out + first_output<PASS>(FIELD), total[row][0] + (total[row][1] << 4));
    } else {
      store(out + first_output<PASS>(0), total[row][0]), store(out + first_output<PASS>(1), total[row][1]);
    }
  }
}

template <class Arithmetic>
struct Pairs {
  template <int BITS, int PASS>
  struct Pass {
    template <int ROWS>
    static void run(const qvgen::Tile& t) {
      pass<Arithmetic, BITS, PASS, 0, ROWS>(t);
      if constexpr (BITS == 8) pass<Arithmetic, 8, PASS, 1, ROWS>(t);
    }
  };
};

}  // namespace
