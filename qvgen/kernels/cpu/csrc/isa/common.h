// An instruction set: its own tiles, and everything else from the shared sources, compiled with the flags of the including file.
#pragma once

#include "attention/short.h"
#include "isa/isa.h"
#include "linear/epilogue.h"
#include "linear/floats.h"
#include "linear/rows.h"
#include "linear/token.h"
#include "training/fake_quantize.h"

namespace {

// `product(sum, codes, weights)`: the instruction, on registers (Isa::burst).
template <class Sum, class F>
int64_t burst(int64_t rounds, const F& product) {
  constexpr int SUMS = 12;  // more than its latency
  Sum sum[SUMS] = {};
  const u32v codes = u32v{} + uint32_t(rounds);
  for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 12
    for (int s = 0; s < SUMS; s++) product(sum[s], codes, codes);
#pragma GCC unroll 12
  for (int s = 1; s < SUMS; s++) sum[0] += sum[s];
  volatile Sum kept = sum[0];
  (void)kept;
  return rounds * SUMS * int64_t(sizeof(Sum));
}

int64_t burst_floats(int64_t rounds) {
  const f32v one = splat(1.0f);  // not bits of an integer, which are numbers that some processors take longer for
  return burst<f32v>(rounds, [one](f32v& sum, u32v, u32v) { multiply_add(sum, one, one); }) / 4;
}
#ifdef __AVX512BF16__
int64_t burst_pairs(int64_t rounds) {
  const f32v one = splat(1.0f);
  return burst<f32v>(rounds, [one](f32v& sum, u32v, u32v) { multiply_add_pairs(sum, one, one); }) / 2;
}
#endif

// Constants only (static constexpr Isa isa = make_isa(...)): every processor asks for all instruction sets when the library is
// loaded, and code that would put one together here is compiled with flags that few of them know.
constexpr qvgen::Isa make_isa(
    const char* name, bool (*supported)(), void (*tile)(int, int, const qvgen::Tile&), int64_t (*burst)(int64_t) = nullptr) {
  qvgen::Isa isa = {};
  isa.burst = burst;
  isa.name = name, isa.supported = supported, isa.tile = tile;
  isa.token_range = token_range, isa.token_codes = token_codes, isa.code_sum = code_sum;
  isa.finish = finish, isa.add_group = add_group, isa.finish_groups = finish_groups;
  isa.dequantize = dequantize, isa.dense_tile = dense_tile, isa.burst_floats = burst_floats;
#ifdef __AVX512BF16__
  isa.burst_pairs = burst_pairs;
#endif
  isa.layer_norm = layer_norm, isa.rms_norm = rms_norm, isa.add_gated = add_gated;
  isa.short_attention = short_attention;
  isa.fake_quantize = fake_quantize, isa.fake_quantize_backward = fake_quantize_backward;
  return isa;
}

}  // namespace
