// Row operations shared out among threads.
#include "api.h"
#include "isa/isa.h"
#include "threads/each_row.h"

namespace qvgen {
namespace {

struct Matrix {
  int64_t row_bytes;
  Matrix(int dtype, int64_t features) : row_bytes(features * (dtype ? 2 : 4)) {}
  const void* row(const void* data, int64_t r) const { return static_cast<const uint8_t*>(data) + r * row_bytes; }
  void* row(void* data, int64_t r) const { return static_cast<uint8_t*>(data) + r * row_bytes; }
};

}  // namespace
}  // namespace qvgen

using namespace qvgen;

int qvgen_layer_norm(
    const char* isa_name, const void* x, int dtype, int64_t rows, int64_t features, float eps, const float* weight,
    const float* bias, const float* scale, const float* shift, int64_t group_rows, void* out, int threads) {
  const Isa* isa = find_isa(isa_name);
  if (!isa) return QVGEN_UNSUPPORTED_ISA;
  const Matrix matrix(dtype, features);
  const LayerNorm norm = {features, eps, weight, bias, scale, shift};
  return each_row(rows, features, threads, [&](int64_t r) {
    isa->layer_norm(dtype, matrix.row(x, r), norm, r / group_rows, matrix.row(out, r));
  });
}

int qvgen_rms_norm(
    const char* isa_name, const void* x, int dtype, int64_t rows, int64_t features, float eps, const float* weight,
    const float* cosine, const float* sine, int64_t positions, int64_t head_features, void* out, int threads) {
  const Isa* isa = find_isa(isa_name);
  if (!isa) return QVGEN_UNSUPPORTED_ISA;
  const Matrix matrix(dtype, features);
  const RmsNorm norm = {features, head_features, eps, weight, cosine, sine};
  return each_row(rows, features, threads, [&](int64_t r) {
    isa->rms_norm(dtype, matrix.row(x, r), norm, r % positions, matrix.row(out, r));
  });
}

int qvgen_add_gated(
    const char* isa_name, const void* x, const void* y, const float* gate, int dtype, int64_t rows, int64_t features,
    int64_t group_rows, void* out, int threads) {
  const Isa* isa = find_isa(isa_name);
  if (!isa) return QVGEN_UNSUPPORTED_ISA;
  const Matrix matrix(dtype, features);
  return each_row(rows, features, threads, [&](int64_t r) {
    const float* row_gate = gate ? gate + r / group_rows * features : nullptr;
    isa->add_gated(dtype, matrix.row(x, r), matrix.row(y, r), row_gate, features, matrix.row(out, r));
  });
}
