// Who computes which tokens and panels, on tiles.
#include <atomic>
#include <cstring>

#include "threads/parallel.h"
#include "threads/workspace.h"
#include "tiles/codes.h"

namespace qvgen {
namespace {

constexpr int64_t BLOCK_TOKENS = 512;         // whose codes, or a chunk of them along k, stay in the second level
constexpr int64_t WORTH_A_THREAD = 1 << 21;   // multiply-adds
constexpr int64_t STREAM_BYTES = 1 << 20;     // of outputs, most of which would leave the second level (2 MiB) in any case
constexpr int64_t LEAST_TOKENS = 16;          // at 12 registers are still as fast or faster, at 24 tiles 1.4 times (LOG.md)

std::atomic<int64_t> least_tokens{LEAST_TOKENS};

thread_local Workspace row_memory, range_memory, code_memory, shared_memory;

bool streams(const qvgen_layer& layer, int64_t total) {
  const Header& h = header(layer);
  const int64_t row = h.n * (layer.out_dtype ? 2 : 4);
  const bool by_the_kernel = h.groups == 1 && sums_are_small(max_code(layer), h.weight_bits, h.k);
  return by_the_kernel && h.n % PANEL == 0 && uintptr_t(layer.out) % 64 == 0 && total * row >= STREAM_BYTES;
}

uint8_t* output(const qvgen_layer& layer, int64_t m) {
  return static_cast<uint8_t*>(layer.out) + m * layer.out_features * (layer.out_dtype ? 2 : 4);
}

// Quantize `count` tokens of one or several blocks of 32, the first of them token m of `codes`.
void quantize(
    const Isa& isa, const qvgen_layer& layer, const Tokens& tokens, int64_t count, Range* ranges, bool known, const TileCodes& codes) {
  const Header& h = header(layer);
  uint8_t* const row = row_memory.get(Codes::row_stride(h));
  const int64_t ahead = h.k * (tokens.dtype ? 2 : 4);  // the next token (two or four of them ahead: the same or worse)
  for (int64_t m = 0; m < count; m++) {
    if (!known) ranges[m] = token_range(isa, tokens, m);
    if (h.groups > 1) {
      quantize_token(isa, layer, tokens.from(m), 0, ranges[m], {row, 0, codes.grid + m, codes.sums + m * h.groups});
      write_token(h, row, m, codes);
      continue;
    }
    const TokenGrid grid = codes.grid[m] = grid_of(layer, tokens, m, ranges[m]);
    codes.sums[m] = isa.tiles->quantize(tokens.dtype, tokens.at(m), h.k, grid, max_code(layer), ahead, token_codes(codes, m));
    codes.scale[m] = grid.scale, codes.zero_point[m] = float(grid.zero_point);
    codes.sum[m] = float(codes.sums[m] - int32_t(h.k) * grid.zero_point);
  }
  for (int64_t m = count; m % TILE_TOKENS; m++) write_token(h, nullptr, m, codes);
}

// Every layer over one block of tokens, by one thread.
void block_outputs(
    const Isa& isa, const qvgen_layer* layers, int count, const Tokens& tokens, int64_t first, int64_t size, int64_t total) {
  Range* const ranges = reinterpret_cast<Range*>(range_memory.get(size * int64_t(sizeof(Range))));
  for (int i = 0; i < count; i++) {
    const Header& h = header(layers[i]);
    const TileCodes codes = TileCodes::in(code_memory.get(TileCodes::bytes(h, size)), h, size);
    if (i == 0 || !same_codes(layers[i], layers[i - 1])) quantize(isa, layers[i], tokens.from(first), size, ranges, i > 0, codes);
    run_task({isa, h, &layers[i], codes, size, output(layers[i], first), nullptr, streams(layers[i], total)}, 0, panels(h));
  }
}

// One layer, its tokens quantized by all threads first; then they take blocks of tokens by parts of the panels.
int shared_outputs(const Isa& isa, const qvgen_layer& layer, const Tokens& tokens, int64_t total, int64_t size, int threads) {
  const Header& h = header(layer);
  const TileCodes codes = TileCodes::in(shared_memory.get(TileCodes::bytes(h, total)), h, total);
  const auto left = [](int64_t whole, int64_t first, int64_t most) { return whole - first < most ? whole - first : most; };
  int status = parallel_for(threads, (total + TILE_TOKENS - 1) / TILE_TOKENS, [&](int64_t block) {
    const int64_t m = block * TILE_TOKENS;
    Range ranges[TILE_TOKENS];
    quantize(isa, layer, tokens.from(m), left(total, m, TILE_TOKENS), ranges, false, codes.from(m));
  });
  if (status) return status;
  constexpr int64_t PARTS_PER_THREAD = 4;
  const int64_t blocks = (total + size - 1) / size, wanted = (PARTS_PER_THREAD * threads + blocks - 1) / blocks;
  const int64_t part = (panels(h) + wanted - 1) / wanted, parts = (panels(h) + part - 1) / part;
  return parallel_for(threads, blocks * parts, [&](int64_t i) {
    const Configured configured(*isa.tiles);
    const int64_t m = i / parts * size, first = i % parts * part;
    const TileTask task = {isa, h, &layer, codes.from(m), left(total, m, size), output(layer, m), nullptr, streams(layer, total)};
    run_task(task, first, first + left(panels(h), first, part));
  });
}

}  // namespace

void write_token(const Header& h, const uint8_t* row, int64_t m, const TileCodes& codes) {
  uint8_t* to = token_codes(codes, m);
  const int64_t padded = group_steps(h) * STEP;
  for (int64_t g = 0; g < h.groups; g++)
    for (int64_t k = 0; k < padded; k += TILE_K, to += TILE_STEP_BYTES) {
      const int64_t count = !row ? 0 : padded - k < TILE_K ? padded - k : TILE_K;
      if (count == TILE_K) {
        memcpy(to, row + g * padded + k, TILE_K);
        continue;
      }
      if (count) memcpy(to, row + g * padded + k, size_t(count));
      memset(to + count, 0, size_t(TILE_K - count));
    }
}

bool tiles_pay(const Isa& isa, int64_t tokens) { return isa.tiles && tokens >= least_tokens.load(std::memory_order_relaxed); }

int tile_outputs(const Isa& isa, const qvgen_layer* layers, int count, const Tokens& tokens, int64_t total, int threads) {
  int64_t work = 0;
  for (int i = 0; i < count; i++) work += total * layers[i].in_features * layers[i].out_features;
  const int64_t worth = 1 + work / WORTH_A_THREAD;
  if (worth < threads) threads = int(worth);
  const int64_t least = (total + BLOCK_TOKENS - 1) / BLOCK_TOKENS, size = round_up((total + least - 1) / least, TILE_TOKENS);
  const int64_t blocks = (total + size - 1) / size;
  if (threads > 1 && blocks < 2 * threads) {
    for (int i = 0; i < count; i++)
      if (int status = shared_outputs(isa, layers[i], tokens, total, size, threads)) return status;
    return QVGEN_OK;
  }
  return parallel_for(threads, blocks, [&](int64_t block) {
    const Configured configured(*isa.tiles);
    const int64_t first = block * size, left = total - first;
    block_outputs(isa, layers, count, tokens, first, left < size ? left : size, total);
  });
}

void tile_integers(const Isa& isa, const Header& h, const uint8_t* a, int64_t m, int32_t* out) {
  const TileCodes codes = TileCodes::in(code_memory.get(TileCodes::bytes(h, m)), h, m);
  uint8_t* const row = row_memory.get(Codes::row_stride(h));
  memset(row, 0, size_t(Codes::row_stride(h)));
  for (int64_t i = 0; i < m; i++) memcpy(row, a + i * h.k, size_t(h.k)), write_token(h, row, i, codes);
  for (int64_t i = m; i % TILE_TOKENS; i++) write_token(h, nullptr, i, codes);
  const Configured configured(*isa.tiles);
  run_task({isa, h, nullptr, codes, m, nullptr, out, false}, 0, panels(h));
}

}  // namespace qvgen

void qvgen_use_tiles(int64_t tokens) { qvgen::least_tokens = tokens > 0 ? tokens : qvgen::LEAST_TOKENS; }
