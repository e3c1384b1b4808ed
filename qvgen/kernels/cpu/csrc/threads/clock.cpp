// Clock rate and peak, measured: in virtual machines the operating system often does not know the one, and the other differs
// between processors with the same instructions (AVX-512 VNNI: 128 multiply-adds per cycle on Zen 5, 64 on Zen 4).
#include <chrono>
#include <cstdint>

#include "api.h"
#include "isa/isa.h"

namespace qvgen {
namespace {

constexpr int REPETITIONS = 8;  // the fastest counts: the others were interrupted

template <class F>
double fastest(const F& f) {
  double best = 1e9;
  for (int repetition = 0; repetition < REPETITIONS; repetition++) {
    const auto started = std::chrono::steady_clock::now();
    f();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    if (seconds < best) best = seconds;
  }
  return best;
}

double cycles_per_second(int64_t rounds) {
  volatile uint64_t seed = 88172645463325252u;
  const double seconds = fastest([&] {
    // Six operations that each wait for the last and take one cycle on every processor of the last decade.
    uint64_t x = seed;
    for (int64_t i = 0; i < rounds; i++) {
      x ^= x << 13;
      x ^= x >> 7;
      x ^= x << 17;
    }
    seed = x;
  });
  return 6 * double(rounds) / seconds;
}

}  // namespace

double peak(const Isa& isa) {
  if (!isa.burst) return 0;
  int64_t products = 0;
  const double seconds = fastest([&] { products = isa.burst(1 << 12); });
  return double(products) / seconds / cycles_per_second(1 << 14);
}


}  // namespace qvgen

double qvgen_cycles_per_second() { return qvgen::cycles_per_second(1 << 20); }

double qvgen_peak(const char* isa) {
  const qvgen::Isa* found = qvgen::find_isa(isa);
  return found ? qvgen::peak(*found) : 0;
}
