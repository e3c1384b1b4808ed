// The grid of a token, operation for operation as qvgen/quant/primitives.py computes it. Compiled without contraction of
// a product and a sum into one rounding, which would make other scales.
#include <cmath>

#include "isa/isa.h"

namespace qvgen {

TokenGrid token_grid(float lower, float upper, float clip_lower, float clip_upper, int bits, bool symmetric) {
  lower = clip_lower * lower;
  upper = clip_upper * upper;
  const float max_code = float((1 << bits) - 1);
  const int middle = 1 << (bits - 1);
  float width = symmetric ? (-lower > upper ? -lower : upper) / float(middle - 1) : (upper - lower) / max_code;
  float scale = width == 0 ? 1.0f : width;
  scale = scale + 0 * scale;  // Inf becomes NaN
  if (std::isnan(scale)) return {scale, 0};
  if (symmetric) return {scale, middle};
  float zero_point = std::nearbyint(-lower / scale);
  zero_point = zero_point < 0 ? 0 : zero_point > max_code ? max_code : zero_point;
  return {scale, int32_t(zero_point)};
}

}  // namespace qvgen
