// A block of tokens as codes, and a panel of outputs from it: the two pieces of work that the drivers hand out.
#pragma once

#include "api.h"
#include "isa/isa.h"

namespace qvgen {

inline const Header& header(const qvgen_layer& layer) { return *reinterpret_cast<const Header*>(layer.weight); }

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Tokens {
  const void* x;
  int dtype;
  int64_t k;
  int64_t first;             // index of the first one in the whole input, which decides its sample
  const qvgen_input* input;  // of timestep groups

  const void* at(int64_t m) const { return static_cast<const uint8_t*>(x) + m * k * (dtype ? 2 : 4); }
  int64_t timestep_group(int64_t m) const {
    return input->timestep_group[input->timestep_groups == 1 ? 0 : (first + m) / input->tokens];
  }
  // The tokens from m on.
  Tokens from(int64_t m) const { return {at(m), dtype, k, first + m, input}; }
};

// Codes of some tokens for one layer.
struct Codes {
  uint8_t* a;
  int64_t stride;
  TokenGrid* grid;
  int32_t* sums;  // (tokens, groups)

  static int64_t row_stride(const Header& h);
  static int64_t bytes(const Header& h, int64_t tokens);
  static Codes in(uint8_t* memory, const Header& h, int64_t tokens);
  Codes from(int64_t m, const Header& h) const { return {a + m * stride, stride, grid + m, sums + m * h.groups}; }
};

inline int max_code(const qvgen_layer& layer) { return (1 << layer.activation_bits) - 1; }

// Whether the same input gets the same codes for both.
bool same_codes(const qvgen_layer& a, const qvgen_layer& b);

struct Range {
  float lower, upper;  // always include 0; NaN if the token holds NaN or Inf
};

Range token_range(const Isa& isa, const Tokens& tokens, int64_t m);

TokenGrid grid_of(const qvgen_layer& layer, const Tokens& tokens, int64_t m, Range range);

// Quantize token m of `tokens`, whose range is given, into row m of `codes`.
void quantize_token(
    const Isa& isa, const qvgen_layer& layer, const Tokens& tokens, int64_t m, Range range, const Codes& codes);

// Where the outputs of one panel go, and their bias.
class PanelTarget {
 public:
  PanelTarget(const qvgen_layer& layer, int64_t p);
  // Rows from token m of `out` (tokens, N).
  Target at(int64_t m, void* out) const;
  const float* bias() const { return bias_; }  // (PANEL,)

 private:
  const qvgen_layer& layer_;
  int64_t n_, columns_;
  alignas(64) float bias_[PANEL];
};

// Outputs of panel p for `count` tokens, to `out` (count, N).
void panel_outputs(const Isa& isa, const qvgen_layer& layer, int64_t p, const Codes& codes, int64_t count, void* out);

}  // namespace qvgen
