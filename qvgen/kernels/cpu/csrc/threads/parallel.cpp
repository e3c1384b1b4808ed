// Threads: those of the OpenMP runtime that torch has loaded, because a second pool would fight with its spinning threads for
// the same cores; without one (and in a forked child, where its threads are gone) threads that are started for each call.
#include "threads/parallel.h"

#include <exception>
#include <thread>
#include <vector>

#ifdef __unix__
#include <pthread.h>
#endif

namespace qvgen {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

#ifdef __unix__
const int at_fork = pthread_atfork(nullptr, nullptr, [] { gomp_parallel = nullptr; });
#endif

}  // namespace

void on_threads(int threads, void (*body)(void*), void* context) {
  if (threads <= 1) return body(context);
  if (GompParallel run = gomp_parallel.load(std::memory_order_relaxed)) return run(body, context, unsigned(threads), 0);
  std::vector<std::thread> others;
  try {
    others.reserve(threads - 1);
    for (int i = 1; i < threads; i++) others.emplace_back(body, context);
  } catch (const std::exception&) {
    // No more threads to be had: those that there are do all the work.
  }
  body(context);
  for (std::thread& thread : others) thread.join();
}

}  // namespace qvgen

void qvgen_use_openmp(void* function) {
  qvgen::gomp_parallel = reinterpret_cast<qvgen::GompParallel>(function);
}
