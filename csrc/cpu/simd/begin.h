// Opens the code of one instruction set: every kernel file is
//
//     #include "cpu/<operation>.h"        (and any other ordinary header, all of them before the next line)
//     #include "cpu/simd/begin.h"
//     ... kernels, written against simd/vec_*.inc, width-agnostic through kLanes ...
//     #include "cpu/simd/end.h"
//
// and is compiled once per set with -DFASTTUNE_ISA_BASELINE, _AVX2 or _AVX512. A target *region* is used
// rather than a -m flag: with a flag, inline functions of standard headers would be compiled with wide
// instructions too, and the linker may keep that copy for everybody. Lambdas do not inherit the region: write
// `[&](...) FT_LAMBDA { ... }`. No namespace-scope SIMD constants: they would execute wide instructions at
// load.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/dropout.h"
#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

#define FT_PRAGMA_(x) _Pragma(#x)
#define FT_PRAGMA(x) FT_PRAGMA_(x)

#if defined(FASTTUNE_ISA_AVX512)
#define FT_ISA avx512
#define FT_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"
#elif defined(FASTTUNE_ISA_AVX2)
#define FT_ISA avx2
#define FT_FEATURES "avx2,fma,f16c,bmi,bmi2"
#else
#define FT_ISA baseline
#endif

#ifdef FT_FEATURES
#include <immintrin.h>
#define FT_LAMBDA __attribute__((target(FT_FEATURES)))
#if defined(__clang__)
FT_PRAGMA(clang attribute push(__attribute__((target(FT_FEATURES))), apply_to = function))
#else
FT_PRAGMA(GCC push_options)
FT_PRAGMA(GCC target(FT_FEATURES))
#endif
#else
#define FT_LAMBDA
#endif

#define FT_INLINE inline __attribute__((always_inline))

namespace fasttune {
namespace FT_ISA {

#if defined(FASTTUNE_ISA_AVX512)
#include "cpu/simd/vec_avx512.inc"
#elif defined(FASTTUNE_ISA_AVX2)
#include "cpu/simd/vec_avx2.inc"
#else
#include "cpu/simd/vec_baseline.inc"
#endif
#include "cpu/simd/math.inc"
#include "cpu/simd/philox.inc"
