// Layers that read the same tokens, and two with a GELU between them: what linear.cpp offers to other drivers.
#pragma once

#include "block/block.h"

namespace qvgen {

// A status other than QVGEN_OK if `layer` does not take inputs of `in_features` with the timestep groups of `input`.
int check_layer(const qvgen_layer& layer, int64_t in_features, const qvgen_input& input);

// Outputs of `total` tokens to where each layer's `out` points.
int linear_outputs(const Isa& isa, const qvgen_layer* layers, int count, const Tokens& tokens, int64_t total, int threads);
int feed_forward_outputs(const Isa& isa, const qvgen_layer* layers, const Tokens& tokens, int64_t total, int threads);

}  // namespace qvgen
