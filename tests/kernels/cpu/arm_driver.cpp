// Checks libqvgen_cpu without Python, which is not there for the emulated processor: run by test_cpu_arm.py. Prints the instruction
// sets and a line per group of checks; the exit status is the number of failed checks.
//
// Integer parts are compared with plain 64-bit sums. Whole layers and row operations are compared with the portable path, which
// the other tests compare with PyTorch.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "api.h"

namespace {

int failures = 0;

void expect(bool fine, const char* what, const std::string& isa, int64_t a, int64_t b, int64_t c, int64_t d) {
  if (fine) return;
  if (failures++ < 20)
    printf("FAILED %s on %s: %lld %lld %lld %lld\n", what, isa.c_str(), (long long)a, (long long)b, (long long)c, (long long)d);
}

uint64_t state = 88172645463325252u;
uint64_t random_bits() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state >> 11;
}
float random_float() { return float(random_bits() % 20001) / 10000 - 1; }

struct Weight {
  int64_t n, k, groups, row_bytes, bytes;
  int bits;
  std::vector<int> codes;
  std::vector<uint8_t> words, storage;
  uint8_t* panels;

  Weight(int64_t n, int64_t k, int64_t groups, int bits, int kind)
      : n(n), k(k), groups(groups), row_bytes((k * bits + 31) / 32 * 4), bits(bits), codes(n * k), words(n * row_bytes) {
    std::vector<float> scale(n * groups), zero(n * groups);
    std::vector<int32_t> row_sum(n * groups);
    for (int64_t i = 0; i < n * groups; i++) scale[i] = 0.01f + 0.001f * float(i % 7), zero[i] = 0.3f * float(i % 5);
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < k; j++) {
        const int code = kind == 0 ? int(random_bits() % (1 << bits)) : kind == 1 ? 0 : (1 << bits) - 1;
        codes[i * k + j] = code, row_sum[i * groups + j / (k / groups)] += code;
        for (int b = 0; b < bits; b++) words[i * row_bytes + (j * bits + b) / 8] |= (code >> b & 1) << ((j * bits + b) % 8);
      }
    bytes = qvgen_panel_bytes(n, k, groups, bits);
    storage.resize(bytes + 64);
    panels = storage.data() + (64 - uintptr_t(storage.data()) % 64) % 64;
    const int status = qvgen_pack_panels(
        words.data(), row_bytes, scale.data(), zero.data(), row_sum.data(), n, k, groups, bits, panels, 1);
    expect(status == 0, "pack", "", n, k, groups, bits);
  }
};

int offset(int bits, int64_t n) {  // as field_offset in layout.h
  const int field = int(n % 64 / 16);
  return bits == 8 ? 128 : bits == 4 ? 8 * (field % 2) : bits == 2 && field == 3 ? 2 : 0;
}

void integer_part(const std::string& isa, int64_t m, int64_t n, int64_t k, int weight_bits, int bits, int kind) {
  const Weight w(n, k, 1, weight_bits, kind);
  std::vector<uint8_t> a(m * k);
  for (uint8_t& v : a) v = uint8_t(kind == 0 ? random_bits() % (1 << bits) : kind == 1 ? 0 : (1 << bits) - 1);
  std::vector<int32_t> out(m * n);
  int status = qvgen_integer_part(isa.c_str(), w.panels, w.bytes, a.data(), m, (1 << bits) - 1, out.data());
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      int64_t sum = 0;
      for (int64_t x = 0; x < k; x++) sum += int64_t(a[i * k + x]) * (w.codes[j * k + x] - offset(weight_bits, j));
      status |= sum != out[i * n + j];
    }
  expect(status == 0, "integer part", isa, m, n, k, weight_bits * 10 + bits);
}

bool close(const std::vector<float>& a, const std::vector<float>& b, float tolerance) {
  float largest = 0;
  for (float v : b) largest = std::fmax(largest, std::fabs(v));
  for (size_t i = 0; i < a.size(); i++)
    if (!(std::fabs(a[i] - b[i]) <= tolerance * largest)) return false;
  return true;
}

float widened(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

std::vector<float> linear(
    const std::string& isa, const Weight& w, const std::vector<float>& x, int64_t m, int bits, bool symmetric, int dtype, bool gelu) {
  std::vector<float> bias(w.n), out(m * w.n), lower = {0.9f, 0.7f}, upper = {0.8f, 1.0f};
  for (int64_t i = 0; i < w.n; i++) bias[i] = 0.01f * float(i % 11);
  std::vector<uint16_t> narrow(x.size()), narrow_out(m * w.n);
  for (size_t i = 0; i < x.size(); i++) {
    uint32_t word;
    memcpy(&word, &x[i], 4);
    narrow[i] = uint16_t(word >> 16);
  }
  const int64_t group = 1;
  qvgen_layer layer = {};
  layer.weight = w.panels, layer.weight_bytes = w.bytes, layer.clip_lower = lower.data(), layer.clip_upper = upper.data(), layer.bias = bias.data();
  layer.out = dtype ? static_cast<void*>(narrow_out.data()) : out.data();
  layer.in_features = w.k, layer.out_features = w.n, layer.groups = w.groups, layer.clips = 2;
  layer.activation_bits = bits, layer.activation_symmetric = symmetric, layer.out_dtype = dtype, layer.gelu = gelu;
  const qvgen_input input = {dtype ? static_cast<const void*>(narrow.data()) : x.data(), 1, m, &group, 1, dtype};
  const int status = qvgen_linear(isa.c_str(), &layer, 1, &input, 2);
  expect(status == 0, "status of linear", isa, m, w.n, w.k, status);
  if (dtype)
    for (size_t i = 0; i < out.size(); i++) out[i] = widened(narrow_out[i]);
  return out;
}

void whole_layers(const std::string& isa) {
  for (int weight_bits : {2, 3, 4, 6, 8})
    for (int bits : {3, 4, 8})
      for (int64_t groups : {1, 2})
        for (int option = 0; option < 8; option++) {
          const bool symmetric = option & 1, gelu = option & 4;
          const int dtype = option >> 1 & 1;
          const int64_t m = 1 + option, k = 66, n = 70;
          const Weight w(n, k, groups, weight_bits, 0);
          std::vector<float> x(m * k);
          for (float& v : x) v = random_float();
          const auto here = linear(isa, w, x, m, bits, symmetric, dtype, gelu);
          const auto there = linear("portable", w, x, m, bits, symmetric, dtype, gelu);
          // Different orders of float operations; of bfloat16 results, a rounding that falls to the other side.
          expect(close(here, there, dtype ? 0x1p-7f : 1e-5f), "linear", isa, weight_bits, bits, groups, option);
        }
}

void row_operations(const std::string& isa) {
  const int64_t rows = 5, features = 96;
  std::vector<float> x(rows * features), y(rows * features), cosine(rows * 32), sine(rows * 32), factor(features);
  for (auto* v : {&x, &y, &cosine, &sine, &factor})
    for (float& f : *v) f = random_float();
  std::vector<float> results[2][3];
  for (int i = 0; i < 2; i++) {
    const char* name = i ? "portable" : isa.c_str();
    for (auto& result : results[i]) result.resize(x.size());
    const float* f = factor.data();
    qvgen_layer_norm(name, x.data(), 0, rows, features, 1e-6f, f, f, f, f, rows, results[i][0].data(), 2);
    qvgen_rms_norm(name, x.data(), 0, rows, features, 1e-6f, f, cosine.data(), sine.data(), rows, 32, results[i][1].data(), 2);
    qvgen_add_gated(name, x.data(), y.data(), f, 0, rows, features, rows, results[i][2].data(), 2);
  }
  for (int op = 0; op < 3; op++) expect(close(results[0][op], results[1][op], 1e-5f), "row operation", isa, op, 0, 0, 0);
}

void round_trips() {
  for (int bits = 2; bits <= 8; bits++)
    for (int64_t k : {1, 31, 64, 257}) {
      const Weight w(67, k, 1, bits, 0);
      std::vector<uint8_t> words(w.words.size());
      const int status = qvgen_unpack_panels(w.panels, w.bytes, words.data(), w.n, w.row_bytes, 1);
      expect(status == 0 && words == w.words, "round trip", "", bits, k, 0, 0);
    }
}

}  // namespace

int main() {
  round_trips();
  printf("round trips\n");
  for (const char* const* name = qvgen_isas(); *name; name++) {
    if (!qvgen_isa_supported(*name)) {
      printf("not supported: %s\n", *name);
      continue;
    }
    const std::string isa = *name;
    for (int weight_bits = 2; weight_bits <= 8; weight_bits++)
      for (int bits = 2; bits <= 8; bits++)
        for (int kind = 0; kind < 3; kind++) {
          integer_part(isa, 7, 65, 33, weight_bits, bits, kind);
          integer_part(isa, 1, 16, 257, weight_bits, bits, kind);
        }
    for (int64_t m = 1; m <= 13; m++)
      for (int64_t n : {1, 63, 64, 130})
        for (int64_t k : {1, 8, 31}) integer_part(isa, m, n, k, 4, 4, 0);
    for (int bits : {4, 8}) integer_part(isa, 2, 3, 16384, bits, bits, 2);
    whole_layers(isa);
    row_operations(isa);
    const double peak = qvgen_peak(isa.c_str());
    expect(peak >= 0 && std::isfinite(peak), "peak", isa, 0, 0, 0, 0);
    printf("checked: %s\n", *name);
  }
  printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
