// Plain C++ for every processor without a path of its own, and the plainest statement of what a tile is.
#include "isa_common.h"

namespace {

// Codes less their offsets of one half step: w[k][output].
void unpack(const uint8_t* step, int half, int lane_bits, int weight_bits, int16_t (&w)[4][qvgen::PANEL]) {
  for (int field = 0; field < 4; field++) {
    const int offset = qvgen::field_offset(weight_bits, field);
    for (int j = 0; j < 64; j++) {
      int code;
      if (lane_bits == 8) {
        code = step[half * 256 + field * 64 + j];
      } else if (lane_bits == 4) {
        code = (step[half * 128 + field / 2 * 64 + j] >> (field % 2 * 4)) & 15;
      } else if (lane_bits == 2) {
        code = (step[half * 64 + j] >> (field * 2)) & 3;
      } else if (half == 0) {
        code = (step[field / 2 * 64 + j] >> (field % 2 * 3)) & 7;
      } else if (field < 2) {
        code = (step[128 + j] >> (field * 3)) & 7;
      } else {
        code = (step[(field - 2) * 64 + j] >> 6) | (step[128 + j] >> (field + 4) & 1) << 2;
      }
      // With an offset the field is stored as a signed number of lane_bits.
      const int sign = 1 << (lane_bits - 1);
      w[j % 4][field * qvgen::FIELD + j / 4] = int16_t(offset && code >= sign ? code - 2 * sign : code);
    }
  }
}

void tile(int lane_bits, int weight_bits, const qvgen::Tile& t) {
  __builtin_memset(t.out, 0, sizeof(int32_t) * t.rows * qvgen::PANEL);
  const int64_t bytes = qvgen::PANEL * qvgen::STEP * lane_bits / 8;
  int16_t w[4][qvgen::PANEL];
  for (int64_t step = 0; step < t.steps; step++) {
    for (int half = 0; half < 2; half++) {
      unpack(t.weight + step * bytes, half, lane_bits, weight_bits, w);
      for (int row = 0; row < t.rows; row++) {
        const uint8_t* a = t.a + row * t.stride + step * qvgen::STEP + half * 4;
        int32_t* out = t.out + row * qvgen::PANEL;
        for (int k = 0; k < 4; k++)
          for (int n = 0; n < qvgen::PANEL; n++) out[n] += int16_t(a[k]) * w[k][n];
      }
    }
  }
}

bool supported() { return true; }

}  // namespace

const qvgen::Isa* qvgen::isa_portable() {
  static const Isa isa = make_isa("portable", supported, tile);
  return &isa;
}
