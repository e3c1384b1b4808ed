// From the portable format (packing/bits.py: a dense bit stream per output) to panels, and back.
#include "layout.h"

#include <cmath>
#include <cstring>
#include <memory>

#include "api.h"
#include "threads/parallel.h"

namespace qvgen {
namespace {

// `count` codes of a row from its stream, low bits first.
void read_stream(const uint8_t* stream, int64_t bytes, int bits, int64_t count, uint8_t* codes) {
  if (bits == 4) {
    for (int64_t k = 0; k < count; k++) codes[k] = (stream[k / 2] >> (k % 2 * 4)) & 15;
    return;
  }
  const unsigned mask = (1u << bits) - 1;
  for (int64_t k = 0; k < count; k++) {
    int64_t bit = k * bits, byte = bit / 8;
    unsigned pair = stream[byte] | (byte + 1 < bytes ? stream[byte + 1] << 8 : 0);
    codes[k] = (pair >> (bit % 8)) & mask;
  }
}

void write_stream(const uint8_t* codes, int bits, int64_t count, uint8_t* stream) {
  for (int64_t k = 0; k < count; k++) {
    int64_t bit = k * bits, byte = bit / 8;
    int shift = bit % 8;
    stream[byte] |= uint8_t(codes[k] << shift);
    if (shift + bits > 8) stream[byte + 1] |= uint8_t(codes[k] >> (8 - shift));
  }
}

// One step of one panel, codes given as [half][field][64].
using Fields = uint8_t[2][4][64];

void write_step(const Fields& q, int lane_bits, uint8_t* out) {
  for (int j = 0; j < 64; j++) {
    const uint8_t h[4] = {q[0][0][j], q[0][1][j], q[0][2][j], q[0][3][j]};
    const uint8_t g[4] = {q[1][0][j], q[1][1][j], q[1][2][j], q[1][3][j]};
    switch (lane_bits) {
      case 2:
        out[j] = uint8_t(h[0] | h[1] << 2 | h[2] << 4 | h[3] << 6);
        out[64 + j] = uint8_t(g[0] | g[1] << 2 | g[2] << 4 | g[3] << 6);
        break;
      case 3:
        out[j] = uint8_t(h[0] | h[1] << 3 | (g[2] & 3) << 6);
        out[64 + j] = uint8_t(h[2] | h[3] << 3 | (g[3] & 3) << 6);
        out[128 + j] = uint8_t(g[0] | g[1] << 3 | (g[2] >> 2) << 6 | (g[3] >> 2) << 7);
        break;
      case 4:
        out[j] = uint8_t(h[0] | h[1] << 4), out[64 + j] = uint8_t(h[2] | h[3] << 4);
        out[128 + j] = uint8_t(g[0] | g[1] << 4), out[192 + j] = uint8_t(g[2] | g[3] << 4);
        break;
      default:
        for (int f = 0; f < 4; f++) out[f * 64 + j] = h[f], out[256 + f * 64 + j] = g[f];
    }
  }
}

void read_step(const uint8_t* in, int lane_bits, Fields& q) {
  for (int j = 0; j < 64; j++) {
    for (int half = 0; half < 2; half++) {
      for (int f = 0; f < 4; f++) {
        uint8_t code;
        if (lane_bits == 8) {
          code = in[half * 256 + f * 64 + j];
        } else if (lane_bits == 4) {
          code = (in[half * 128 + f / 2 * 64 + j] >> (f % 2 * 4)) & 15;
        } else if (lane_bits == 2) {
          code = (in[half * 64 + j] >> (f * 2)) & 3;
        } else if (half == 0) {
          code = (in[f / 2 * 64 + j] >> (f % 2 * 3)) & 7;
        } else if (f < 2) {
          code = (in[128 + j] >> (f * 3)) & 7;
        } else {
          code = uint8_t((in[(f - 2) * 64 + j] >> 6) | ((in[128 + j] >> (f + 4)) & 1) << 2);
        }
        q[half][f][j] = code;
      }
    }
  }
}

// Codes are stored less their offset, cut to the width of their lane; adding and cutting again gives them back.
uint8_t with_offset(const Header& h, int field, int code, int sign) {
  return uint8_t(code - sign * field_offset(h.weight_bits, field)) & uint8_t((1 << h.lane_bits) - 1);
}

// Visit each code of a panel: f(output of the panel, k or -1 if padding, reference to its place in `fields`).
template <class F>
void each_code(const Header& h, int64_t step, Fields& fields, F f) {
  const int64_t size = group_size(h), steps = group_steps(h), group = step / steps, first = step % steps * STEP;
  for (int half = 0; half < 2; half++)
    for (int field = 0; field < 4; field++)
      for (int j = 0; j < 64; j++) {
        int64_t within = first + half * 4 + j % 4;
        f(field, field * FIELD + j / 4, within < size ? group * size + within : -1, fields[half][field][j]);
      }
}

struct Grids {
  const float *scale, *zero_point;
  const int32_t* row_sum;
};

void write_grid(const Header& h, const Grids& grids, int64_t p, int64_t group, PanelGrid& out) {
  out = {};
  for (int64_t i = 0; i < PANEL && p * PANEL + i < h.n; i++) {
    const int64_t at = (p * PANEL + i) * h.groups + group;
    const int offset = field_offset(h.weight_bits, int(i / FIELD));
    const float zero_point = grids.zero_point ? grids.zero_point[at] : float(1 << (h.weight_bits - 1));
    // In integers only as far as they cannot overflow; learned zero points lie within or near the codes anyway.
    const float most = float((1 << h.weight_bits) - 1);
    float whole = std::nearbyint(zero_point);
    whole = whole < 0 ? 0 : whole > most ? most : whole;
    out.scale[i] = grids.scale[at];
    out.row_sum[i] = grids.row_sum[at] - offset * int32_t(group_size(h));
    out.zero_whole[i] = int32_t(whole) - offset;
    out.zero_fraction[i] = zero_point - whole;
  }
}

Header make_header(int64_t n, int64_t k, int64_t groups, int weight_bits) {
  Header h{};
  memcpy(h.magic, MAGIC, sizeof MAGIC);
  h.weight_bits = weight_bits, h.lane_bits = lane_bits(weight_bits);
  h.n = n, h.k = k, h.groups = groups;
  return h;
}

}  // namespace

const Header* find_header(const uint8_t* weight, int64_t bytes) {
  if (bytes < int64_t(sizeof(Header)) || reinterpret_cast<uintptr_t>(weight) % alignof(Header)) return nullptr;
  const Header& h = *reinterpret_cast<const Header*>(weight);
  constexpr int64_t MOST = INT32_MAX;  // so that no size below overflows
  const bool sound = !memcmp(h.magic, MAGIC, sizeof MAGIC) && h.weight_bits >= 2 && h.weight_bits <= 8 &&
                     h.lane_bits == lane_bits(h.weight_bits) && h.n > 0 && h.n < MOST && h.k > 0 && h.k < MOST &&
                     h.groups > 0 && h.groups <= h.k && h.k % h.groups == 0;
  return sound && qvgen_panel_bytes(h.n, h.k, h.groups, h.weight_bits) == bytes ? &h : nullptr;
}

}  // namespace qvgen

using namespace qvgen;

int64_t qvgen_panel_bytes(int64_t n, int64_t k, int64_t groups, int weight_bits) {
  Header h = make_header(n, k, groups, weight_bits);
  return int64_t(sizeof(Header)) + panels(h) * (panel_bytes(h) + h.groups * int64_t(sizeof(PanelGrid)));
}

int qvgen_pack_panels(
    const uint8_t* words, int64_t row_bytes, const float* scale, const float* zero_point, const int32_t* row_sum, int64_t n,
    int64_t k, int64_t groups, int weight_bits, uint8_t* out, int threads) {
  const Header h = make_header(n, k, groups, weight_bits);
  memcpy(out, &h, sizeof h);
  PanelGrid* grids = reinterpret_cast<PanelGrid*>(out + sizeof h + panels(h) * panel_bytes(h));
  return parallel_for(threads, panels(h), [&](int64_t p) {
    std::unique_ptr<uint8_t[]> codes(new uint8_t[PANEL * k]());
    for (int64_t row = 0; row < PANEL && p * PANEL + row < n; row++)
      read_stream(words + (p * PANEL + row) * row_bytes, row_bytes, weight_bits, k, codes.get() + row * k);
    uint8_t* target = out + sizeof(Header) + p * panel_bytes(h);
    Fields fields;
    for (int64_t step = 0; step < h.groups * group_steps(h); step++, target += step_bytes(h)) {
      each_code(h, step, fields, [&](int field, int64_t row, int64_t at, uint8_t& place) {
        place = with_offset(h, field, at < 0 ? 0 : codes[row * k + at], 1);
      });
      write_step(fields, h.lane_bits, target);
    }
    for (int64_t g = 0; g < groups; g++) write_grid(h, {scale, zero_point, row_sum}, p, g, grids[p * groups + g]);
  });
}

int qvgen_unpack_panels(
    const uint8_t* weight, int64_t weight_bytes, uint8_t* words, int64_t n, int64_t row_bytes, int threads) {
  const Header* found = find_header(weight, weight_bytes);
  if (!found || found->n != n || (found->k * found->weight_bits + 31) / 32 * 4 != row_bytes) return QVGEN_NOT_A_WEIGHT;
  const Header& h = *found;
  return parallel_for(threads, panels(h), [&](int64_t p) {
    std::unique_ptr<uint8_t[]> codes(new uint8_t[PANEL * h.k]());
    const uint8_t* source = panel(h, p);
    Fields fields;
    for (int64_t step = 0; step < h.groups * group_steps(h); step++, source += step_bytes(h)) {
      read_step(source, h.lane_bits, fields);
      each_code(h, step, fields, [&](int field, int64_t row, int64_t at, uint8_t& place) {
        if (at >= 0) codes[row * h.k + at] = with_offset(h, field, place, -1);
      });
    }
    for (int64_t row = 0; row < PANEL && p * PANEL + row < h.n; row++) {
      uint8_t* stream = words + (p * PANEL + row) * row_bytes;
      memset(stream, 0, row_bytes);
      write_stream(codes.get() + row * h.k, h.weight_bits, h.k, stream);
    }
  });
}
