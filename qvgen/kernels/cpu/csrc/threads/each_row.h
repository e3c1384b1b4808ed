// Rows of a matrix shared out among threads.
#pragma once

#include "threads/parallel.h"

namespace qvgen {

constexpr int64_t ROWS = 16;  // that a thread takes at a time
constexpr int64_t WORTH_A_THREAD = 1 << 14;  // elements

// f(row) for all rows.
template <class F>
int each_row(int64_t rows, int64_t features, int threads, const F& f) {
  const int64_t worth = 1 + rows * features / WORTH_A_THREAD;
  return parallel_for(int(worth < threads ? worth : threads), (rows + ROWS - 1) / ROWS, [&](int64_t chunk) {
    for (int64_t row = chunk * ROWS; row < rows && row < (chunk + 1) * ROWS; row++) f(row);
  });
}

}  // namespace qvgen
