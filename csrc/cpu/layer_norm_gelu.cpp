// out = GELU(LN(x)) and out = LN(GELU(x)), with their gradients: derivation in simd/layer_norm.inc.
//
// Forward reads x and writes out, backward reads dout and x and writes dx: 8 and 12 bytes per fp32 element,
// as the norm alone. GELU is computed again in backward; LN(GELU(x)) keeps its slope in a cached line between
// the two passes over a row, so that it is computed once.
#include "cpu/layer_norm.h"

#include "cpu/simd/begin.h"
#include "cpu/simd/rows.inc"
#include "cpu/simd/gelu.inc"
#include "cpu/simd/layer_norm.inc"

template <bool kFirst>
void forward(const LayerNormArgs& args) {
  FASTTUNE_WITH_DTYPE(args.dtype, T, {
    args.gelu == Gelu::tanh ? layer_norm_rows<T, T, Activation<Gelu::tanh, kFirst>>(args)
                            : layer_norm_rows<T, T, Activation<Gelu::erf, kFirst>>(args);
  });
}

template <bool kFirst>
void backward(const LayerNormBackwardArgs& args) {
  FASTTUNE_WITH_DTYPE(args.dtype, T, {
    args.gelu == Gelu::tanh ? layer_norm_rows_backward<T, T, Activation<Gelu::tanh, kFirst>>(args)
                            : layer_norm_rows_backward<T, T, Activation<Gelu::erf, kFirst>>(args);
  });
}

void layer_norm_gelu(const LayerNormArgs& args) { forward<false>(args); }
void layer_norm_gelu_backward(const LayerNormBackwardArgs& args) { backward<false>(args); }
void gelu_layer_norm(const LayerNormArgs& args) { forward<true>(args); }
void gelu_layer_norm_backward(const LayerNormBackwardArgs& args) { backward<true>(args); }

#include "cpu/simd/end.h"
