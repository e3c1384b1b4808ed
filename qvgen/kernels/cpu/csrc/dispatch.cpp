// The instruction sets this build knows, best first. Which one runs is the caller's choice (library.py): the same process may
// run any that the processor has, which is how the tests reach all of them on one machine.
#include <cstring>

#include "api.h"
#include "isa/isa.h"
#include "tiles/tiles.h"

namespace qvgen {
namespace {

const Isa* const ISAS[] = {  // null: not in this build
#if defined(__x86_64__) || defined(_M_X64)
    isa_amx(), isa_avx512bf16(), isa_avx512vnni(), isa_avxvnni(), isa_avx2(),
#elif defined(__aarch64__)
    isa_neon_dotprod(), isa_neon(),
#endif
    isa_portable(),
};
constexpr int COUNT = sizeof ISAS / sizeof *ISAS;

}  // namespace

const Isa* find_isa(const char* name) {
  for (const Isa* isa : ISAS)
    if (isa && !strcmp(isa->name, name)) return isa->supported() ? isa : nullptr;
  return nullptr;
}

}  // namespace qvgen

const char* const* qvgen_isas() {
  static const char* names[qvgen::COUNT + 1] = {};
  static const bool filled = [] {
    int count = 0;
    for (const qvgen::Isa* isa : qvgen::ISAS)
      if (isa) names[count++] = isa->name;
    return true;
  }();
  (void)filled;
  return names;
}

int qvgen_isa_supported(const char* name) { return qvgen::find_isa(name) != nullptr; }

const char* qvgen_isa_refusal(const char* name) {
  for (const qvgen::Isa* isa : qvgen::ISAS)
    if (isa && !strcmp(isa->name, name)) return !isa->supported() && isa->refusal ? isa->refusal() : nullptr;
  return nullptr;
}

int qvgen_isa_emulated(const char* name) {
  const qvgen::Isa* isa = qvgen::find_isa(name);
  return isa && isa->tiles && isa->tiles->emulated;
}
