// Attention over panels: what an instruction set offers to the driver in attention.cpp.
#pragma once

#include <cstdint>

namespace qvgen {

constexpr int64_t ATTENTION_WIDTH = 64;  // of a panel: keys, or features of values

struct AttentionShape {
  int64_t samples, queries, keys, heads, features;
  float scale;

  int64_t key_panels() const { return (keys + ATTENTION_WIDTH - 1) / ATTENTION_WIDTH; }
  int64_t feature_panels() const { return (features + ATTENTION_WIDTH - 1) / ATTENTION_WIDTH; }
  int64_t stride() const { return heads * features; }  // elements between tokens
  int64_t pairs() const { return (features + 31) / 32 * 16; }  // of features, in whole tiles
  // Words of 32 bits: one panel of keys, the values of as many keys, and all of a head.
  int64_t panel_keys() const { return pairs() * ATTENTION_WIDTH; }
  int64_t panel_values() const { return feature_panels() * ATTENTION_WIDTH / 2 * ATTENTION_WIDTH; }
  int64_t head_words() const { return key_panels() * (panel_keys() + panel_values()); }
};

struct AttentionKernel {
  const char* name;
  bool (*supported)();
  int64_t most_features;
  int64_t most_queries;  // that a thread takes at a time
  int64_t state_bytes;
  // Panel `panel` of the keys and values of one head.
  void (*lay_out)(
      const AttentionShape&, const uint16_t* k, const uint16_t* v, int64_t panel, uint32_t* keys, uint32_t* values);
  // Up to `most_queries` queries of one head, whose panels are given; `state` is memory to work in.
  void (*attend)(
      const AttentionShape&, const uint16_t* q, int64_t queries, const uint32_t* panels, uint16_t* out, void* state);
};

// Null: not in this build.
const AttentionKernel* attention_amx();
const AttentionKernel* attention_avx512bf16();

}  // namespace qvgen
