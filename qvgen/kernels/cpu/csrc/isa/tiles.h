// The tile instructions of AMX, each behind one name, and the same in plain C++ for processors without them.
//
// Inline assembly, not intrinsics: those of GCC 12 do not say which memory they read and write, so that the optimizer may move
// or drop stores, and they need a compiler that knows AMX where this needs an assembler only. "memory" on every one that
// touches it: no tile is loaded before what it reads was written. Compilers use no tiles of their own accord.
//
// With QVGEN_AMX_EMULATED tiles are arrays of each thread, which is how tests and sanitizers reach the kernels on any
// processor. It is strict: what the hardware answers with a signal, or with what a tile held before, ends the process.
#pragma once

#include <cstdint>

#ifdef QVGEN_AMX_EMULATED
#include <cstdio>
#include <cstdlib>
#include <cstring>
#endif

#ifndef INLINE
#define INLINE inline __attribute__((always_inline))
#endif

namespace {

constexpr int TILE_COUNT = 8, TILE_LINES = 16, TILE_BYTES = 64;  // all tiles have the largest shape: 16 lines of 64 bytes

#ifdef QVGEN_AMX_EMULATED

struct EmulatedTiles {
  bool configured = false, loaded[TILE_COUNT] = {};
  uint8_t lines[TILE_COUNT][TILE_LINES][TILE_BYTES];

  void demand(bool holds, const char* otherwise) const {
    if (holds) return;
    fprintf(stderr, "emulated tiles: %s\n", otherwise);
    abort();
  }
  void read(int tile) const {
    demand(configured, "used without a configuration");
    demand(loaded[tile], "a tile was read that nothing was loaded into");
  }
  void write(int tile) {
    demand(configured, "used without a configuration");
    loaded[tile] = true;
  }
};
thread_local EmulatedTiles emulated;

inline void tile_configure() { emulated.configured = true, memset(emulated.loaded, 0, sizeof emulated.loaded); }
inline void tile_release() { emulated.configured = false; }
template <int I>
void tile_zero() {
  emulated.write(I);
  memset(emulated.lines[I], 0, sizeof emulated.lines[I]);
}
template <int I>
void tile_load(const void* from, int64_t stride) {
  emulated.write(I);
  for (int i = 0; i < TILE_LINES; i++) memcpy(emulated.lines[I][i], static_cast<const char*>(from) + i * stride, TILE_BYTES);
}
template <int I>
void tile_load_once(const void* from, int64_t stride) {
  tile_load<I>(from, stride);
}
template <int I>
void tile_store(void* to, int64_t stride) {
  emulated.read(I);
  for (int i = 0; i < TILE_LINES; i++) memcpy(static_cast<char*>(to) + i * stride, emulated.lines[I][i], TILE_BYTES);
}
// Not looked into by the sanitizers, which would make tests take minutes: it reads and writes whole tiles only. In float, which
// is exact (64 x 255 x 128 < 2^24) and which every processor has vectors for.
__attribute__((noinline, no_sanitize("address", "undefined"))) inline void emulated_dot(int c, int a, int b) {
  float transposed[TILE_BYTES][16];
  for (int k = 0; k < TILE_BYTES; k++)
    for (int n = 0; n < 16; n++) transposed[k][n] = float(int8_t(emulated.lines[b][k / 4][4 * n + k % 4]));
  for (int m = 0; m < TILE_LINES; m++) {
    float products[16] = {};
    for (int k = 0; k < TILE_BYTES; k++)
      for (int n = 0; n < 16; n++) products[n] += float(emulated.lines[a][m][k]) * transposed[k][n];
    uint32_t sums[16];  // unsigned: the instruction wraps around
    memcpy(sums, emulated.lines[c][m], TILE_BYTES);
    for (int n = 0; n < 16; n++) sums[n] += uint32_t(int32_t(products[n]));
    memcpy(emulated.lines[c][m], sums, TILE_BYTES);
  }
}
template <int C, int A, int B>
void tile_dot() {
  emulated.read(A), emulated.read(B), emulated.read(C);
  emulated_dot(C, A, B);
}
// As the processor, which takes numbers below 2^-126 for zero; it adds up in another order, which its manual leaves open.
__attribute__((noinline, no_sanitize("address", "undefined"))) inline void emulated_dot_bf16(int c, int a, int b) {
  constexpr int PAIRS = TILE_BYTES / 2;
  const auto value = [](int tile, int line, int at) {
    uint16_t half;
    memcpy(&half, emulated.lines[tile][line] + 2 * at, 2);
    const uint32_t bits = half & 0x7f80 ? uint32_t(half) << 16 : 0;
    float number;
    memcpy(&number, &bits, 4);
    return number;
  };
  float right[PAIRS][16];
  for (int k = 0; k < PAIRS; k++)
    for (int n = 0; n < 16; n++) right[k][n] = value(b, k / 2, 2 * n + k % 2);
  for (int m = 0; m < TILE_LINES; m++) {
    float sums[16];
    memcpy(sums, emulated.lines[c][m], TILE_BYTES);
    for (int k = 0; k < PAIRS; k++) {
      const float left = value(a, m, k);
      for (int n = 0; n < 16; n++) sums[n] += left * right[k][n];
    }
    memcpy(emulated.lines[c][m], sums, TILE_BYTES);
  }
}
template <int C, int A, int B>
void tile_dot_bf16() {
  emulated.read(A), emulated.read(B), emulated.read(C);
  emulated_dot_bf16(C, A, B);
}

#else

// Of this thread. Others that were started before it have none: configure on entry, release on exit, always.
INLINE void tile_configure() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t line_bytes[16] = {};
    uint8_t lines[16] = {};
  } shapes;
  for (int i = 0; i < TILE_COUNT; i++) shapes.line_bytes[i] = TILE_BYTES, shapes.lines[i] = TILE_LINES;
  asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
}
INLINE void tile_release() { asm volatile("tilerelease" : : : "memory"); }
template <int I>
INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(I));
}
template <int I>
INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(I) : "memory");
}
// Of what is read once only: it displaces less from the nearest cache.
template <int I>
INLINE void tile_load_once(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(I) : "memory");
}
template <int I>
INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(I) : "memory");
}
// C (16 tokens, 16 outputs) += A (16 tokens, 64 k), unsigned bytes, times B (16, 16 outputs x 4 k), signed bytes.
template <int C, int A, int B>
INLINE void tile_dot() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
// C (16, 16) float32 += A (16, 32) bfloat16 times B (32, 16), whose line i holds pairs: rows 2 i and 2 i + 1 of each column.
template <int C, int A, int B>
INLINE void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace
