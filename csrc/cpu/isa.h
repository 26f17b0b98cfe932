// Which instruction set runs. Every kernel is compiled once per set in a namespace of that name
// (simd/begin.h); FASTTUNE_KERNEL declares all of them and the one dispatcher that callers use.
#pragma once

namespace fasttune {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// True if both this processor and its operating system can run code built for `isa` (CPUID, OSXSAVE, XCR0).
bool isa_supported(Isa isa);
Isa active_isa();
void set_active_isa(Isa isa);  // the caller has checked isa_supported

}  // namespace fasttune

#if defined(__x86_64__) || defined(_M_X64)
#define FASTTUNE_X86 1
#define FASTTUNE_KERNEL(name, Args)    \
  namespace baseline {                 \
  void name(const Args& args);         \
  }                                    \
  namespace avx2 {                     \
  void name(const Args& args);         \
  }                                    \
  namespace avx512 {                   \
  void name(const Args& args);         \
  }                                    \
  inline void name(const Args& args) { \
    switch (active_isa()) {            \
      case Isa::avx512:                \
        return avx512::name(args);     \
      case Isa::avx2:                  \
        return avx2::name(args);       \
      case Isa::baseline:              \
        return baseline::name(args);   \
    }                                  \
  }
#else
#define FASTTUNE_X86 0
#define FASTTUNE_KERNEL(name, Args) \
  namespace baseline {              \
  void name(const Args& args);      \
  }                                 \
  inline void name(const Args& args) { baseline::name(args); }
#endif
