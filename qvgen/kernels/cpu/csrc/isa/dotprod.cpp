// NEON with the dot products of ARMv8.2: UDOT multiplies 16 pairs of unsigned bytes and adds them by fours to 32 bits.
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>

#include "linear/pairs.h"

#ifdef __linux__
#include <sys/auxv.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

namespace {

INLINE void dot(s32v& sum, u32v a, u32v w) { sum = (s32v)vdotq_u32((uint32x4_t)sum, (uint8x16_t)a, (uint8x16_t)w); }

// Bytes whole, as unsigned numbers; narrower fields as in pairs.h.
template <int BITS, int PASS>
INLINE void operands(const uint8_t* w, int half, u32v (&f)[2]) {
  if constexpr (BITS == 8) {
    for (int i = 0; i < 2; i++) f[i] = flipped<128>(load_weight(w + operand_byte<8, PASS>(half, i)));
  } else {
    unpack<BITS, PASS, 0>(w, half, f);
  }
}

// What that has added to operand i.
template <int BITS, int PASS>
constexpr int32_t added(int i) {
  return BITS == 8 ? 128 : i ? ADDED<BITS, PASS> : 0;
}

template <int BITS, int PASS>
struct Pass {
  template <int ROWS>
  static void run(const qvgen::Tile& t) {
    s32v sum[ROWS][2] = {};
    const uint8_t *w = t.weight, *a = t.a;
    for (int64_t step = t.steps; step; step--, a += qvgen::STEP, w += 64 * BITS) {
      u32v f[2][2];
      operands<BITS, PASS>(w, 0, f[0]), operands<BITS, PASS>(w, 1, f[1]);
#pragma GCC unroll 6
      for (int row = 0; row < ROWS; row++) {
        const uint8x8_t codes = vld1_u8(a + row * t.stride);  // UDOT can repeat either half of it by itself
        for (int i = 0; i < 2; i++) sum[row][i] = (s32v)vdotq_lane_u32((uint32x4_t)sum[row][i], (uint8x16_t)f[0][i], codes, 0);
        for (int i = 0; i < 2; i++) sum[row][i] = (s32v)vdotq_lane_u32((uint32x4_t)sum[row][i], (uint8x16_t)f[1][i], codes, 1);
      }
    }
    for (int row = 0; row < ROWS; row++)
      for (int i = 0; i < 2; i++) {
        if constexpr (added<BITS, PASS>(1) != 0) sum[row][i] -= added<BITS, PASS>(i) * t.a_sum[row * t.sum_stride];
        store(t.out + row * qvgen::PANEL + first_output<PASS>(i), sum[row][i]);
      }
  }
};

int64_t products(int64_t rounds) { return burst<s32v>(rounds, dot); }

bool supported() {
#if defined(__linux__)
  constexpr unsigned long DOT_PRODUCTS = 1 << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & DOT_PRODUCTS;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) && has;
#else
  return false;
#endif
}

}  // namespace

const qvgen::Isa* qvgen::isa_neon_dotprod() {
  static constexpr Isa isa = make_isa("neon_dotprod", supported, tile_in_passes<Pass>, products);
  return &isa;
}

#elif defined(__aarch64__)
#include "isa/isa.h"
const qvgen::Isa* qvgen::isa_neon_dotprod() { return nullptr; }  // the compiler does not know it
#endif
