// Attention shared out among threads: first the panels of all heads, then blocks of queries.
#include "attention/attention.h"

#include <cstring>

#include "api.h"
#include "threads/parallel.h"
#include "threads/workspace.h"

namespace qvgen {
namespace {

thread_local Workspace panel_memory, state_memory;

const AttentionKernel* const KERNELS[] = {attention_amx(), attention_avx512bf16()};
constexpr int COUNT = sizeof KERNELS / sizeof *KERNELS;

const AttentionKernel* find_kernel(const char* name, int64_t features) {
  for (const AttentionKernel* kernel : KERNELS)
    if (kernel && !strcmp(kernel->name, name) && features % 16 == 0 && features <= kernel->most_features && kernel->supported())
      return kernel;
  return nullptr;
}

}  // namespace
}  // namespace qvgen

using namespace qvgen;

const char* const* qvgen_attention_kernels() {
  static const char* names[COUNT + 1] = {};
  static const bool filled = [] {
    int count = 0;
    for (const AttentionKernel* kernel : KERNELS)
      if (kernel) names[count++] = kernel->name;
    return true;
  }();
  (void)filled;
  return names;
}

int qvgen_attention_supported(const char* name, int64_t features) { return find_kernel(name, features) != nullptr; }

int qvgen_attention(
    const char* name, const void* q, const void* k, const void* v, int64_t samples, int64_t queries, int64_t keys, int64_t heads,
    int64_t features, float scale, void* out, int threads) {
  const AttentionKernel* kernel = find_kernel(name, features);
  if (!kernel || keys < 1) return QVGEN_UNSUPPORTED_ISA;
  const AttentionShape s = {samples, queries, keys, heads, features, scale};
  const int64_t key_panels = s.key_panels(), most = kernel->most_queries, blocks = (queries + most - 1) / most;
  // First element of sample and head `index`.
  auto offset = [&](int64_t tokens, int64_t index) {
    return index / heads * tokens * s.stride() + index % heads * features;
  };
  try {
    uint32_t* words = reinterpret_cast<uint32_t*>(panel_memory.get(samples * heads * s.head_words() * 4));
    int status = parallel_for(threads, samples * heads * key_panels, [&](int64_t i) {
      const int64_t index = i / key_panels, panel = i % key_panels;
      uint32_t* panels = words + index * s.head_words();
      kernel->lay_out(
          s, static_cast<const uint16_t*>(k) + offset(keys, index), static_cast<const uint16_t*>(v) + offset(keys, index),
          panel, panels + panel * s.panel_keys(), panels + key_panels * s.panel_keys() + panel * s.panel_values());
    });
    if (status) return status;
    return parallel_for(threads, samples * heads * blocks, [&](int64_t i) {
      const int64_t index = i / blocks, first = i % blocks * most, left = queries - first;
      const int64_t at = offset(queries, index) + first * s.stride();
      kernel->attend(
          s, static_cast<const uint16_t*>(q) + at, left < most ? left : most,
          words + index * s.head_words(), static_cast<uint16_t*>(out) + at, state_memory.get(kernel->state_bytes));
    });
  } catch (const std::bad_alloc&) {
    return QVGEN_OUT_OF_MEMORY;
  }
}
