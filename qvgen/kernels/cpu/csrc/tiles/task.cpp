// A block of tokens over panels, in an order in which codes, unpacked weights and sums are found in near caches.
//
// Half a panel is unpacked in pieces of at most 14 steps, which stay in the first level while they pass over all tokens of the
// block; partial sums are in the second. (Unpacking a whole panel first wrote it to the second level and read it again: 10 % of
// the time.) Short rows of k (up to 32 steps) take one half panel after the other. Of longer ones a piece of k is taken over 4
// panels, so that the codes of the block over that piece stay in the second level.
#include <cstring>
#include <optional>

#include "threads/workspace.h"
#include "tiles/codes.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace qvgen {
namespace {

constexpr int64_t SHORT_STEPS = 32, NEAR_STEPS = 12;
constexpr int64_t CHUNK_STEPS = 14, CHUNK_PANELS = 4, CHUNK_LEAST_BLOCKS = 5;  // fewer: all codes are in the second level anyway

thread_local Workspace panel_memory, sums_memory, stage_memory;

int64_t evenly(int64_t count, int64_t most) {
  const int64_t parts = (count + most - 1) / most;
  return (count + parts - 1) / parts;
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// 32 tokens by 32 outputs whose sums are whole.
struct Ready {
  int64_t panel = 0, token = 0;
  int half = 0, rows = 0;
  bool quick = false;             // by the kernel itself, from (32, 32) sums
  const int32_t* sums = nullptr;  // else (32, PANEL) of the panel
};

class Task {
 public:
  Task(const TileTask& task)
      : t_(task), kernel_(*task.isa.tiles), blocks_((task.tokens + TILE_TOKENS - 1) / TILE_TOKENS),
        steps_(tile_group_steps(task.h)), size_(task.layer && task.layer->out_dtype ? 2 : 4),
        small_(task.layer && sums_are_small(max_code(*task.layer), task.h.weight_bits, task.h.k)) {
    if (t_.stream && size_ == 2) stage_ = stage_memory.get(round_up(t_.tokens, TILE_TOKENS) * TILE_OUTPUTS * 2);
  }

  void one_group(int64_t first_panel, int64_t end_panel);
  void groups(int64_t first_panel, int64_t end_panel);

 private:
  // Of a panel that has only the first 32 outputs, the second half is left out.
  int halves(int64_t p) const { return t_.h.n - p * PANEL > TILE_OUTPUTS ? 2 : 1; }
  int rows(int64_t block) const { return int(least(t_.tokens - block * TILE_TOKENS, TILE_TOKENS)); }
  const uint8_t* packed(int64_t p, int64_t step) const { return panel(t_.h, p) + step * (TILE_K / STEP) * step_bytes(t_.h); }
  int64_t packed_bytes(int64_t steps) const { return steps * (TILE_K / STEP) * step_bytes(t_.h); }

  Ahead next_weight(int64_t p, int64_t p0, int64_t p1, int64_t c0, int64_t c1, int64_t end_panel, int64_t chunk) const;
  void multiply(const TileBlock& block, const TileSums& to, const Ready& ready, Shadow& shadow);
  void flush();
  void finish(int rows);
  TileOutputs outputs(const Ready& r) const;
  void finish_rows(const Ready& r, int64_t m, const int32_t* sums, int rows);

  const TileTask& t_;
  const TileKernel& kernel_;
  const int64_t blocks_, steps_;
  const int size_;  // of an output
  const bool small_;
  uint8_t* stage_ = nullptr;  // (tokens, 32) bfloat16 that will be streamed
  std::optional<PanelTarget> targets_[2];  // of the last two panels: that of `ready_` may be the one before
  TileSums held_;                          // where the sums go that the tiles hold
  Ready ready_, shadowed_;                 // those, if they are whole; and the block before, while it is being finished
};

void Task::multiply(const TileBlock& block, const TileSums& to, const Ready& ready, Shadow& shadow) {
  shadowed_ = ready_, ready_ = ready;
  shadow.rows = shadowed_.rows, shadow.context = this, shadow.outputs = nullptr;
  shadow.finish = [](void* task, int rows) { static_cast<Task*>(task)->finish(rows); };
  TileOutputs quick;
  if (shadowed_.quick) quick = outputs(shadowed_), shadow.outputs = &quick;
  kernel_.multiply(block, shadow);
  held_ = to;
}

void Task::flush() {
  if (held_.first) kernel_.store(held_);
  held_ = {}, shadowed_ = ready_, ready_ = {};
  shadowed_.quick ? kernel_.finish(outputs(shadowed_), shadowed_.rows) : finish(shadowed_.rows);
}

TileOutputs Task::outputs(const Ready& r) const {
  const PanelTarget& target = *targets_[r.panel % 2];
  const int64_t first = r.half * TILE_OUTPUTS, row = t_.h.n * size_;
  const Write how = !t_.stream ? Write::plain : stage_ && !r.half ? Write::stage : Write::stream;
  return {t_.layer->out_dtype, t_.layer->gelu != 0, &panel_grid(t_.h, r.panel, 0), target.bias(), first,
          {t_.codes.scale + r.token, t_.codes.zero_point + r.token, t_.codes.sum + r.token}, r.sums, how,
          t_.out + r.token * row + (r.panel * PANEL + first) * size_, row, stage_ ? stage_ + r.token * TILE_OUTPUTS * 2 : nullptr};
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
  target.first = r.half * TILE_OUTPUTS, target.end = target.first + TILE_OUTPUTS;
  t_.isa.finish(panel_grid(t_.h, r.panel, 0), tile, t_.codes.grid + m, t_.h.weight_bits, t_.h.k, target);
}

void Task::one_group(int64_t first_panel, int64_t end_panel) {
  const bool is_short = steps_ <= SHORT_STEPS;
  const int64_t piece = evenly(steps_, is_short ? NEAR_STEPS : CHUNK_STEPS), chunk = is_short ? steps_ : piece;
  const int64_t chunk_panels = is_short || blocks_ < CHUNK_LEAST_BLOCKS ? 1 : CHUNK_PANELS;
  int32_t* sums =
      reinterpret_cast<int32_t*>(sums_memory.get((2 * TILE_TOKENS * PANEL + 2 * chunk_panels * blocks_ * TILE_SUMS) * 4));
  int32_t *const whole[2] = {sums, sums + TILE_TOKENS * PANEL};
  int32_t* const partial = sums + 2 * TILE_TOKENS * PANEL;  // (panels of the chunk, halves, blocks); of short rows (blocks)
  uint8_t* const unpacked = panel_memory.get(piece * TILE_STEP_BYTES);
  int turn = 0;
  for (int64_t p0 = first_panel; p0 < end_panel; p0 += chunk_panels) {
    const int64_t p1 = least(p0 + chunk_panels, end_panel);
    for (int64_t c0 = 0; c0 < steps_; c0 += chunk) {
      const int64_t c1 = least(c0 + chunk, steps_);
      const bool last = c1 == steps_;
      for (int64_t p = p0; p < p1; p++) {
        if (t_.layer && last) targets_[p % 2].emplace(*t_.layer, p);
        Shadow shadow;
        shadow.weight = next_weight(p, p0, p1, c0, c1, end_panel, chunk);
        for (int half = 0; half < halves(p); half++)
          for (int64_t k0 = c0; k0 < c1; k0 += piece) {
            const int64_t k1 = least(k0 + piece, c1), left = group_steps(t_.h) - k0 * (TILE_K / STEP);
            kernel_.unpack(t_.h.lane_bits, packed(p, k0), least((k1 - k0) * (TILE_K / STEP), left), half, unpacked);
            for (int64_t b = 0; b < blocks_; b++) {
              const int64_t slot = is_short ? b : ((p - p0) * 2 + half) * blocks_ + b;
              const TileSums kept = {partial + slot * TILE_SUMS, TILE_OUTPUTS};
              TileBlock block = {t_.codes.step(b, k0), unpacked, k1 - k0, held_, {}};
              if (k0) block.from = kept;
              TileSums to = kept;
              Ready ready;
              if (k1 == steps_) {
                const bool quick = small_ && t_.h.n - p * PANEL - half * TILE_OUTPUTS >= TILE_OUTPUTS;
                to = quick ? TileSums{whole[turn], TILE_OUTPUTS} : TileSums{whole[turn] + half * TILE_OUTPUTS, PANEL};
                ready = {p, b * TILE_TOKENS, half, rows(b), quick, whole[turn]};
                turn ^= 1;
              }
              if (chunk_panels > 1 && !last) {  // a share of the codes of the next chunk
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
  }
  flush();
}

// What will be unpacked after steps [c0, c1) of panel p, which is one of [p0, p1).
Ahead Task::next_weight(int64_t p, int64_t p0, int64_t p1, int64_t c0, int64_t c1, int64_t end_panel, int64_t chunk) const {
  const bool more = p + 1 < p1, last = c1 == steps_;
  const int64_t next_panel = more ? p + 1 : last ? p1 : p0, next_step = more ? c0 : last ? 0 : c1;
  if (next_panel >= end_panel) return {};
  const int64_t products = halves(p) * blocks_ * (c1 - c0);  // steps until then
  Ahead ahead;
  ahead.next = packed(next_panel, next_step);
  ahead.end = ahead.next + packed_bytes(least(chunk, steps_ - next_step));
  const uint8_t* const panels_end = panel(t_.h, panels(t_.h));
  if (ahead.end > panels_end) ahead.end = panels_end;
  ahead.lines = int((ahead.end - ahead.next + 64 * products - 1) / (64 * products));
  return ahead;
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
          for (int half = 0; half < 2; half++)
            kernel_.unpack(
                h.lane_bits, panel(h, p) + g * group_steps(h) * step_bytes(h), group_steps(h), half,
                unpacked + (g - g0) * group_bytes + half * steps_ * TILE_STEP_BYTES);
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
