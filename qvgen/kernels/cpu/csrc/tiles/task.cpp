// A block of tokens over panels, in an order in which codes, unpacked weights and sums are found in near caches.
//
// Short rows of k (up to 32 steps): a panel is unpacked whole, and 12 steps of it at a time, which stay in the first level, pass
// over groups of 256 tokens, whose sums are near. Longer ones are taken in chunks of 14 steps, over which the codes of a block
// stay in the second level while 4 panels pass over them; their partial sums are there too.
#include <cstring>
#include <optional>

#include "threads/workspace.h"
#include "tiles/codes.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace qvgen {
namespace {

constexpr int64_t SHORT_STEPS = 32, NEAR_STEPS = 12, NEAR_BLOCKS = 8;
constexpr int64_t CHUNK_STEPS = 14, CHUNK_PANELS = 4, CHUNK_LEAST_BLOCKS = 5;  // fewer: all codes are in the second level anyway

thread_local Workspace panel_memory, sums_memory, stage_memory;

int64_t evenly(int64_t count, int64_t most) {
  const int64_t parts = (count + most - 1) / most;
  return (count + parts - 1) / parts;
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void stream_line(uint8_t* to, const uint8_t* from) {
#ifdef __SSE2__
  for (int i = 0; i < 64; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
#else
  memcpy(to, from, 64);
#endif
}

// 32 tokens by 32 outputs whose sums are whole.
struct Ready {
  int64_t panel = 0, token = 0;
  int half = 0, rows = 0;
  const int32_t* sums = nullptr;  // (32, PANEL) of the panel
};

class Task {
 public:
  Task(const TileTask& task)
      : t_(task), kernel_(*task.isa.tiles), blocks_((task.tokens + TILE_TOKENS - 1) / TILE_TOKENS),
        steps_(tile_group_steps(task.h)), size_(task.layer && task.layer->out_dtype ? 2 : 4) {
    if (t_.stream) stage_ = stage_memory.get(t_.tokens * PANEL * size_);
  }

  void one_group(int64_t first_panel, int64_t end_panel);
  void groups(int64_t first_panel, int64_t end_panel);

 private:
  // Of a panel that has only the first 32 outputs, the second half is left out.
  int halves(int64_t p) const { return t_.h.n - p * PANEL > TILE_OUTPUTS ? 2 : 1; }
  int rows(int64_t block) const { return int(least(t_.tokens - block * TILE_TOKENS, TILE_TOKENS)); }
  const uint8_t* packed(int64_t p, int64_t step) const { return panel(t_.h, p) + step * (TILE_K / STEP) * step_bytes(t_.h); }
  int64_t packed_bytes(int64_t steps) const { return steps * (TILE_K / STEP) * step_bytes(t_.h); }

  void multiply(const TileBlock& block, const TileSums& to, const Ready& ready, Shadow& shadow);
  void flush();
  void finish(int rows);
  void finish_rows(const Ready& r, int64_t m, const int32_t* sums, int rows);

  const TileTask& t_;
  const TileKernel& kernel_;
  const int64_t blocks_, steps_;
  const int size_;  // of an output
  uint8_t* stage_ = nullptr;  // (tokens, PANEL) outputs that will be streamed
  std::optional<PanelTarget> targets_[2];  // of the last two panels: that of `ready_` may be the one before
  TileSums held_;                          // where the sums go that the tiles hold
  Ready ready_, shadowed_;                 // those, if they are whole; and the block before, while it is being finished
};

void Task::multiply(const TileBlock& block, const TileSums& to, const Ready& ready, Shadow& shadow) {
  shadowed_ = ready_, ready_ = ready;
  shadow.rows = shadowed_.rows, shadow.context = this;
  shadow.finish = [](void* task, int rows) { static_cast<Task*>(task)->finish(rows); };
  kernel_.multiply(block, shadow);
  held_ = to;
}

void Task::flush() {
  if (held_.first) kernel_.store(held_);
  held_ = {}, shadowed_ = ready_, ready_ = {};
  finish(shadowed_.rows);
}

// The next rows of `shadowed_`.
void Task::finish(int rows) {
  for (int some; rows; rows -= some) {
    some = int(least(rows, TILE_ROWS));
    finish_rows(shadowed_, shadowed_.token, shadowed_.sums, some);
    shadowed_.token += some, shadowed_.sums += some * PANEL, shadowed_.rows -= some;
  }
}

void Task::finish_rows(const Ready& r, int64_t m, const int32_t* sums, int rows) {
  const int64_t first = r.panel * PANEL + r.half * TILE_OUTPUTS;
  if (!t_.layer) {
    const int64_t columns = least(t_.h.n - first, TILE_OUTPUTS);
    for (int row = 0; row < rows; row++)
      memcpy(t_.integers + (m + row) * t_.h.n + first, sums + row * PANEL + r.half * TILE_OUTPUTS, size_t(columns * 4));
    return;
  }
  Tile tile = {};
  tile.rows = rows, tile.max_code = max_code(*t_.layer), tile.out = const_cast<int32_t*>(sums);
  tile.a_sum = t_.codes.sums + m, tile.sum_stride = 1;
  Target target = targets_[r.panel % 2]->at(m, t_.out);
  uint8_t* const out = static_cast<uint8_t*>(target.out);
  if (stage_) target.out = stage_ + m * PANEL * size_, target.stride = PANEL;
  target.first = r.half * TILE_OUTPUTS, target.end = target.first + TILE_OUTPUTS;
  t_.isa.finish(panel_grid(t_.h, r.panel, 0), tile, t_.codes.grid + m, t_.h.weight_bits, t_.h.k, target);
  if (!stage_ || !r.half) return;
  // Both halves at once: 128 bytes in a row have twice the bandwidth of 64.
  for (int row = 0; row < rows; row++)
    for (int64_t i = 0; i < PANEL * size_; i += 64)
      stream_line(out + row * t_.h.n * size_ + i, stage_ + (m + row) * PANEL * size_ + i);
}

void Task::one_group(int64_t first_panel, int64_t end_panel) {
  const bool is_short = steps_ <= SHORT_STEPS;
  const int64_t chunk = is_short ? steps_ : evenly(steps_, CHUNK_STEPS), near = is_short ? evenly(steps_, NEAR_STEPS) : chunk;
  const int64_t chunk_panels = is_short || blocks_ < CHUNK_LEAST_BLOCKS ? 1 : CHUNK_PANELS;
  const int64_t near_blocks = is_short ? NEAR_BLOCKS : blocks_;
  int32_t* sums = reinterpret_cast<int32_t*>(
      sums_memory.get((2 * TILE_TOKENS * PANEL + (near_blocks + 2 * chunk_panels * blocks_) * TILE_SUMS) * 4));
  int32_t *const whole[2] = {sums, sums + TILE_TOKENS * PANEL}, *const close = sums + 2 * TILE_TOKENS * PANEL;
  int32_t* const partial = close + near_blocks * TILE_SUMS;  // (panels of the chunk, halves, blocks)
  uint8_t* const unpacked = panel_memory.get(2 * chunk * TILE_STEP_BYTES);
  int turn = 0;
  for (int64_t p0 = first_panel; p0 < end_panel; p0 += chunk_panels) {
    const int64_t p1 = least(p0 + chunk_panels, end_panel);
    for (int64_t c0 = 0; c0 < steps_; c0 += chunk) {
      const int64_t c1 = least(c0 + chunk, steps_), left = group_steps(t_.h) - c0 * (TILE_K / STEP);
      for (int64_t p = p0; p < p1; p++) {
        kernel_.unpack(t_.h.lane_bits, packed(p, c0), least((c1 - c0) * (TILE_K / STEP), left), unpacked);
        if (t_.layer && c1 == steps_) targets_[p % 2].emplace(*t_.layer, p);
        Shadow shadow;
        // What will be unpacked next.
        const bool more = p + 1 < p1, last = c1 == steps_;
        const int64_t next_panel = more ? p + 1 : last ? p1 : p0, next_step = more ? c0 : last ? 0 : c1;
        const int64_t products = halves(p) * blocks_ * (c1 - c0);  // steps until then
        if (next_panel < end_panel) {
          shadow.weight.next = packed(next_panel, next_step);
          shadow.weight.end = shadow.weight.next + packed_bytes(least(chunk, steps_ - next_step));
          const uint8_t* const panels_end = panel(t_.h, panels(t_.h));
          if (shadow.weight.end > panels_end) shadow.weight.end = panels_end;
          shadow.weight.lines = int((shadow.weight.end - shadow.weight.next + 64 * products - 1) / (64 * products));
        }
        for (int64_t b0 = 0; b0 < blocks_; b0 += near_blocks)
          for (int half = 0; half < halves(p); half++)
            for (int64_t k0 = c0; k0 < c1; k0 += near)
              for (int64_t b = b0; b < blocks_ && b < b0 + near_blocks; b++) {
                const int64_t k1 = least(k0 + near, c1);
                const uint8_t* weight = unpacked + (half * (c1 - c0) + k0 - c0) * TILE_STEP_BYTES;
                const TileSums far = {partial + (((p - p0) * 2 + half) * blocks_ + b) * TILE_SUMS, TILE_OUTPUTS};
                const TileSums around = {close + (b - b0) * TILE_SUMS, TILE_OUTPUTS};
                TileBlock block = {t_.codes.step(b, k0), weight, k1 - k0, held_, {}};
                if (k0) block.from = k0 == c0 ? far : around;
                TileSums to = k1 == c1 ? far : around;
                Ready ready;
                if (k1 == steps_) {
                  to = {whole[turn] + half * TILE_OUTPUTS, PANEL};
                  ready = {p, b * TILE_TOKENS, half, rows(b), whole[turn]};
                  turn ^= 1;
                }
                if (chunk_panels > 1 && !last && k0 == c0) {  // a share of the codes of the next chunk
                  const int64_t bytes = least(chunk, steps_ - c1) * TILE_STEP_BYTES, shares = 2 * (p1 - p0);
                  const int64_t share = round_up((bytes + shares - 1) / shares, 64), at = ((p - p0) * 2 + half) * share;
                  shadow.codes.next = t_.codes.step(b, c1) + least(at, bytes);
                  shadow.codes.end = t_.codes.step(b, c1) + least(at + share, bytes);
                  shadow.codes.lines = int((share / 64 + k1 - k0 - 1) / (k1 - k0));
                }
                multiply(block, to, ready, shadow);
              }
      }
    }
  }
  flush();
}

void Task::groups(int64_t first_panel, int64_t end_panel) {
  const Header& h = t_.h;
  const int64_t chunk = steps_ >= CHUNK_STEPS ? 1 : CHUNK_STEPS / steps_, group_bytes = 2 * steps_ * TILE_STEP_BYTES;
  int32_t* const sums = reinterpret_cast<int32_t*>(sums_memory.get((1 + CHUNK_PANELS * blocks_) * TILE_TOKENS * PANEL * 4));
  float* const values = reinterpret_cast<float*>(sums + TILE_TOKENS * PANEL);  // (panels, blocks, 32, PANEL)
  uint8_t* const unpacked = panel_memory.get(chunk * group_bytes);
  memset(sums, 0, TILE_TOKENS * PANEL * 4);  // halves that do not exist are read
  for (int64_t p0 = first_panel; p0 < end_panel; p0 += CHUNK_PANELS) {
    const int64_t p1 = least(p0 + CHUNK_PANELS, end_panel);
    for (int64_t g0 = 0; g0 < h.groups; g0 += chunk) {
      const int64_t g1 = least(g0 + chunk, h.groups);
      for (int64_t p = p0; p < p1; p++) {
        const PanelTarget target(*t_.layer, p);
        for (int64_t g = g0; g < g1; g++)
          kernel_.unpack(h.lane_bits, panel(h, p) + g * group_steps(h) * step_bytes(h), group_steps(h), unpacked + (g - g0) * group_bytes);
        for (int64_t b = 0; b < blocks_; b++) {
          float* const value = values + ((p - p0) * blocks_ + b) * TILE_TOKENS * PANEL;
          const int64_t m = b * TILE_TOKENS, end = rows(b);
          for (int64_t g = g0; g < g1; g++) {
            for (int half = 0; half < halves(p); half++) {
              const TileBlock block = {
                  t_.codes.step(b, g * steps_), unpacked + (g - g0) * group_bytes + half * steps_ * TILE_STEP_BYTES, steps_, held_, {}};
              Shadow shadow;
              kernel_.multiply(block, shadow);
              held_ = {sums + half * TILE_OUTPUTS, PANEL};
            }
            flush();
            for (int64_t row = 0; row < end; row += TILE_ROWS) {
              Tile tile = {};
              tile.rows = int(least(end - row, TILE_ROWS)), tile.max_code = max_code(*t_.layer), tile.out = sums + row * PANEL;
              tile.a_sum = t_.codes.sums + (m + row) * h.groups + g, tile.sum_stride = h.groups;
              t_.isa.add_group(panel_grid(h, p, g), tile, t_.codes.grid + m + row, group_size(h), g == 0, value + row * PANEL);
            }
          }
          if (g1 < h.groups) continue;
          for (int64_t row = 0; row < end; row += TILE_ROWS)
            t_.isa.finish_groups(
                value + row * PANEL, int(least(end - row, TILE_ROWS)), t_.codes.grid + m + row, target.at(m + row, t_.out));
        }
      }
    }
  }
}

}  // namespace

void run_task(const TileTask& task, int64_t first_panel, int64_t end_panel) {
  Task run(task);
  task.h.groups == 1 ? run.one_group(first_panel, end_panel) : run.groups(first_panel, end_panel);
#ifdef __SSE2__
  if (task.stream) _mm_sfence();
#endif
}

}  // namespace qvgen
