#include "cpu/isa.h"

#include <atomic>
#include <cstdint>

#if FASTTUNE_X86
#include <cpuid.h>
#endif

namespace fasttune {
namespace {

#if FASTTUNE_X86
struct Features {
  bool avx2 = false;
  bool avx512 = false;
};

uint64_t read_xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

Features detect() {
  Features features;
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return features;
  const bool fma = ecx & (1u << 12), osxsave = ecx & (1u << 27), avx = ecx & (1u << 28),
             f16c = ecx & (1u << 29);
  if (!(osxsave && avx && fma && f16c)) return features;
  const uint64_t xcr0 = read_xcr0();
  const bool os_saves_ymm = (xcr0 & 0x6) == 0x6, os_saves_zmm = (xcr0 & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return features;
  const bool avx2 = ebx & (1u << 5), bmi = (ebx & (1u << 3)) && (ebx & (1u << 8));
  const uint32_t f_dq_bw_vl = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
  features.avx2 = os_saves_ymm && avx2 && bmi;
  features.avx512 = features.avx2 && os_saves_zmm && (ebx & f_dq_bw_vl) == f_dq_bw_vl;
  return features;
}
#endif

Isa best_isa() {
  if (isa_supported(Isa::avx512)) return Isa::avx512;
  if (isa_supported(Isa::avx2)) return Isa::avx2;
  return Isa::baseline;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

bool isa_supported(Isa isa) {
#if FASTTUNE_X86
  static const Features features = detect();
  if (isa == Isa::avx512) return features.avx512;
  if (isa == Isa::avx2) return features.avx2;
#endif
  return isa == Isa::baseline;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }
void set_active_isa(Isa isa) { active().store(isa, std::memory_order_relaxed); }

}  // namespace fasttune
