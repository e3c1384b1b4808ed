// How a weight lies in memory for the kernels of every instruction set. One layout, so that a prepared weight does not
// depend on the processor that prepared it.
//
//   Panel of 64 outputs; in it steps of 8 k, each two half steps of 4 k. `field` f = 0..3 is outputs [16 f, 16 f + 16) of the panel.
//   Byte j of a 64-byte vector belongs to output j / 4 of its field and to k = j % 4 of its half step.
//
//   8 bits  4 vectors per half step, one per field; 8-bit codes as q - 128, so that they are signed
//   4 bits  2 vectors per half step: fields 0 | 1 << 4, and 2 | 3 << 4, fields 1 and 3 as q - 8
//   3 bits  3 vectors per step, with h the codes of the first half step and g of the second:
//           h0 | h1 << 3 | (g2 & 3) << 6,   h2 | h3 << 3 | (g3 & 3) << 6,   g0 | g1 << 3 | (g2 >> 2) << 6 | (g3 >> 2) << 7
//   2 bits  1 vector per half step: fields 0 | 1 << 2 | 2 << 4 | 3 << 6, field 3 as q - 2
//
// 5, 6 and 7 bits lie in 8. Why the offsets: VPDPBUSD multiplies unsigned by signed bytes. With the top field signed, a whole
// byte is a signed number, 16 (q1 - 8) + q0, and two dot products, with the byte and with its low field, give both fields
// without a shift: exact, and one AND per vector instead of three operations.
//
// K is padded to steps with zero codes, N to panels, and if a weight has groups along K each of them starts a step. Behind the
// panels follow the grids of their outputs, (panels, groups).
#pragma once

#include <cstddef>
#include <cstdint>

namespace qvgen {

constexpr int64_t PANEL = 64;  // outputs
constexpr int64_t STEP = 8;    // k
constexpr int64_t FIELD = 16;  // outputs

struct Header {
  char magic[8];
  int32_t weight_bits;  // of the codes
  int32_t lane_bits;    // of the layout: 2, 3, 4 or 8
  int64_t n, k, groups;
  char unused[24];
};
static_assert(sizeof(Header) == 64, "panels start at a cache line");

constexpr char MAGIC[8] = {'q', 'v', 'p', 'a', 'n', 'e', 'l', '1'};

inline int lane_bits(int weight_bits) { return weight_bits <= 4 ? weight_bits : 8; }

// What is subtracted from the codes of a field.
inline int field_offset(int weight_bits, int field) {
  switch (weight_bits) {
    case 2: return field == 3 ? 2 : 0;
    case 4: return field % 2 ? 8 : 0;
    case 8: return 128;
    default: return 0;
  }
}

inline int64_t group_size(const Header& h) { return h.k / h.groups; }
inline int64_t group_steps(const Header& h) { return (group_size(h) + STEP - 1) / STEP; }
inline int64_t padded_k(const Header& h) { return h.groups * group_steps(h) * STEP; }
inline int64_t panels(const Header& h) { return (h.n + PANEL - 1) / PANEL; }
inline int64_t step_bytes(const Header& h) { return PANEL * STEP * h.lane_bits / 8; }
inline int64_t panel_bytes(const Header& h) { return h.groups * group_steps(h) * step_bytes(h); }

// What belongs to the outputs of one panel and group. Of a zero point z less its field's offset, the whole part goes into the
// integer arithmetic, I = sum (a - z_a)(q - z), which is exact; only what is left of it is multiplied in floating point.
struct PanelGrid {
  float scale[PANEL];
  int32_t row_sum[PANEL];  // sum of (q - offset)
  int32_t zero_whole[PANEL];
  float zero_fraction[PANEL];
};

inline const uint8_t* panel(const Header& h, int64_t index) {
  return reinterpret_cast<const uint8_t*>(&h + 1) + index * panel_bytes(h);
}

inline const PanelGrid& panel_grid(const Header& h, int64_t index, int64_t group) {
  return reinterpret_cast<const PanelGrid*>(panel(h, panels(h)))[index * h.groups + group];
}

}  // namespace qvgen
