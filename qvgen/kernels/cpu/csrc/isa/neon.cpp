// NEON of every 64-bit ARM: products of bytes are added to 16-bit sums (UMLAL), four k of an output side by side.
#ifdef __aarch64__

#include <arm_neon.h>

#include "linear/pairs.h"

namespace {

struct Arithmetic {
  struct Sum {
    uint16x8_t low, high;  // of outputs 0 and 1, 2 and 3
  };
  typedef uint8x16_t Weights, Codes;

  static INLINE Weights weights(u32v v) { return (uint8x16_t)v; }
  static INLINE Codes codes(u32v v) { return (uint8x16_t)v; }
  static INLINE void add(Sum& sum, Codes a, Weights w) {
    sum.low = vmlal_u8(sum.low, vget_low_u8(a), vget_low_u8(w)), sum.high = vmlal_high_u8(sum.high, a, w);
  }
  static INLINE s32v total(Sum sum) { return (s32v)vpaddq_u32(vpaddlq_u16(sum.low), vpaddlq_u16(sum.high)); }
};

bool supported() { return true; }

}  // namespace

const qvgen::Isa* qvgen::isa_neon() {
  static constexpr Isa isa = make_isa("neon", supported, tile_in_passes<Pairs<Arithmetic>::Pass>);
  return &isa;
}

#endif
