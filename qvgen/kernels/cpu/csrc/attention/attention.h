// Attention over panels: what an instruction set offers to the driver in attention.cpp.
#pragma once

#include <cstdint>

namespace qvgen {

constexpr int64_t ATTENTION_WIDTH = 64;    // of a panel: keys, or features of values
constexpr int64_t ATTENTION_QUERIES = 96;  // that a thread takes at a time

struct AttentionShape {
  int64_t samples, queries, keys, heads, features;
  float scale;

  int64_t key_panels() const { return (keys + ATTENTION_WIDTH - 1) / ATTENTION_WIDTH; }
  int64_t feature_panels() const { return (features + ATTENTION_WIDTH - 1) / ATTENTION_WIDTH; }
  int64_t stride() const { return heads * features; }  // elements between tokens
  // Words of 32 bits: one panel of keys, the values of as many keys, and all of a head.
  int64_t panel_keys() const { return features / 2 * ATTENTION_WIDTH; }
  int64_t panel_values() const { return feature_panels() * ATTENTION_WIDTH / 2 * ATTENTION_WIDTH; }
  int64_t head_words() const { return key_panels() * (panel_keys() + panel_values()); }
};

struct AttentionKernel {
  bool (*supported)();
  int64_t most_features;
  int64_t state_bytes;
  // Panel `panel` of the keys and values of one head.
  void (*lay_out)(
      const AttentionShape&, const uint16_t* k, const uint16_t* v, int64_t panel, uint32_t* keys, uint32_t* values);
  // Up to ATTENTION_QUERIES queries of one head, whose panels are given; `state` is memory to work in.
  void (*attend)(
      const AttentionShape&, const uint16_t* q, int64_t queries, const uint32_t* panels, uint16_t* out, void* state);
};

const AttentionKernel* attention_avx512bf16();  // null: not in this build

}  // namespace qvgen
