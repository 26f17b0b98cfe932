// Closes what simd/begin.h opened.
}  // namespace FT_ISA
}  // namespace fasttune
#ifdef FT_FEATURES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
