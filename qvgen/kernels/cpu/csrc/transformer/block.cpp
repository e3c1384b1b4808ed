// A transformer block in one call, for sequences so short that calling its parts one by one takes longer than they do. Samples
// are shared out among threads; of a sample, all that lies between the block's input and output stays in the caches.
#include <cstring>

#include "api.h"
#include "linear/linear.h"
#include "threads/parallel.h"
#include "threads/workspace.h"

namespace qvgen {
namespace {

thread_local Workspace row_memory, attention_memory;

// One sample of the block's input, and memory for what comes between.
struct Sample {
  const Isa& isa;
  int64_t index, tokens, features;
  int dtype;
  qvgen_input input;  // of its own timestep group
  int threads;

  int64_t row_bytes(int64_t of) const { return of * (dtype ? 2 : 4); }
  void* row(void* data, int64_t m, int64_t of) const { return static_cast<uint8_t*>(data) + m * row_bytes(of); }
  const void* row(const void* data, int64_t m, int64_t of) const { return static_cast<const uint8_t*>(data) + m * row_bytes(of); }
};

// Where the tensors between x and the result lie, each in whole cache lines.
class Arena {
 public:
  explicit Arena(uint8_t* memory) : memory_(memory) {}
  void* take(int64_t bytes) {
    uint8_t* taken = memory_;
    memory_ += round_up(bytes, 64);
    return taken;
  }

 private:
  uint8_t* memory_;
};

// What modulates token m, or null.
const float* modulation(const float* data, int64_t sample_stride, int64_t token_stride, const Sample& s, int64_t m) {
  return data ? data + s.index * sample_stride + m * token_stride : nullptr;
}

const void* normalized(const qvgen_block_step& step, const Sample& s, const void* x, void* out) {
  if (!step.normalized) return x;
  for (int64_t m = 0; m < s.tokens; m++) {
    const auto of = [&](const float* data) { return modulation(data, step.modulation_samples, step.modulation_tokens, s, m); };
    const LayerNorm norm = {s.features, step.norm_eps, step.norm_weight, step.norm_bias, of(step.scale), of(step.shift)};
    s.isa.layer_norm(s.dtype, s.row(x, m, s.features), norm, 0, s.row(out, m, s.features));
  }
  return out;
}

int attention(const qvgen_block_step& step, const Sample& s, const void* x, void* y, Arena arena) {
  const int64_t inner = step.layers[0].out_features, width = inner / step.heads;
  const int64_t keys = step.text ? step.text_tokens : s.tokens;
  qvgen_layer layers[4];
  memcpy(layers, step.layers, sizeof layers);
  void* queries = layers[0].out = arena.take(s.tokens * s.row_bytes(inner));
  for (int i = 1; i < 3; i++) layers[i].out = arena.take(keys * s.row_bytes(inner));
  void* attended = arena.take(s.tokens * s.row_bytes(inner));
  layers[3].out = y;
  for (qvgen_layer& layer : layers) layer.out_dtype = s.dtype;

  const Tokens tokens = {x, s.dtype, s.features, 0, &s.input};
  if (int status = linear_outputs(s.isa, layers, step.text ? 1 : 3, tokens, s.tokens, s.threads)) return status;
  if (step.text) {
    const int64_t k = layers[1].in_features;
    const Tokens text = {s.row(step.text, s.index * keys, k), s.dtype, k, 0, &s.input};
    if (int status = linear_outputs(s.isa, layers + 1, 2, text, keys, s.threads)) return status;
  }
  const auto rotated = [&](void* data, int64_t count, const float* weight, float eps) {
    const RmsNorm norm = {inner, width, eps, weight, step.cosine, step.sine};
    for (int64_t m = 0; m < count; m++) s.isa.rms_norm(s.dtype, s.row(data, m, inner), norm, m, s.row(data, m, inner));
  };
  rotated(queries, s.tokens, step.query_weight, step.query_eps);
  rotated(layers[1].out, keys, step.key_weight, step.key_eps);
  const ShortAttention shape = {s.tokens, keys, width, inner, step.attention_scale};
  float* memory = reinterpret_cast<float*>(attention_memory.get(shape.memory() * 4));
  for (int64_t head = 0; head < step.heads; head++) {
    const auto at = [&](void* data) { return static_cast<uint8_t*>(data) + head * s.row_bytes(width); };
    s.isa.short_attention(s.dtype, shape, at(queries), at(layers[1].out), at(layers[2].out), at(attended), memory);
  }
  return linear_outputs(s.isa, layers + 3, 1, {attended, s.dtype, inner, 0, &s.input}, s.tokens, s.threads);
}

int feed_forward(const qvgen_block_step& step, const Sample& s, const void* x, void* y) {
  qvgen_layer layers[2];
  memcpy(layers, step.layers, sizeof layers);
  layers[1].out = y, layers[1].out_dtype = s.dtype;
  return feed_forward_outputs(s.isa, layers, {x, s.dtype, s.features, 0, &s.input}, s.tokens, s.threads);
}

int block(const qvgen_block_step* steps, int count, const Sample& s, const void* x, void* out, uint8_t* memory) {
  Arena arena(memory);
  void *normal = arena.take(s.tokens * s.row_bytes(s.features)), *y = arena.take(s.tokens * s.row_bytes(s.features));
  for (int i = 0; i < count; i++, x = out) {
    const qvgen_block_step& step = steps[i];
    const void* input = normalized(step, s, x, normal);
    if (int status = step.heads ? attention(step, s, input, y, arena) : feed_forward(step, s, input, y)) return status;
    for (int64_t m = 0; m < s.tokens; m++) {
      const float* gate = modulation(step.gate, step.gate_samples, step.gate_tokens, s, m);
      s.isa.add_gated(s.dtype, s.row(x, m, s.features), s.row(y, m, s.features), gate, s.features, s.row(out, m, s.features));
    }
  }
  return QVGEN_OK;
}

int64_t memory_bytes(const qvgen_block_step* steps, int count, int64_t tokens, int64_t features, int64_t element) {
  int64_t most = 0;
  for (int i = 0; i < count; i++) {
    if (!steps[i].heads) continue;
    const int64_t inner = steps[i].layers[0].out_features, keys = steps[i].text ? steps[i].text_tokens : tokens;
    const int64_t bytes = 2 * round_up(tokens * inner * element, 64) + 2 * round_up(keys * inner * element, 64);
    if (bytes > most) most = bytes;
  }
  return most + 2 * round_up(tokens * features * element, 64);
}

int check(const qvgen_block_step& step, const qvgen_input& input, int64_t features) {
  if (!step.heads) {
    const int64_t wide = step.layers[0].out_features;
    if (step.layers[1].out_features != features) return QVGEN_NOT_A_WEIGHT;
    const int status = check_layer(step.layers[0], features, input);
    return status ? status : check_layer(step.layers[1], wide, input);
  }
  const int64_t inner = step.layers[0].out_features, width = inner / step.heads;
  const int64_t keys = step.text ? step.text_tokens : input.tokens;
  if (inner % step.heads || width % 16 || width > SHORT_FEATURES || keys < 1 || keys > SHORT_KEYS) return QVGEN_UNSUPPORTED_ISA;
  for (int i = 0; i < 4; i++) {
    const qvgen_layer& layer = step.layers[i];
    const bool of_text = step.text && (i == 1 || i == 2);
    if (layer.out_features != (i == 3 ? features : inner)) return QVGEN_NOT_A_WEIGHT;
    if (int status = check_layer(layer, i == 3 ? inner : of_text ? layer.in_features : features, input)) return status;
  }
  return step.layers[1].in_features == step.layers[2].in_features ? QVGEN_OK : QVGEN_NOT_A_WEIGHT;
}

}  // namespace
}  // namespace qvgen

using namespace qvgen;

int qvgen_transformer_block(
    const char* isa_name, const qvgen_block_step* steps, int count, int64_t features, const qvgen_input* input, void* out,
    int threads) {
  const Isa* isa = find_isa(isa_name);
  if (!isa) return QVGEN_UNSUPPORTED_ISA;
  for (int i = 0; i < count; i++)
    if (int status = check(steps[i], *input, features)) return status;
  const int64_t samples = input->samples, tokens = input->tokens, element = input->dtype ? 2 : 4;
  const int64_t bytes = memory_bytes(steps, count, tokens, features, element);
  std::atomic<int> status{QVGEN_OK};
  const int failed = parallel_for(threads, samples, [&](int64_t i) {
    qvgen_input own = *input;
    own.samples = 1;
    if (input->timestep_groups > 1) own.timestep_group += i, own.timestep_groups = 1;
    const Sample sample = {*isa, i, tokens, features, input->dtype, own, samples == 1 ? threads : 1};
    const int64_t start = i * tokens * features * element;
    const uint8_t* x = static_cast<const uint8_t*>(input->x) + start;
    if (int of_sample = block(steps, count, sample, x, static_cast<uint8_t*>(out) + start, row_memory.get(bytes)))
      status = of_sample;
  });
  return failed ? failed : status.load();
}
