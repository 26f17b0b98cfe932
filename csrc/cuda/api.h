/* The C ABI of the CUDA library: addresses on the device, sizes, strides in elements, and a stream.
 *
 * Every function enqueues kernels on `stream` (a cudaStream_t) and returns without waiting: null, or what
 * went wrong as a sentence with static lifetime. Tensors are contiguous where no stride is given. Nothing is
 * allocated: scratch comes in as arguments. Checks of shapes and dtypes are the caller's (fasttune/ops). */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Element types; the numbers Python passes (fasttune/ops/_cpp.py: DTYPE_CODES). Arithmetic is in float32. */
enum { FASTTUNE_F32 = 0, FASTTUNE_BF16 = 1, FASTTUNE_F16 = 2 };

/* Dropout of docs/dropout.md. A null seed: none. */
typedef struct {
  const int64_t* seed;    /* (1,) on the device */
  const int64_t* row_ids; /* (rows,) logical row of each row, or null for 0, 1, 2, ...; not for attention */
  uint32_t threshold;     /* 16-bit uniforms below it drop their element */
  float scale;            /* of kept elements: 65536 / (65536 - threshold), 0 for threshold 65536 */
} fasttune_dropout_options;

/* Activations; the numbers Python passes (fasttune/ops/_activations.py). Layer norms take the first three. */
enum {
  FASTTUNE_GELU_NONE = 0,
  FASTTUNE_GELU_ERF = 1,
  FASTTUNE_GELU_TANH = 2,
  FASTTUNE_SILU = 3,       /* x sigmoid(x) */
  FASTTUNE_RELU = 4,       /* max(x, 0) */
  FASTTUNE_QUICK_GELU = 5, /* x sigmoid(1.702 x) */
  FASTTUNE_RELU2 = 6       /* max(x, 0) squared */
};

typedef struct {
  int dtype;
  const void* x;        /* (rows, columns) */
  const void* residual; /* (rows, columns) or null: added after the dropout */
  void* out;            /* (rows, columns) */
  int64_t rows, columns;
  fasttune_dropout_options dropout;
} fasttune_dropout_args;
const char* fasttune_cuda_dropout(const fasttune_dropout_args*, void* stream);

typedef struct {
  int dtype, bias_dtype; /* bias_dtype: dtype or float32 */
  int activation;
  const void* x;    /* (rows, columns) */
  const void* gate; /* (rows, columns) or null: ones */
  const void* bias; /* (columns,), with a gate (2 columns,): x's, then the gate's; or null */
  void* out;        /* (rows, columns), contiguous */
  int64_t rows, columns;
  int64_t x_stride, gate_stride; /* elements between rows */
} fasttune_activation_args;
/* act(x + bias), or act(x + bias) (gate + gate_bias) */
const char* fasttune_cuda_activation(const fasttune_activation_args*, void* stream);

typedef struct {
  int dtype, bias_dtype;
  int activation;
  const void* dout;     /* (rows, columns), contiguous */
  const void* x;        /* (rows, columns) */
  const void* gate;     /* (rows, columns) or null */
  const void* bias;     /* (columns,) or (2 columns,), or null */
  void* dx;             /* (rows, columns) or null: not wanted */
  void* dgate;          /* (rows, columns) or null: not wanted */
  void* dbias;          /* like bias, or null: not wanted */
  float* dbias_partial; /* (partials, columns or 2 columns) scratch, where dbias is wanted */
  int64_t partials;     /* fasttune_cuda_activation_partials(...) */
  int64_t rows, columns;
  int64_t x_stride, gate_stride, gradient_stride; /* the last of dx and of dgate */
} fasttune_activation_backward_args;
int64_t fasttune_cuda_activation_partials(int64_t rows, int64_t columns, int64_t multiprocessors);
const char* fasttune_cuda_activation_backward(const fasttune_activation_backward_args*, void* stream);

/* The widest row that the layer normalisations take. */
#define FASTTUNE_CUDA_MAX_NORM_COLUMNS 8192
#define FASTTUNE_CUDA_MAX_NORM_GELU_COLUMNS 4096 /* with a GELU */

typedef struct {
  int dtype;   /* of residual, sum and out */
  int x_dtype; /* of x: dtype, or a 16-bit type beside float32 (layer_norm alone) */
  int weight_dtype, bias_dtype;
  const void* x;        /* (rows, columns) */
  const void* residual; /* (rows, columns) or null */
  const void* weight;   /* (columns,) or null: ones */
  const void* bias;     /* (columns,) or null: zeros */
  void* out;            /* (rows, columns) */
  void* sum;            /* (rows, columns) or null: dropout(x) + residual, the input of the norm */
  float* statistics;    /* (2, rows): the mean of each row, then 1 / standard deviation */
  int64_t rows, columns;
  float eps;
  fasttune_dropout_options dropout;
  int gelu; /* layer_norm_gelu and gelu_layer_norm only */
} fasttune_layer_norm_args;

typedef struct {
  int dtype;   /* of dout, dsum, input and dresidual */
  int x_dtype; /* of dx */
  int weight_dtype, bias_dtype;
  const void* dout;        /* (rows, columns) */
  const void* dsum;        /* (rows, columns) or null: the gradient that reaches the sum by itself */
  const void* input;       /* (rows, columns): the sum, or x where nothing was added */
  const void* weight;      /* (columns,) or null: ones */
  const void* bias;        /* (columns,) or null; read by layer_norm_gelu alone */
  const float* statistics; /* (2, rows) */
  void* dx;                /* (rows, columns) or null: not wanted */
  void* dresidual;         /* (rows, columns) or null: not wanted */
  void* dweight;           /* (columns,) in weight_dtype, or null: not wanted */
  void* dbias;             /* (columns,) in bias_dtype, or null: not wanted */
  float* dweight_partial;  /* (partials, columns) scratch, where dweight is wanted */
  float* dbias_partial;    /* the same for dbias */
  int64_t partials;        /* fasttune_cuda_layer_norm_partials(...) */
  int64_t rows, columns;
  fasttune_dropout_options dropout;
  int gelu;
} fasttune_layer_norm_backward_args;

int64_t fasttune_cuda_layer_norm_partials(int64_t rows, int64_t columns, int64_t multiprocessors);
/* LN(dropout(x) + residual) */
const char* fasttune_cuda_layer_norm(const fasttune_layer_norm_args*, void* stream);
const char* fasttune_cuda_layer_norm_backward(const fasttune_layer_norm_backward_args*, void* stream);
/* GELU(LN(x)) */
const char* fasttune_cuda_layer_norm_gelu(const fasttune_layer_norm_args*, void* stream);
const char* fasttune_cuda_layer_norm_gelu_backward(const fasttune_layer_norm_backward_args*, void* stream);
/* LN(GELU(x)) */
const char* fasttune_cuda_gelu_layer_norm(const fasttune_layer_norm_args*, void* stream);
const char* fasttune_cuda_gelu_layer_norm_backward(const fasttune_layer_norm_backward_args*, void* stream);

typedef struct {
  int dtype;
  int64_t rows, classes;
  const void* logits;        /* (rows, classes) */
  int64_t logits_stride;     /* elements between rows */
  const int64_t* target;     /* (rows,) in [0, classes) or ignore_index; other labels give NaN */
  const float* class_weight; /* (classes,) or null for ones */
  int64_t ignore_index;
  float label_smoothing;
  float* loss;       /* (rows,) */
  float* statistics; /* (rows, 2): largest logit m, sum of exp(x - m) */
  float* loss_sum;   /* (1,) or null: the sum of the losses, divided by `total` if that is not null */
  float* total;      /* (1,) or null: the sum of the labels' class weights */
} fasttune_cross_entropy_args;
const char* fasttune_cuda_cross_entropy(const fasttune_cross_entropy_args*, void* stream);

typedef struct {
  int dtype;
  int64_t rows, classes;
  const void* logits; /* (rows, classes) */
  int64_t logits_stride;
  const int64_t* target;
  const float* class_weight;     /* (classes,) or null for ones */
  const float* class_weight_sum; /* (1,) over all classes; null for ones */
  int64_t ignore_index;
  float label_smoothing;
  const float* statistics; /* (rows, 2) */
  const float* dloss;      /* upstream gradient of row r: dloss[r * dloss_stride] */
  int64_t dloss_stride;    /* 0 or 1 */
  const float* total;      /* (1,) divides the gradient, or null */
  void* dlogits;           /* (rows, classes); may be `logits` itself */
  int64_t dlogits_stride;
} fasttune_cross_entropy_backward_args;
const char* fasttune_cuda_cross_entropy_backward(const fasttune_cross_entropy_backward_args*, void* stream);

/* A row's logits are x = scale (logits + bias). */
typedef struct {
  int dtype;
  int64_t rows, classes;
  const void* logits; /* (rows, classes) */
  int64_t logits_stride;
  const float* bias; /* (classes,) or null */
  float scale;
  const int64_t* ids; /* (rows,) or null; outside [0, classes) and not ignore_index: NaN */
  int64_t ignore_index;
  float* log_prob;   /* (rows,), where there are ids */
  float* logsumexp;  /* (rows,) */
  float* entropy;    /* (rows,) */
  float* mean_logit; /* (rows,) */
  int64_t* top1;     /* (rows,) */
  float* statistics; /* (rows, 3) largest x m, sum exp(x - m), sum p (x - m) */
} fasttune_log_prob_args;
const char* fasttune_cuda_log_prob(const fasttune_log_prob_args*, void* stream);

typedef struct {
  int dtype;
  int64_t rows, classes;
  void* logits; /* (rows, classes), replaced by their gradient times gain / scale, over the divisor */
  int64_t logits_stride;
  const float* bias;
  float scale, gain;
  const int64_t* ids;
  int64_t ignore_index;
  const float* statistics; /* (rows, 3) */
  const float* dlog_prob;  /* upstream gradients (rows,), each null for zeros */
  const float* dlogsumexp;
  const float* dentropy;
  const float* dmean_logit;
  const float* divisor; /* (1,) of the upstream gradients, or null */
} fasttune_log_prob_backward_args;
const char* fasttune_cuda_log_prob_backward(const fasttune_log_prob_backward_args*, void* stream);

/* Rotary position embedding of x (B, S, N, H, D): B sequences of S rows, N parts of H heads. */
typedef struct {
  int dtype, table_dtype; /* table_dtype: dtype or float32 */
  const void* x;          /* the last stride is 1, the others below */
  void* out;              /* (B, S, N, H, D), contiguous; nothing of x */
  const void *cos, *sin;  /* (P, W) */
  const int64_t* row_ids; /* (B S,) row of the tables; or null: row t takes t mod P; outside [0, P): NaN */
  int64_t batch, sequence, parts, heads, head_dim;
  int64_t batch_stride, row_stride, part_stride, head_stride;
  int64_t table_rows, width; /* P, W; W is even, from 2 to D */
  int64_t rotated;           /* the parts that are turned; the others are copied */
  int inverse;               /* the transposed map: the gradient */
} fasttune_rotary_args;
const char* fasttune_cuda_rotary(const fasttune_rotary_args*, void* stream);

/* A tensor (N, rows, H, D), or (rows, H, D) when packed, whose D is contiguous; strides in elements. */
typedef struct {
  void* data;
  int64_t sequence, row, head;
} fasttune_head_rows;

typedef struct {
  int dtype;
  int64_t sequences, queries, keys, heads,
      head_dim;        /* packed: all rows of query, of key; head_dim 16 to 128 */
  const void* offsets; /* packed: (N + 1,) first row of each sequence; or null */
  /* Packed, with queries of some positions only: (N + 1,) first query of each sequence, and each query's
   * position in its sequence, never falling; or both null. */
  const void* query_offsets;
  const int32_t* positions; /* (queries,) */
  int offsets_are_64_bit;   /* both offsets */
  int causal;               /* query i sees keys j <= i + K - Q, or j <= positions[i] */
  int window;  /* and those alone that are at most so far from there, below 2 ** 30; -1 for any */
  float scale; /* of the scores */
  fasttune_dropout_options dropout;
  fasttune_head_rows query, key, value, out;
  float*
      lse; /* log-sum-exp of the scores to base 2: dense (N, H, Q), packed (H, rows); inf: no key was seen */
  /* Terms of the scores, or null, by the distance of key and query, clamped to what their tables have. */
  const float* bias; /* (H, 2 bias_furthest + 1), added to the scaled scores */
  int bias_furthest, buckets_furthest;
  const int32_t* buckets; /* (2 buckets_furthest + 1,), with c2p or p2c */
  fasttune_head_rows c2p,
      p2c; /* like query and like key, with a number for each bucket in place of head_dim */
  /* Backward alone; a null gradient is not computed. */
  fasttune_head_rows dout, dquery, dkey, dvalue;
  float* delta;                  /* like lse, scratch */
  float* dbias;                  /* like bias */
  float* dbias_partial;          /* (partials, H, 2 bias_furthest + 1), scratch */
  int64_t partials;              /* at least 1, for any number the result is right */
  fasttune_head_rows dc2p, dp2c; /* zeros at the start */
} fasttune_attention_args;
const char* fasttune_cuda_attention_forward(const fasttune_attention_args*, void* stream);
const char* fasttune_cuda_attention_backward(const fasttune_attention_args*, void* stream);

/* Dynamic shared memory of the attention kernels (forward, backward, the terms' gradients) in bytes, or -1
 * for arguments that they do not take. */
int64_t fasttune_cuda_attention_shared_bytes(int dtype, int64_t head_dim, int kernel, int terms);

/* Why kernels cannot run on the current device, as a sentence part, or null. Needs no GPU to be called. */
const char* fasttune_cuda_problem(void);

#ifdef __cplusplus
}
#endif
