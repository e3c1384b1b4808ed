// The drivers: which tokens and panels are computed when, and by whom.
//
// Tokens are taken in blocks whose codes stay in the second-level cache; every panel of the weight passes over a block
// once, and within a panel the tiles of the block, so that the panel stays in the first level. Threads take whole blocks;
// where there are too few of them they share the quantization and then the panels.
#include "linear/linear.h"

#include <cstring>

#include "linear/dense.h"
#include "threads/parallel.h"
#include "strassen/strassen.h"
#include "threads/workspace.h"
#include "tiles/tiles.h"

namespace qvgen {

const Header* find_header(const uint8_t* weight, int64_t bytes);

namespace {

constexpr int64_t BLOCK_BYTES = 480 << 10;   // of codes
constexpr int64_t SMALLEST_BLOCK = 48;       // tokens; with fewer, threads share a block
constexpr int64_t WORTH_A_THREAD = 1 << 19;  // multiply-adds: what waking one costs
constexpr int MOST_LAYERS = 8;               // that share an input

thread_local Workspace range_memory, code_memory, hidden_memory, shared_memory;

uint8_t* output(const qvgen_layer& layer, int64_t m) {
  return static_cast<uint8_t*>(layer.out) + m * layer.out_features * (layer.out_dtype ? 2 : 4);
}

// Tokens per block: what the cache holds, evenly, and every thread the same number of blocks.
int64_t block_tokens(const Header& h, int64_t tokens, int threads) {
  int64_t most = BLOCK_BYTES / Codes::row_stride(h);
  if (most < TILE_ROWS) most = TILE_ROWS;
  int64_t blocks = round_up((tokens + most - 1) / most, threads);
  if (blocks < 2 * threads && tokens / (2 * threads) >= SMALLEST_BLOCK) blocks = 2 * threads;  // so that a slow core takes fewer
  return round_up((tokens + blocks - 1) / blocks, TILE_ROWS);
}

// Layers over one block of tokens, by one thread; layer i writes to out[i].
void block_outputs(
    const Isa& isa, const qvgen_layer* layers, int count, const Tokens& tokens, int64_t size, uint8_t* const* out) {
  Range* ranges = reinterpret_cast<Range*>(range_memory.get(size * int64_t(sizeof(Range))));
  for (int64_t m = 0; m < size; m++) ranges[m] = token_range(isa, tokens, m);
  for (int i = 0; i < count; i++) {
    const Header& h = header(layers[i]);
    const Codes codes = Codes::in(code_memory.get(Codes::bytes(h, size)), h, size);
    if (i == 0 || !same_codes(layers[i], layers[i - 1]))
      for (int64_t m = 0; m < size; m++) quantize_token(isa, layers[i], tokens, m, ranges[m], codes);
    for (int64_t p = 0; p < panels(h); p++) panel_outputs(isa, layers[i], p, codes, size, out[i]);
  }
}

int shared_outputs(const Isa& isa, const qvgen_layer& layer, const Tokens& tokens, int64_t count, int threads) {
  const Header& h = header(layer);
  const Codes codes = Codes::in(shared_memory.get(Codes::bytes(h, count)), h, count);
  const int quantizers = count * h.k < (1 << 15) ? 1 : threads;
  int status = parallel_for(quantizers, count, [&](int64_t m) {
    quantize_token(isa, layer, tokens, m, token_range(isa, tokens, m), codes);
  });
  if (status) return status;
  return parallel_for(
      threads, panels(h), [&](int64_t p) { panel_outputs(isa, layer, p, codes, count, output(layer, 0)); });
}

struct Plan {
  int threads;
  int64_t block, blocks;  // tokens per block
  bool by_block() const { return threads == 1 || block >= SMALLEST_BLOCK; }
};

Plan plan(const qvgen_layer* layers, int count, int64_t tokens, int threads) {
  int64_t work = 0;
  for (int i = 0; i < count; i++) work += tokens * layers[i].in_features * layers[i].out_features;
  const int64_t worth = 1 + work / WORTH_A_THREAD;
  Plan p;
  p.threads = int(worth < threads ? worth : threads);
  p.block = block_tokens(header(layers[0]), tokens, p.threads);
  p.blocks = (tokens + p.block - 1) / p.block;
  return p;
}

// f(first token, number of tokens) for each block.
template <class F>
int for_blocks(const Plan& plan, int64_t tokens, const F& f) {
  return parallel_for(plan.threads, plan.blocks, [&](int64_t block) {
    const int64_t first = block * plan.block, left = tokens - first;
    f(first, left < plan.block ? left : plan.block);
  });
}

bool all_strassen(const Isa& isa, const qvgen_layer* layers, int count, int64_t total, int threads) {
  for (int i = 0; i < count; i++)
    if (!strassen_pays(isa, layers[i], total, threads)) return false;
  return true;
}

}  // namespace

int linear_outputs(const Isa& isa, const qvgen_layer* layers, int count, const Tokens& tokens, int64_t total, int threads) {
  if (layers[0].activation_bits == 0) {  // inputs stay in floating point
    for (int i = 0; i < count; i++)
      if (int status = dense_outputs(isa, layers[i], tokens, total, threads)) return status;
    return QVGEN_OK;
  }
  if (tiles_pay(isa, total)) return tile_outputs(isa, layers, count, tokens, total, threads);
  if (all_strassen(isa, layers, count, total, threads)) {
    for (int i = 0; i < count; i++)
      if (int status = strassen_outputs(isa, layers[i], tokens, total, output(layers[i], 0), threads)) return status;
    return QVGEN_OK;
  }
  const Plan p = plan(layers, count, total, threads);
  if (!p.by_block()) {
    for (int i = 0; i < count; i++)
      if (int status = shared_outputs(isa, layers[i], tokens, total, p.threads)) return status;
    return QVGEN_OK;
  }
  return for_blocks(p, total, [&](int64_t first, int64_t size) {
    uint8_t* out[MOST_LAYERS];
    for (int i = 0; i < count; i++) out[i] = output(layers[i], first);
    block_outputs(isa, layers, count, tokens.from(first), size, out);
  });
}

// The intermediate of so many tokens at a time: few enough for the third-level cache, enough to work in large blocks. (Token blocks
// that keep it in the second level were tried; their up projection reads its weights too often, 4 % slower: LOG.md.)
static constexpr int64_t HIDDEN_BYTES = 15 << 20;

int feed_forward_outputs(const Isa& isa, const qvgen_layer* layers, const Tokens& tokens, int64_t total, int threads) {
  qvgen_layer up = layers[0], down = layers[1];
  const int64_t row = up.out_features * (tokens.dtype ? 2 : 4), most = round_up(1 + HIDDEN_BYTES / row, TILE_ROWS);
  const int64_t chunks = (total + most - 1) / most, size = round_up((total + chunks - 1) / chunks, TILE_ROWS);
  up.out = hidden_memory.get((size < total ? size : total) * row);
  up.out_dtype = tokens.dtype;
  for (int64_t first = 0; first < total; first += size) {
    const int64_t here = total - first < size ? total - first : size;
    down.out = output(layers[1], first);
    if (int status = linear_outputs(isa, &up, 1, tokens.from(first), here, threads)) return status;
    const Tokens hidden = {up.out, tokens.dtype, down.in_features, tokens.first + first, tokens.input};
    if (int status = linear_outputs(isa, &down, 1, hidden, here, threads)) return status;
  }
  return QVGEN_OK;
}

int check_layer(const qvgen_layer& l, int64_t in_features, const qvgen_input& input) {
  const Header* found = find_header(l.weight, l.weight_bytes);
  if (!found) return QVGEN_NOT_A_WEIGHT;
  const Header& h = *found;
  if (h.k != in_features || h.k != l.in_features || h.n != l.out_features || h.groups != l.groups)
    return QVGEN_NOT_A_WEIGHT;
  for (int64_t i = 0; i < input.timestep_groups; i++)
    if (input.timestep_group[i] < 0 || input.timestep_group[i] >= l.clips) return QVGEN_TIMESTEP_GROUP;
  return QVGEN_OK;
}

namespace {

template <class F>
int checked(const char* isa_name, const qvgen_layer* layers, int count, bool chained, const qvgen_input* input, const F& run) {
  const Isa* isa = find_isa(isa_name);
  if (!isa) return QVGEN_UNSUPPORTED_ISA;
  for (int i = 0; i < count; i++) {
    const int64_t in_features = chained && i ? layers[i - 1].out_features : layers[0].in_features;
    if (int status = check_layer(layers[i], in_features, *input)) return status;
  }
  const int64_t total = input->samples * input->tokens;
  if (total == 0) return QVGEN_OK;
  try {
    return run(*isa, Tokens{input->x, input->dtype, layers[0].in_features, 0, input}, total);
  } catch (const std::bad_alloc&) {
    return QVGEN_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace qvgen

using namespace qvgen;

int qvgen_linear(const char* isa, const qvgen_layer* layers, int count, const qvgen_input* input, int threads) {
  if (count < 1 || count > MOST_LAYERS) return QVGEN_TOO_MANY_LAYERS;
  return checked(isa, layers, count, false, input, [&](const Isa& chosen, const Tokens& tokens, int64_t total) {
    return linear_outputs(chosen, layers, count, tokens, total, threads);
  });
}

int qvgen_feed_forward(const char* isa, const qvgen_layer* layers, const qvgen_input* input, int threads) {
  return checked(isa, layers, 2, true, input, [&](const Isa& chosen, const Tokens& tokens, int64_t total) {
    return feed_forward_outputs(chosen, layers, tokens, total, threads);
  });
}

int qvgen_integer_part(
    const char* isa_name, const uint8_t* weight, int64_t weight_bytes, const uint8_t* a, int64_t m, int max_code, int32_t* out) {
  const Isa* isa = find_isa(isa_name);
  if (!isa) return QVGEN_UNSUPPORTED_ISA;
  const Header* found = find_header(weight, weight_bytes);
  if (!found || found->groups != 1) return QVGEN_NOT_A_WEIGHT;
  const Header& h = *found;
  if (tiles_pay(*isa, m)) return tile_integers(*isa, h, a, m, out), QVGEN_OK;
  const int64_t stride = Codes::row_stride(h);
  uint8_t* padded = code_memory.get(m * stride);
  memset(padded, 0, size_t(m * stride));
  for (int64_t i = 0; i < m; i++) memcpy(padded + i * stride, a + i * h.k, size_t(h.k));
  for (int64_t p = 0; p < panels(h); p++) {
    for (int64_t first = 0; first < m; first += TILE_ROWS) {
      const int rows = int(m - first < TILE_ROWS ? m - first : TILE_ROWS);
      int32_t sums[TILE_ROWS], tile[TILE_ROWS * PANEL];
      for (int i = 0; i < rows; i++) sums[i] = isa->code_sum(padded + (first + i) * stride, h.k);
      isa->tile(h.lane_bits, h.weight_bits,
                {rows, padded + first * stride, stride, panel(h, p), group_steps(h), max_code, sums, 1, tile});
      for (int i = 0; i < rows; i++)
        for (int64_t n = p * PANEL; n < h.n && n < (p + 1) * PANEL; n++)
          out[(first + i) * h.n + n] = tile[i * PANEL + n % PANEL];
    }
  }
  return QVGEN_OK;
}

int qvgen_quantize_tokens(
    const char* isa_name, const qvgen_layer* layer, const qvgen_input* input, uint8_t* codes, float* scale, int32_t* zero_point,
    int32_t* code_sum) {
  return checked(isa_name, layer, 1, false, input, [&](const Isa& isa, const Tokens& tokens, int64_t total) {
    const Header& h = header(*layer);
    const Codes row = Codes::in(code_memory.get(Codes::bytes(h, 1)), h, 1);
    for (int64_t m = 0; m < total; m++) {
      quantize_token(isa, *layer, tokens.from(m), 0, token_range(isa, tokens, m), row);
      memcpy(codes + m * h.k, row.a, size_t(h.k));
      scale[m] = row.grid->scale, zero_point[m] = row.grid->zero_point, code_sum[m] = row.sums[0];
    }
    return int(QVGEN_OK);
  });
}
