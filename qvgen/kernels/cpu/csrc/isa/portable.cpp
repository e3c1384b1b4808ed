// Plain C++ for every processor without a path of its own.
#include "linear/pairs.h"

namespace {

struct Arithmetic {
  typedef uint16_t Sum __attribute__((vector_size(VECTOR)));
  // Bytes k = 0, 2 and k = 1, 3 as 16-bit numbers: their products are the pair that is summed.
  struct Halves {
    Sum even, odd;
  };
  typedef Halves Weights, Codes;

  static INLINE Halves halves(u32v v) { return {(Sum)(v & 0x00ff00ffu), (Sum)(v >> 8 & 0x00ff00ffu)}; }
  static INLINE Weights weights(u32v v) { return halves(v); }
  static INLINE Codes codes(u32v v) { return halves(v); }
  static INLINE void add(Sum& sum, const Codes& a, const Weights& w) { sum += a.even * w.even + a.odd * w.odd; }
  static INLINE s32v total(Sum sum) { return (s32v)(((u32v)sum & 0xffffu) + ((u32v)sum >> 16)); }
};

bool supported() { return true; }

}  // namespace

const qvgen::Isa* qvgen::isa_portable() {
  static constexpr Isa isa = make_isa("portable", supported, tile_in_passes<Pairs<Arithmetic>::Pass>);
  return &isa;
}
