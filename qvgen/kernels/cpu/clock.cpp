// The clock rate, for benchmarks that report a fraction of an instruction's peak: in virtual machines the operating system often
// does not know it.
#include <chrono>
#include <cstdint>

#include "api.h"

double qvgen_cycles_per_second() {
  // Six operations that each wait for the last and take one cycle on every processor of the last decade.
  constexpr int64_t ROUNDS = 1 << 20;
  double best = 0;
  uint64_t x = 88172645463325252u;
  for (int repetition = 0; repetition < 8; repetition++) {  // the fastest: the others were interrupted
    const auto started = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < ROUNDS; i++) {
      x ^= x << 13;
      x ^= x >> 7;
      x ^= x << 17;
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    if (x && 6 * ROUNDS / seconds > best) best = 6 * ROUNDS / seconds;
  }
  return best;
}
