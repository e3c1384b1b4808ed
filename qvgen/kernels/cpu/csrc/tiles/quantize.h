// Codes of one token in the order of tiles, 64 at a time, for any vector width: the arithmetic of linear/token.h, without the
// copy that puts rows into tiles.
#pragma once

#include "linear/token.h"
#include "tiles/tiles.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace {

constexpr int VECTORS_A_STEP = int(qvgen::TILE_K / LANES);

inline bool any(u32v v) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v);
#else
  return reduce(v, [](u32v a, u32v b) { return a | b; });
#endif
}

// 64 codes, of each lane of q the low byte, in the order of the elements that load_pair takes; their sum is added to `sums`.
template <Dtype D>
INLINE void store_codes(uint8_t* codes, const s32v (&q)[VECTORS_A_STEP], u32v& sums) {
#ifdef __AVX512VBMI__
  // Four bytes a lane, and one permutation of bytes: half the operations of four narrowings.
  const u32v low = ((u32v)q[0] & 0xffu) | ((u32v)q[1] << 8 & 0xff00u);
  const u32v high = ((u32v)q[2] << 16 & 0xff0000u) | (u32v)q[3] << 24;
  alignas(64) static constexpr struct Order {
    uint8_t from[64] = {};
    constexpr Order() {
      for (int e = 0; e < 64; e++) from[e] = uint8_t(D == Dtype::f32 ? e % 16 * 4 + e / 16 : e % 32 / 2 * 4 + e / 32 * 2 + e % 2);
    }
  } ORDER;
  const u32v merged = low | high;
#ifdef __clang__
  store(codes, _mm512_permutexvar_epi8(load<__m512i>(ORDER.from), (__m512i)merged));
#else  // GCC 12 warns of that
  typedef uint8_t bytes_v __attribute__((vector_size(64)));
  store(codes, __builtin_shuffle((bytes_v)merged, load<bytes_v>(ORDER.from)));
#endif
  sums = (u32v)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)merged, _mm512_set1_epi8(1));
#else
  for (int i = 0; i < VECTORS_A_STEP; i += 2) store_pair<D>(codes + i * LANES, {q[i], q[i + 1]});
  for (const s32v& v : q) sums += (u32v)v & 0xffu;
#endif
}

// `ahead`: bytes from x to what will be quantized soon, which is brought nearer meanwhile.
template <Dtype D>
int32_t tile_codes_of(const void* x, int64_t k, const qvgen::TokenGrid& grid, int max_code, int64_t ahead, uint8_t* codes) {
  constexpr int64_t STEP_BYTES = qvgen::TILE_K * dtype_size<D>;
  const CodeRange range(grid, max_code);
  const f32v low = range.low, high = range.high;
  const bool invertible = grid.scale > 0x1p-100f && grid.scale < 0x1p100f;
  u32v sums = {};
  int32_t padding = 0;
  alignas(64) uint8_t rest[STEP_BYTES] = {};
  for (int64_t i = 0; i < k; i += qvgen::TILE_K, codes += qvgen::TILE_STEP_BYTES) {
    const uint8_t* from = (const uint8_t*)x + i * dtype_size<D>;
    for (int64_t line = 0; line < STEP_BYTES; line += 64) __builtin_prefetch(from + ahead + line, 0, 3);
    const int64_t count = k - i < qvgen::TILE_K ? k - i : qvgen::TILE_K;
    if (count < qvgen::TILE_K) from = (const uint8_t*)__builtin_memcpy(rest, from, size_t(count * dtype_size<D>));
    f32v v[VECTORS_A_STEP];
    s32v q[VECTORS_A_STEP];
    u32v differences = {};
    for (int j = 0; j < VECTORS_A_STEP; j += 2) {
      f32v pair[2];
      load_pair<D>(from, j * LANES, pair);
      for (int u = 0; u < 2; u++) {
        v[j + u] = minimum(maximum(pair[u], low), high);
        q[j + u] = (s32v)(v[j + u] * range.less + range.rounder);
        differences |= (u32v)q[j + u] ^ (u32v)(v[j + u] * range.more + range.rounder);
      }
    }
    if (__builtin_expect(!invertible || any(differences), 0))
      for (int j = 0; j < VECTORS_A_STEP; j++) q[j] = (s32v)(v[j] / range.scale + ROUNDER) + range.zero_point;
    store_codes<D>(codes, q, sums);
    if (count < qvgen::TILE_K) {
      __builtin_memset(codes + count, 0, size_t(qvgen::TILE_K - count));
      padding = int32_t(qvgen::TILE_K - count) * grid.zero_point;  // the codes of zeros
    }
  }
  return int32_t(reduce(sums, [](u32v a, u32v b) { return a + b; })) - padding;
}

int32_t tile_codes(int dtype, const void* x, int64_t k, const qvgen::TokenGrid& grid, int max_code, int64_t ahead, uint8_t* codes) {
  if (grid.scale != grid.scale) {  // the outputs will be NaN whatever the codes are
    for (int64_t i = 0; i < k; i += qvgen::TILE_K, codes += qvgen::TILE_STEP_BYTES) __builtin_memset(codes, 0, qvgen::TILE_K);
    return 0;
  }
  if (dtype == int(Dtype::f32)) return tile_codes_of<Dtype::f32>(x, k, grid, max_code, ahead, codes);
  return tile_codes_of<Dtype::bf16>(x, k, grid, max_code, ahead, codes);
}

}  // namespace
