// out = LN(dropout(x) + residual) and LN(x), with their gradients: derivation in simd/layer_norm.inc.
//
// Forward reads x and the residual and writes out and, for the residual stream and for backward, the sum: 16
// bytes per fp32 element, 8 for the plain norm. Backward reads dout and the sum (and dsum) and writes
// dresidual and dx: 16 bytes (20), 12 for the plain norm. The dropout mask is generated in both, never
// stored. Some 40 instructions per vector forward and 60 backward, so memory is the limit. Tiling: fixed
// blocks of rows (simd/rows.inc); a row's passes after the first run in the L1 cache. Each block sums dweight
// and dbias into lines of its own, added in order afterwards.
#include "cpu/layer_norm.h"

#include "cpu/simd/begin.h"
#include "cpu/simd/rows.inc"
#include "cpu/simd/gelu.inc"
#include "cpu/simd/layer_norm.inc"

using Plain = Activation<Gelu::none, false>;

void layer_norm(const LayerNormArgs& args) {
  if (args.dtype == DType::f32) {  // x may be 16-bit: what a linear layer under autocast returns
    FASTTUNE_WITH_DTYPE(args.x_dtype, X, (layer_norm_rows<X, float, Plain>(args)));
  } else {
    FASTTUNE_WITH_DTYPE(args.dtype, T, (layer_norm_rows<T, T, Plain>(args)));
  }
}

void layer_norm_backward(const LayerNormBackwardArgs& args) {
  if (args.dtype == DType::f32) {
    FASTTUNE_WITH_DTYPE(args.x_dtype, X, (layer_norm_rows_backward<X, float, Plain>(args)));
  } else {
    FASTTUNE_WITH_DTYPE(args.dtype, T, (layer_norm_rows_backward<T, T, Plain>(args)));
  }
}

#include "cpu/simd/end.h"
