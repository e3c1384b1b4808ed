// AVX-VNNI: VPDPBUSD on 256 bits, for processors without AVX-512 (Alder Lake and after, Zen 5).
#ifdef QVGEN_HAVE_AVXVNNI

#include <cpuid.h>

#include "linear/passes.h"
#include "strassen/terms.h"

namespace {

// The same instruction has two encodings. Tests take that of AVX-512 (QVGEN_AVXVNNI_AS_EVEX), to run this file on processors
// that have AVX-512 and not AVX-VNNI.
#ifdef QVGEN_AVXVNNI_AS_EVEX
INLINE void dot(s32v& sum, u32v a, u32v w) { asm("%{evex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(w)); }
#else
INLINE void dot(s32v& sum, u32v a, u32v w) { asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(w)); }
#endif

// Fields stay at their bits: the product with a field at bit 4 is 16 times the wanted one, which is shifted at the end. A field
// in the top bits is signed there, as it is stored.
template <int BITS, int PASS>
constexpr int field_shift(int i) {
  return BITS == 8 ? 0 : BITS == 2 ? PASS / PARTS * 4 + i * 2 : i * BITS;
}

template <int BITS, int PASS>
INLINE void unpack(const uint8_t* w, int half, u32v (&f)[2]) {
  constexpr bool UPPER = PASS / PARTS;
  constexpr uint32_t MASK0 = ((1 << BITS) - 1) << field_shift<BITS, PASS>(0), MASK1 = ((1 << BITS) - 1) << field_shift<BITS, PASS>(1);
  if constexpr (BITS == 8) {
    f[0] = load_weight(w + operand_byte<8, PASS>(half, 0)), f[1] = load_weight(w + operand_byte<8, PASS>(half, 1));
    return;
  }
  const u32v v = load_weight(w + (BITS == 3 ? three_bits_byte<PASS>(half ? 2 : UPPER) : operand_byte<BITS, PASS>(half, 0)));
  if (BITS == 3 && half && UPPER) {  // two bits of each lie with the codes of the first half step
    f[0] = masked<3>(load_weight(w + three_bits_byte<PASS>(0)) >> 6) | masked<4>(v >> 4);
    f[1] = masked<24>(load_weight(w + three_bits_byte<PASS>(1)) >> 3) | masked<32>(v >> 2);
  } else {
    f[0] = masked<MASK0>(v), f[1] = masked<MASK1>(v);
  }
}

template <int BITS, int PASS>
struct Pass {
  template <int ROWS>
  static void run(const qvgen::Tile& t) {
    // With few rows the sums of the two half steps are kept apart: otherwise each would wait for the last.
    constexpr int HALVES = ROWS <= 2 ? 2 : 1;
    s32v sum[HALVES][ROWS][2] = {};
    const uint8_t *w = t.weight, *a = t.a, *b = t.a + 3 * t.stride;
    const ptrdiff_t stride = t.stride;
    for (int64_t step = t.steps; step; step--) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        u32v f[2];
        unpack<BITS, PASS>(w, half, f);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
          const u32v v = broadcast((row < 3 ? a + row * stride : b + (row - 3) * stride) + half * 4);
          dot(sum[half % HALVES][row][0], v, f[0]), dot(sum[half % HALVES][row][1], v, f[1]);
        }
      }
      a += qvgen::STEP, b += qvgen::STEP, w += 64 * BITS;
    }
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        if (HALVES == 2) sum[0][row][i] += sum[HALVES - 1][row][i];
        store(t.out + row * qvgen::PANEL + first_output<PASS>(i), sum[0][row][i] >> field_shift<BITS, PASS>(i));
      }
  }
};

int64_t products(int64_t rounds) { return burst<s32v>(rounds, dot); }

bool supported() {
#ifdef QVGEN_AVXVNNI_AS_EVEX
  return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  unsigned a, b, c, d;  // __builtin_cpu_supports("avxvnni") is unknown to older compilers
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
}

}  // namespace

const qvgen::Isa* qvgen::isa_avxvnni() {
  static constexpr Isa isa = with_strassen(make_isa("avxvnni", supported, tile_in_passes<Pass>, products));
  return &isa;
}

#elif defined(__x86_64__)
#include "isa/isa.h"
const qvgen::Isa* qvgen::isa_avxvnni() { return nullptr; }  // the assembler does not know it
#endif
