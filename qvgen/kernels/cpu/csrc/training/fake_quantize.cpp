// Rows of fake quantization shared out among threads.
#include "api.h"
#include "isa/isa.h"
#include "threads/each_row.h"

using namespace qvgen;

int qvgen_fake_quantize(
    const char* isa_name, const float* x, const float* scale, const float* zero_point, int64_t rows, int64_t features,
    int max_code, int float_zero_point, float* out, int threads) {
  const Isa* isa = find_isa(isa_name);
  if (!isa) return QVGEN_UNSUPPORTED_ISA;
  const FakeQuantizer q = {features, float(max_code), float_zero_point != 0, scale, zero_point};
  return each_row(rows, features, threads, [&](int64_t r) { isa->fake_quantize(q, r, x + r * features, out + r * features); });
}

int qvgen_fake_quantize_backward(
    const char* isa_name, const float* grad, const float* x, const float* scale, const float* zero_point, int64_t rows,
    int64_t features, int max_code, int float_zero_point, float* grad_x, float* grad_scale, float* grad_zero_point,
    int threads) {
  const Isa* isa = find_isa(isa_name);
  if (!isa) return QVGEN_UNSUPPORTED_ISA;
  const FakeQuantizer q = {features, float(max_code), float_zero_point != 0, scale, zero_point};
  return each_row(rows, features, threads, [&](int64_t r) {
    const int64_t at = r * features;
    isa->fake_quantize_backward(q, r, grad + at, x + at, grad_x + at, grad_scale, grad_zero_point);
  });
}
