// An instruction set: its own tiles, and everything else from the shared sources, compiled with the flags of the including file.
#pragma once

#include "linear/epilogue.h"
#include "isa/isa.h"
#include "linear/rows.h"
#include "linear/token.h"

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

// Constants only (static constexpr Isa isa = make_isa(...)): every processor asks for all instruction sets when the library is
// loaded, and code that would put one together here is compiled with flags that few of them know.
constexpr qvgen::Isa make_isa(
    const char* name, bool (*supported)(), void (*tile)(int, int, const qvgen::Tile&), int64_t (*burst)(int64_t) = nullptr) {
  qvgen::Isa isa = {};
  isa.burst = burst;
  isa.name = name, isa.supported = supported, isa.tile = tile;
  isa.token_range = token_range, isa.token_codes = token_codes, isa.code_sum = code_sum;
  isa.finish = finish, isa.add_group = add_group, isa.finish_groups = finish_groups;
  isa.layer_norm = layer_norm, isa.rms_norm = rms_norm, isa.add_gated = add_gated;
  return isa;
}

}  // namespace
