// Work shared out among threads in pieces that are fetched one by one, so that a slow core takes fewer. What is computed
// for a piece never depends on who computes it or how many there are.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#include "api.h"

namespace qvgen {

// Call body(context) on up to `threads` threads at once, the caller's included, and wait for them.
void on_threads(int threads, void (*body)(void*), void* context);

// f(index) for each index in [0, count). Returns a qvgen_status.
template <class F>
int parallel_for(int threads, int64_t count, const F& f) {
  struct Work {
    const F& f;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<int> status{QVGEN_OK};
  } work{f, count};
  auto body = [](void* context) {
    Work& w = *static_cast<Work*>(context);
    try {
      for (int64_t i; (i = w.next.fetch_add(1, std::memory_order_relaxed)) < w.count;) w.f(i);
    } catch (const std::bad_alloc&) {
      w.status = QVGEN_OUT_OF_MEMORY;
    }
  };
  on_threads(int(threads < count ? threads : count), body, &work);
  return work.status;
}

}  // namespace qvgen
