// Linear layers whose inputs are not quantized.
#pragma once

#include "block/block.h"

namespace qvgen {

// Outputs of `total` tokens of one layer with activation_bits 0. Returns a qvgen_status.
int dense_outputs(const Isa& isa, const qvgen_layer& layer, const Tokens& tokens, int64_t total, int threads);

// The zero points of a panel, (PANEL,), exactly: they were taken apart without rounding.
void read_zero_points(const Header& h, const PanelGrid& grid, float* zero_point);

}  // namespace qvgen
