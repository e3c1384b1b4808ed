// AVX2: VPMADDUBSW multiplies unsigned by signed bytes and sums the products by pairs.
#ifdef __AVX2__

#include "linear/pairs.h"

namespace {

struct Arithmetic {
  typedef int16_t Sum __attribute__((vector_size(VECTOR)));
  typedef u32v Weights, Codes;

  static INLINE Weights weights(u32v v) { return v; }
  static INLINE Codes codes(u32v v) { return v; }
  // Both in one statement: GCC would move the sums away from the products and need more registers than there are.
  static INLINE void add(Sum& sum, Codes a, Weights w) {
    Sum products;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "x"(w));
  }
  static INLINE s32v total(Sum sum) {
    s32v pairs;
    asm("vpmaddwd %2, %1, %0" : "=x"(pairs) : "x"(sum), "x"(Sum{} + int16_t(1)));
    return pairs;
  }
};

int64_t products(int64_t rounds) { return burst<Arithmetic::Sum>(rounds, Arithmetic::add); }

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

const qvgen::Isa* qvgen::isa_avx2() {
  static constexpr Isa isa = make_isa("avx2", supported, tile_in_passes<Pairs<Arithmetic>::Pass>, products);
  return &isa;
}

#endif
