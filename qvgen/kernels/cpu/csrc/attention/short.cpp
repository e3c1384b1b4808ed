// Attention of short sequences, heads shared out among threads.
#include "api.h"
#include "isa/isa.h"
#include "threads/parallel.h"
#include "threads/workspace.h"

namespace qvgen {
namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 20;  // multiply-adds

thread_local Workspace head_memory;

}  // namespace
}  // namespace qvgen

using namespace qvgen;

int qvgen_short_attention(
    const char* isa_name, int dtype, const void* q, const void* k, const void* v, int64_t samples, int64_t queries, int64_t keys,
    int64_t heads, int64_t features, float scale, void* out, int threads) {
  const Isa* isa = find_isa(isa_name);
  if (!isa || keys < 1 || keys > SHORT_KEYS || features % 16 || features > SHORT_FEATURES) return QVGEN_UNSUPPORTED_ISA;
  const ShortAttention attention = {queries, keys, features, heads * features, scale};
  const int64_t worth = 1 + samples * heads * queries * keys * features / WORTH_A_THREAD, size = dtype ? 2 : 4;
  return parallel_for(int(worth < threads ? worth : threads), samples * heads, [&](int64_t i) {
    const auto at = [&](const void* data, int64_t tokens) {
      return (uint8_t*)data + (i / heads * tokens * attention.stride + i % heads * features) * size;
    };
    float* memory = reinterpret_cast<float*>(head_memory.get(attention.memory() * 4));
    isa->short_attention(dtype, attention, at(q, queries), at(k, keys), at(v, keys), at(out, queries), memory);
  });
}
