// An instruction set: its own tiles, and everything else from the shared sources, compiled with the flags of the including file.
#pragma once

#include "epilogue.h"
#include "isa.h"
#include "rows.h"
#include "token.h"

namespace {

inline qvgen::Isa make_isa(const char* name, bool (*supported)(), void (*tile)(int, int, const qvgen::Tile&)) {
  qvgen::Isa isa = {};
  isa.name = name, isa.supported = supported, isa.tile = tile;
  isa.token_range = token_range, isa.token_codes = token_codes, isa.code_sum = code_sum;
  isa.finish = finish, isa.add_group = add_group, isa.finish_groups = finish_groups;
  isa.layer_norm = layer_norm, isa.rms_norm = rms_norm, isa.add_gated = add_gated;
  return isa;
}

}  // namespace
