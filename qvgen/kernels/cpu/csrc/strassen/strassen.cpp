// Tokens are taken in large blocks, because the factors of the weight are made anew for each; within a block first the factors
// of the tokens, then, panel pair by panel pair, the products. The seven products pass one after the other over all tokens
// of the block, so that one factor of the weight at a time has to stay in the cache.
#include "strassen/strassen.h"

#include <cstring>

#include "threads/parallel.h"
#include "threads/workspace.h"

namespace qvgen {
namespace {

constexpr int64_t MOST_TOKENS = 66 * STRASSEN_TOKENS;  // in a block
// Below these the additions cost more than the product saved. The slower products are beside additions, the sooner it pays: with
// 128 multiply-adds per cycle (Zen 5) only for long rows, with 64 (Zen 4) for most (measured, LOG.md).
constexpr double FAST_PRODUCTS = 96;
constexpr int64_t LEAST_K = 4096, LEAST_TOKENS = 256;
constexpr int64_t LEAST_K_SLOW = 1536, LEAST_TOKENS_SLOW = 512;

bool fast_products(const Isa& isa) {
  thread_local const Isa* known = nullptr;
  thread_local bool fast;
  if (known != &isa) known = &isa, fast = peak(isa) > FAST_PRODUCTS;
  return fast;
}

enum Mode { STRASSEN_NEVER = 0, STRASSEN_AUTO = 1, STRASSEN_ALWAYS = 2 };
std::atomic<int> mode{STRASSEN_AUTO};

struct Update {
  int row, column, sign;  // of C
};
// In which sums each product goes. P5 and P6 come first because they alone need a correction for their shift.
constexpr int ORDER[STRASSEN_TERMS] = {5, 6, 0, 1, 2, 3, 4};
constexpr int SHIFTED = 5;  // terms from here on are of shifted codes
struct Updates {
  int count;
  Update update[2];
};
constexpr Updates UPDATES[STRASSEN_TERMS] = {
    {2, {{0, 0, 1}, {1, 1, 1}}}, {2, {{1, 0, 1}, {1, 1, -1}}}, {2, {{0, 1, 1}, {1, 1, 1}}}, {2, {{0, 0, 1}, {1, 0, 1}}},
    {2, {{0, 0, -1}, {0, 1, 1}}}, {1, {{1, 1, 1}}},            {1, {{0, 0, 1}}},
};

thread_local Workspace shared_memory, row_memory, factor_memory;

struct Sizes {
  int64_t half;        // bytes of half a token's codes
  int64_t stride;      // of a row of a factor
  int64_t pairs;       // of tiles, one above the other
  int64_t term() const { return TILE_ROWS * stride; }
  int64_t pair() const { return STRASSEN_TERMS * term(); }

  Sizes(const Header& h, int64_t tokens)
      : half(padded_k(h) / 2), stride(round_up(half, 64)), pairs((tokens + STRASSEN_TOKENS - 1) / STRASSEN_TOKENS) {
    if (stride % 4096 == 0) stride += 64;
  }
};

// Quantize 12 tokens and make their factors.
void quantize_pair(
    const Isa& isa, const qvgen_layer& layer, const Tokens& tokens, int64_t count, const Sizes& sizes, uint8_t* factors,
    TokenGrid* grid, int32_t* sums) {
  const Header& h = header(layer);
  const int64_t stride = Codes::row_stride(h);
  uint8_t* rows = row_memory.get(STRASSEN_TOKENS * stride + 64);
  Range ranges[STRASSEN_TOKENS];
  for (int64_t m = 0; m < count; m++) ranges[m] = token_range(isa, tokens, m);
  const Codes codes = {rows, stride, grid, sums};
  for (int64_t m = 0; m < STRASSEN_TOKENS; m++) {
    uint8_t* a = rows + m * stride;
    if (m < count) quantize_token(isa, layer, tokens, m, ranges[m], codes);
    const int64_t end = m < count ? h.k : 0;
    memset(a + end, 0, size_t(stride - end));
  }
  for (int64_t row = 0; row < TILE_ROWS; row++)
    isa.token_terms(
        rows + row * stride, rows + (TILE_ROWS + row) * stride, sizes.half, factors + row * sizes.stride, sizes.term(),
        STRASSEN_SHIFT);
}

// Outputs of panels 2 q and 2 q + 1 for all tokens of the block.
void pair_outputs(
    const Isa& isa, const qvgen_layer& layer, int64_t q, const Sizes& sizes, const uint8_t* factors, const Codes& codes,
    int64_t count, uint8_t* out) {
  const Header& h = header(layer);
  constexpr int64_t TILE = TILE_ROWS * PANEL;
  const int64_t bytes = panel_bytes(h) / 2, factor_bytes = 2 * bytes;
  uint8_t* factor = factor_memory.get(factor_bytes + round_up(sizes.half, 64) + sizes.pairs * 4 * TILE * int64_t(sizeof(int32_t)));
  uint8_t* ones = factor + factor_bytes;
  int32_t* totals = reinterpret_cast<int32_t*>(ones + round_up(sizes.half, 64));  // (pairs, 2, 2, TILE)
  memset(ones, 1, size_t(sizes.half));
  alignas(64) int32_t product[TILE];
  const PanelTarget targets[2] = {{layer, 2 * q}, {layer, 2 * q + 1}};
  int updates_left[2][2] = {};
  for (const Updates& updates : UPDATES)
    for (int u = 0; u < updates.count; u++) updates_left[updates.update[u].row][updates.update[u].column]++;
  bool begun[2][2] = {};
  for (int term : ORDER) {
    isa.weight_terms(term, panel(h, 2 * q), panel(h, 2 * q + 1), bytes, factor);
    Tile tile = {1, ones, 0, factor, sizes.half / STEP, 2 * STRASSEN_SHIFT, nullptr, 0, product};
    alignas(64) int32_t start[PANEL] = {};  // of a sum: what the shift will add too much
    if (term >= SHIFTED) {
      isa.tile(8, 8, tile);
      for (int64_t n = 0; n < PANEL; n++) start[n] = -STRASSEN_SHIFT * product[n];
    }
    const Updates& updates = UPDATES[term];
    for (int u = 0; u < updates.count; u++) updates_left[updates.update[u].row][updates.update[u].column]--;
    tile.stride = sizes.stride;
    for (int64_t pair = 0; pair < sizes.pairs; pair++) {
      tile.rows = TILE_ROWS, tile.out = product;
      tile.a = factors + pair * sizes.pair() + term * sizes.term();
      tile.next = pair + 1 < sizes.pairs ? tile.a + sizes.pair() : nullptr;
      isa.tile(8, 8, tile);
      for (int u = 0; u < updates.count; u++) {
        const Update& to = updates.update[u];
        const int64_t index = pair * 2 + to.row, m = index * TILE_ROWS;
        int32_t* total = totals + (index * 2 + to.column) * TILE;
        isa.add_product(product, to.sign, begun[to.row][to.column] ? nullptr : start, total);
        if (updates_left[to.row][to.column] || m >= count) continue;
        // Whole, and still in the nearest cache.
        Tile whole = {};
        whole.rows = int(count - m < TILE_ROWS ? count - m : TILE_ROWS);
        whole.max_code = max_code(layer), whole.a_sum = codes.sums + m, whole.sum_stride = 1, whole.out = total;
        isa.finish(
            panel_grid(h, 2 * q + to.column, 0), whole, codes.grid + m, h.weight_bits, h.k, targets[to.column].at(m, out));
      }
    }
    for (int u = 0; u < updates.count; u++) begun[updates.update[u].row][updates.update[u].column] = true;
  }
}

}  // namespace

bool strassen_pays(const Isa& isa, const qvgen_layer& layer, int64_t tokens, int threads) {
  const int wanted = mode.load(std::memory_order_relaxed);
  const Header& h = header(layer);
  if (!isa.token_terms || h.lane_bits != 4 || layer.activation_bits > 4 || h.groups != 1) return false;
  if (group_steps(h) % 2 || panels(h) % 2) return false;
  if (wanted != STRASSEN_AUTO) return wanted == STRASSEN_ALWAYS;
  if (panels(h) / 2 < 4 * threads || tokens < LEAST_TOKENS || h.k < LEAST_K_SLOW) return false;
  return h.k >= LEAST_K || (tokens >= LEAST_TOKENS_SLOW && !fast_products(isa));
}

int strassen_outputs(
    const Isa& isa, const qvgen_layer& layer, const Tokens& tokens, int64_t count, uint8_t* out, int threads) {
  const Header& h = header(layer);
  const int64_t blocks = (count + MOST_TOKENS - 1) / MOST_TOKENS;
  const int64_t size = round_up((count + blocks - 1) / blocks, STRASSEN_TOKENS);
  const int64_t row_bytes = h.n * (layer.out_dtype ? 2 : 4);
  for (int64_t first = 0; first < count; first += size) {
    const int64_t here = count - first < size ? count - first : size;
    const Sizes sizes(h, here);
    uint8_t* factors = shared_memory.get(sizes.pairs * (sizes.pair() + STRASSEN_TOKENS * int64_t(sizeof(TokenGrid) + 4)));
    TokenGrid* grid = reinterpret_cast<TokenGrid*>(factors + sizes.pairs * sizes.pair());
    const Codes codes = {nullptr, 0, grid, reinterpret_cast<int32_t*>(grid + sizes.pairs * STRASSEN_TOKENS)};
    int status = parallel_for(threads, sizes.pairs, [&](int64_t pair) {
      const int64_t m = pair * STRASSEN_TOKENS, left = here - m;
      quantize_pair(
          isa, layer, tokens.from(first + m), left < STRASSEN_TOKENS ? left : STRASSEN_TOKENS, sizes,
          factors + pair * sizes.pair(), codes.grid + m, codes.sums + m);
    });
    if (status) return status;
    status = parallel_for(threads, panels(h) / 2, [&](int64_t q) {
      pair_outputs(isa, layer, q, sizes, factors, codes, here, out + first * row_bytes);
    });
    if (status) return status;
  }
  return QVGEN_OK;
}

}  // namespace qvgen

void qvgen_use_strassen(int mode) { qvgen::mode = mode; }
