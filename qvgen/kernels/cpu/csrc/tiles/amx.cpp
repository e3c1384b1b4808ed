// The instruction set "amx", and whether this process may use it.
#include "tiles/tiles.h"

#ifdef __x86_64__

#include <cpuid.h>

#include <cerrno>
#include <cstdio>

#ifdef __linux__
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// The registers of tiles are 8 KiB, which Linux makes room for in signal frames only where a process asks. The permission is
// for all threads, is inherited by fork and lost by exec. Asking is also the only safe way to know: without permission the
// first tile that is loaded ends the process, and sandboxes refuse it on processors that have AMX.
const char* permission_refusal() {
#ifdef __linux__
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static char text[240];
  if (syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0) return nullptr;
  const int error = errno;
  if (error == ENOSPC) {
    constexpr int LEAST_SIGNAL_STACK = 51;  // AT_MINSIGSTKSZ
    snprintf(text, sizeof text,
             "the operating system refuses AMX tiles because a thread has a signal stack of less than %lu bytes (arch_prctl: "
             "ENOSPC); use them before that thread starts, or give it a larger sigaltstack",
             getauxval(LEAST_SIGNAL_STACK));
  } else {
    snprintf(text, sizeof text, "the operating system, or a sandbox, refuses AMX tiles (arch_prctl: errno %d)", error);
  }
  return text;
#else
  return "AMX is used on Linux only";
#endif
}

bool registers_are_saved() {
  constexpr unsigned TILES = 3 << 17;  // XTILECFG and XTILEDATA in XCR0
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & TILES) == TILES;
}

const char* refusal_now() {
  unsigned a, b, c, d;
  const bool present = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1);  // AMX-TILE, AMX-INT8
  if (!present) return "this processor does not have AMX";
  if (!(c >> 1 & 1)) return "AVX512_VBMI is switched off, beside which AMX is used";
  if (!registers_are_saved()) return "the operating system does not know AMX's registers (XCR0)";
  if (!qvgen::isa_avx512bf16()->supported()) return "AVX512_BF16 is switched off, beside which AMX is used";
  return permission_refusal();
}

const char* refusal_of_emulated() { return qvgen::isa_avx2()->supported() ? nullptr : "emulated tiles need AVX2"; }

const char* refusal() {
  // The same for the whole process.
  static const char* const text = qvgen::tiles_amx()->emulated ? refusal_of_emulated() : refusal_now();
  return text;
}

bool supported() { return !refusal(); }

// For what tiles are not for: few tokens, quantization, outputs, norms.
const qvgen::Isa& registers(bool emulated) {
  const qvgen::Isa* const candidates[] = {qvgen::isa_avx512bf16(), qvgen::isa_avx512vnni(), qvgen::isa_avx2()};
  for (const qvgen::Isa* isa : candidates)
    if (isa && (!emulated || isa->supported())) return *isa;  // real tiles come with the first of them
  return *qvgen::isa_portable();
}

bool multiply_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // AMX-BF16
}

}  // namespace

bool qvgen::tiles_multiply_bf16() {
  return tiles_amx() && (tiles_amx()->emulated || (supported() && multiply_bf16()));
}

const qvgen::Isa* qvgen::isa_amx() {
  if (!tiles_amx()) return nullptr;
  static const Isa isa = [] {
    Isa amx = registers(tiles_amx()->emulated);
    amx.name = "amx", amx.supported = supported, amx.refusal = refusal, amx.burst = tiles_amx()->products, amx.tiles = tiles_amx();
    return amx;
  }();
  return &isa;
}

#else

bool qvgen::tiles_multiply_bf16() { return false; }

#endif
