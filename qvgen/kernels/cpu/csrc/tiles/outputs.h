// From sums of tiles to outputs, a row of 32 at a time, so that rows fit between the products of the next block: for any vector
// width. Operation by operation what linear/epilogue.h does where sums are integers of float32, with equal results; what belongs
// to the outputs stays in registers.
#pragma once

#include "linear/epilogue.h"
#include "tiles/tiles.h"

namespace {

inline void stream(void* to, f32v v) {
#if defined(__AVX512F__)
  asm volatile("vmovntps %1, %0" : "=m"(*(f32v*)to) : "v"(v));
#else
  store(to, v);
#endif
}

// Two vectors, one after the other.
inline void store_bf16(void* to, f32v first, f32v second) {
#ifdef __AVX512BF16__
  f32v both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(first), "v"(second));
  store(to, both);
#else
  store_float<Dtype::bf16>(to, 0, first), store_float<Dtype::bf16>(to, LANES, second);
#endif
}

// Rows of one block, in order.
template <Dtype D, bool GELU>
class Rows {
 public:
  explicit Rows(const qvgen::TileOutputs& outputs) : o_(outputs) {
    for (int i = 0; i < VECTORS; i++) {
      const int64_t n = o_.first + i * LANES;
      row_sum_[i] = __builtin_convertvector(load<s32v>(o_.grid->row_sum + n), f32v);
      zero_[i] = __builtin_convertvector(load<s32v>(o_.grid->zero_whole + n), f32v);
      fraction_[i] = load<f32v>(o_.grid->zero_fraction + n), scale_[i] = load<f32v>(o_.grid->scale + n);
      bias_[i] = load<f32v>(o_.bias + n);
    }
  }

  INLINE void next() {
    const float zero_point = o_.tokens.zero_point[row_], sum = o_.tokens.sum[row_], token_scale = o_.tokens.scale[row_];
    const int32_t* const sums = o_.sums + row_ * qvgen::TILE_OUTPUTS;
    f32v v[VECTORS];
    for (int i = 0; i < VECTORS; i++) {
      v[i] = __builtin_convertvector(load<s32v>(sums + i * LANES), f32v) - row_sum_[i] * zero_point;
      v[i] -= zero_[i] * sum;
      v[i] -= fraction_[i] * sum;
      v[i] = v[i] * scale_[i] * token_scale + bias_[i];
      if constexpr (GELU) v[i] = gelu_tanh(v[i]);
    }
    write(v, static_cast<uint8_t*>(o_.out) + row_ * o_.stride);
    row_++;
  }

 private:
  static constexpr int VECTORS = int(qvgen::TILE_OUTPUTS / LANES);
  static constexpr int64_t BYTES = qvgen::TILE_OUTPUTS * dtype_size<D>;

  INLINE void write(const f32v (&v)[VECTORS], uint8_t* out) const {
    if constexpr (D == Dtype::f32) {
      for (int i = 0; i < VECTORS; i++) o_.how == qvgen::Write::plain ? store(out + i * LANES * 4, v[i]) : stream(out + i * LANES * 4, v[i]);
    } else {
      // Both halves of a panel at once: 128 bytes in a row have twice the bandwidth of 64.
      uint8_t* const stage = o_.stage + row_ * BYTES;
      uint8_t* const to = o_.how == qvgen::Write::stage ? stage : out;
      if (o_.how != qvgen::Write::stream) {
        for (int i = 0; i < VECTORS; i += 2) store_bf16(to + i * LANES * 2, v[i], v[i + 1]);
        return;
      }
      alignas(64) uint8_t row[BYTES];
      for (int i = 0; i < VECTORS; i += 2) store_bf16(row + i * LANES * 2, v[i], v[i + 1]);
      for (int64_t i = 0; i < BYTES; i += LANES * 4) stream(out - BYTES + i, load<f32v>(stage + i));
      for (int64_t i = 0; i < BYTES; i += LANES * 4) stream(out + i, load<f32v>(row + i));
    }
  }

  const qvgen::TileOutputs& o_;
  int64_t row_ = 0;
  f32v row_sum_[VECTORS], zero_[VECTORS], fraction_[VECTORS], scale_[VECTORS], bias_[VECTORS];
};

}  // namespace
