// Gradients of attention_forward.cu. With P = exp2(s - lse) recomputed, M the dropout mask times its scale
// and δ_i = Σ_d dO_id O_id:
//
//   dV = (P M)ᵀ dO     dP = (dO Vᵀ) M     dS = P (dP - δ)     dQ = scale dS K     dK = scale dSᵀ Q
//
// since Σ_k P_ik dP_ik = dO_i · O_i. dQ comes from one kernel, dK and dV from another, so that every element
// has one writer: no atomics, the same bits every time. The dK, dV kernel works on transposed tiles, keys by
// queries, whose P and dS are then first operands of its products and stay in registers.
//
// Bytes: q, k, v, dO, lse and δ once for each tile of the other axis, most of it from L2; each gradient once.
// Operations: 10 Q K D a head (14 with what both kernels recompute), half of it if causal. Matrix
// instructions are the bound. Registers decide the tiles: two accumulators of 16 x D per warp in the dK, dV
// kernel.
#include "cuda/attention.cuh"
#include "cuda/reduce.cuh"

namespace fasttune::cuda {
namespace {

// --------------------------------------------------------------------------------------------------------- δ

constexpr int kDeltaWarps = 8;

// One warp per query and head.
template <class T>
__global__ void __launch_bounds__(kDeltaWarps* kWarp)
    attention_delta_kernel(const fasttune_attention_args args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kDeltaWarps + warp_index();  // in lse and delta
  if (index >= (args.offsets ? 1 : args.sequences) * args.heads * args.queries) return;
  const int64_t row = index % args.queries, head = index / args.queries % args.heads;
  const int64_t sequence = index / args.queries / args.heads;
  const auto at = [&](const fasttune_head_rows& rows) {
    return static_cast<const T*>(rows.data) + sequence * rows.sequence + row * rows.row + head * rows.head;
  };
  const T *out = at(args.out), *dout = at(args.dout);
  float delta = 0.0f;
  for (int64_t d = lane_index(); d < args.head_dim; d += kWarp)
    delta = fmaf(to_float(out[d]), to_float(dout[d]), delta);
  delta = warp_sum(delta);
  if (lane_index() == 0) args.delta[index] = delta;
}

// -------------------------------------------------------------------------------------------------------- dQ

// float32: two blocks, as below.
template <class P, class T, bool kDropout>
__global__ void __launch_bounds__(P::kThreads, P::kIsFloat ? 2 : 0)
    attention_dq_kernel(const fasttune_attention_args args, int64_t tiles, bool vectors, bool out_vectors) {
  FASTTUNE_DYNAMIC_SHARED(shared);
  T* q_tile = reinterpret_cast<T*>(shared);
  T* do_tile = q_tile + P::kOwned;
  T* k_tiles = do_tile + P::kOwned;
  T* v_tiles = k_tiles + P::kStages * P::kStreamed;
  T* scratch = v_tiles + P::kStages * P::kStreamed + warp_index() * P::kScratch;

  const Place at = locate(args, P::kRows, tiles, false, blockIdx.x);
  if (at.tile < 0) return;
  const int head_dim = static_cast<int>(args.head_dim), keys = at.keys, queries = at.queries;
  const int first_query = (divide_up(queries, P::kRows) - 1 - at.tile) * P::kRows;
  const KeyRange seen = keys_seen(args, at, first_query, P::kRows);
  const int offset = place_offset(at), first_step = seen.first / P::kSteps,
            steps = divide_up(seen.last, P::kSteps);
  const T* k_head = key_rows<T>(args.key, args, at);
  const T* v_head = key_rows<T>(args.value, args, at);

  const auto stream = [&](int step) {
    const int stage = step % P::kStages, first = step * P::kSteps;
    load_tile<P, P::kSteps>(k_tiles + stage * P::kStreamed, k_head, args.key.row, first, keys, head_dim,
                            vectors);
    load_tile<P, P::kSteps>(v_tiles + stage * P::kStreamed, v_head, args.value.row, first, keys, head_dim,
                            vectors);
    cp_async_commit();
  };
  load_tile<P, P::kRows>(q_tile, query_rows<T>(args.query, args, at), args.query.row, first_query, queries,
                         head_dim, vectors);
  load_tile<P, P::kRows>(do_tile, query_rows<T>(args.dout, args, at), args.dout.row, first_query, queries,
                         head_dim, vectors);
  if (first_step < steps) stream(first_step);

  const int g = lane_index() / 4, t = lane_index() % 4, warp_query = first_query + 16 * warp_index();
  const int position[2] = {at.position(warp_query + g), at.position(warp_query + g + 8)};
  T* q_rows = q_tile + 16 * warp_index() * P::kPitch;
  const T* do_rows = do_tile + 16 * warp_index() * P::kPitch;
  const float scale = args.scale * kLog2e;
  float lse[2], delta[2];
  FASTTUNE_UNROLL
  for (int row = 0; row < 2; ++row) {
    const int query = warp_query + g + 8 * row;
    lse[row] = query < queries ? args.lse[at.statistics + query] : INFINITY;
    delta[row] = query < queries ? args.delta[at.statistics + query] : 0.0f;
  }
  float acc[P::kDim / 8][4];
  clear(acc);
  DropoutKey dropout = {};
  DroppedKeys dropped = {};
  if constexpr (kDropout) dropout = dropout_key(args.dropout);

  if (first_step >= steps) {  // q and dO are still under way, and their place is about to be written
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
  for (int step = first_step; step < steps; ++step) {
    const int first_key = step * P::kSteps, stage = step % P::kStages;
    if (P::kStages == 2 && step + 1 < steps) {
      stream(step + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    if constexpr (kDropout)
      if (first_key % kDropoutBlock == 0 || step == first_step)
        dropped.draw(dropout, first_key, position, head_number(args, at));

    float s[P::kSteps / 8][4], dp[P::kSteps / 8][4];
    clear(s);
    clear(dp);
    multiply_transposed<P>(s, q_rows, k_tiles + stage * P::kStreamed, head_dim);
    multiply_transposed<P>(dp, do_rows, v_tiles + stage * P::kStreamed, head_dim);
    const bool masked = first_key + P::kSteps > seen.full || first_key < seen.inner;
    FASTTUNE_UNROLL
    for (int j = 0; j < P::kSteps / 8; ++j) {
      FASTTUNE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + 8 * j + 2 * t + i % 2;
        float p;
        if constexpr (P::kTerms)
          p = exp2f(Terms<T>(args, at).score(args, at, s[j][i], position[i / 2] + offset,
                                             warp_query + g + i / 2 * 8, key) -
                    lse[i / 2]);
        else
          p = exp2f(fmaf(s[j][i], scale, -lse[i / 2]));
        if (masked) {
          if (key >= keys || hidden(args, position[i / 2] + offset, key)) p = 0.0f;
        }
        if constexpr (kDropout) dp[j][i] = dropped(first_key, j, i) ? 0.0f : dp[j][i] * dropout.scale;
        s[j][i] = p * (dp[j][i] - delta[i / 2]);
      }
    }
    multiply<P>(acc, s, k_tiles + stage * P::kStreamed, head_dim, scratch);
    __syncthreads();  // before the tile is overwritten
    if (P::kStages == 1 && step + 1 < steps) stream(step + 1);
  }
  const float factor[2] = {args.scale, args.scale};
  store_rows<P>(q_rows, acc, factor, query_rows<T>(args.dquery, args, at), args.dquery.row, warp_query,
                queries, head_dim, out_vectors);
}

// ---------------------------------------------------------------------------------------------------- dK, dV

// Two blocks on a multiprocessor: left to itself the assembler aims at three on some architectures, and
// spills.
template <class P, class T, bool kDropout>
__global__ void __launch_bounds__(P::kThreads, 2)
    attention_dkdv_kernel(const fasttune_attention_args args, int64_t tiles, bool vectors, bool out_vectors) {
  FASTTUNE_DYNAMIC_SHARED(shared);
  // Of each streamed query: lse, δ, its position, and which of its weights are dropped, a byte for each
  // column modulo 16 (philox.cuh).
  FASTTUNE_SHARED(float, lse_tiles, P::kStages* P::kSteps);
  FASTTUNE_SHARED(float, delta_tiles, P::kStages* P::kSteps);
  FASTTUNE_SHARED(int, position_tiles, P::kStages* P::kSteps);
  FASTTUNE_SHARED(unsigned char, dropped_tile, kDropout ? P::kSteps * 16 : 1);
  T* k_tile = reinterpret_cast<T*>(shared);
  T* v_tile = k_tile + P::kOwned;
  T* q_tiles = v_tile + P::kOwned;
  T* do_tiles = q_tiles + P::kStages * P::kStreamed;
  T* scratch = do_tiles + P::kStages * P::kStreamed + warp_index() * P::kScratch;

  const Place at = locate(args, P::kRows, tiles, true, blockIdx.x);
  if (at.tile < 0) return;
  const int head_dim = static_cast<int>(args.head_dim), keys = at.keys, queries = at.queries;
  const int first_key = at.tile * P::kRows, offset = place_offset(at);
  const T* q_head = query_rows<T>(args.query, args, at);
  const T* do_head = query_rows<T>(args.dout, args, at);
  const Steps seeing = queries_seeing(args, at, first_key, P::kRows, P::kSteps);
  const int first_step = seeing.first, steps = seeing.last;

  const auto stream = [&](int step) {
    const int stage = step % P::kStages, first = step * P::kSteps;
    load_tile<P, P::kSteps>(q_tiles + stage * P::kStreamed, q_head, args.query.row, first, queries, head_dim,
                            vectors);
    load_tile<P, P::kSteps>(do_tiles + stage * P::kStreamed, do_head, args.dout.row, first, queries, head_dim,
                            vectors);
    cp_async_commit();
    for (int i = static_cast<int>(threadIdx.x); i < P::kSteps; i += P::kThreads) {
      const bool valid = first + i < queries;
      lse_tiles[stage * P::kSteps + i] = valid ? args.lse[at.statistics + first + i] : INFINITY;
      delta_tiles[stage * P::kSteps + i] = valid ? args.delta[at.statistics + first + i] : 0.0f;
      position_tiles[stage * P::kSteps + i] = at.position(first + i);
    }
  };
  load_tile<P, P::kRows>(k_tile, key_rows<T>(args.key, args, at), args.key.row, first_key, keys, head_dim,
                         vectors);
  load_tile<P, P::kRows>(v_tile, key_rows<T>(args.value, args, at), args.value.row, first_key, keys, head_dim,
                         vectors);
  if (first_step < steps) stream(first_step);

  const int g = lane_index() / 4, t = lane_index() % 4, warp_key = first_key + 16 * warp_index();
  T* k_rows = k_tile + 16 * warp_index() * P::kPitch;
  T* v_rows = v_tile + 16 * warp_index() * P::kPitch;
  const float scale = args.scale * kLog2e;
  float dk[P::kDim / 8][4], dv[P::kDim / 8][4];
  clear(dk);
  clear(dv);
  DropoutKey dropout = {};
  if constexpr (kDropout) dropout = dropout_key(args.dropout);

  if (first_step >= steps) {  // k and v are still under way, and their place is about to be written
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
  for (int step = first_step; step < steps; ++step) {
    const int first_query = step * P::kSteps, stage = step % P::kStages;
    const bool more = step + 1 < steps;
    if (P::kStages == 2 && more) stream(step + 1);
    if constexpr (kDropout)
      for (int i = static_cast<int>(threadIdx.x); i < P::kSteps * 16; i += P::kThreads)
        dropped_tile[i] = static_cast<unsigned char>(
            dropped_bits(dropout, static_cast<uint32_t>(first_key / kDropoutBlock * 16 + i % 16),
                         static_cast<uint32_t>(at.position(first_query + i / 16)), head_number(args, at),
                         kAttentionDomain));
    if (P::kStages == 2 && more)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    __syncthreads();

    const T* q_rows = q_tiles + stage * P::kStreamed;
    const T* do_rows = do_tiles + stage * P::kStreamed;
    const float* lse = lse_tiles + stage * P::kSteps;
    const float* delta = delta_tiles + stage * P::kSteps;
    const int* position = position_tiles + stage * P::kSteps;
    const int sixteen = warp_key % kDropoutBlock / 16;
    const auto dropped = [&](int j, int i) {
      return (dropped_tile[(8 * j + 2 * t + i % 2) * 16 + g + i / 2 * 8] >> sixteen) & 1;
    };
    float p[P::kSteps / 8][4];
    clear(p);
    multiply_transposed<P>(p, k_rows, q_rows, head_dim);
    const int last = min(P::kSteps, queries - first_query) - 1;  // positions rise
    const bool masked = hidden(args, position[0] + offset, first_key + P::kRows - 1) ||
                        hidden(args, position[last] + offset, first_key);
    FASTTUNE_UNROLL
    for (int j = 0; j < P::kSteps / 8; ++j) {
      FASTTUNE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * j + 2 * t + i % 2, key = warp_key + g + i / 2 * 8;
        if constexpr (P::kTerms)
          p[j][i] = exp2f(Terms<T>(args, at).score(args, at, p[j][i], position[column] + offset,
                                                   first_query + column, key) -
                          lse[column]);
        else
          p[j][i] = exp2f(fmaf(p[j][i], scale, -lse[column]));
        if (masked && hidden(args, position[column] + offset, key)) p[j][i] = 0.0f;
      }
    }
    if constexpr (kDropout) {
      float kept[P::kSteps / 8][4];
      FASTTUNE_UNROLL
      for (int j = 0; j < P::kSteps / 8; ++j) {
        FASTTUNE_UNROLL
        for (int i = 0; i < 4; ++i) kept[j][i] = dropped(j, i) ? 0.0f : p[j][i];
      }
      multiply<P>(dv, kept, do_rows, head_dim, scratch);
    } else {
      multiply<P>(dv, p, do_rows, head_dim, scratch);
    }
    float ds[P::kSteps / 8][4];
    clear(ds);
    multiply_transposed<P>(ds, v_rows, do_rows, head_dim);
    FASTTUNE_UNROLL
    for (int j = 0; j < P::kSteps / 8; ++j) {
      FASTTUNE_UNROLL
      for (int i = 0; i < 4; ++i) {
        if constexpr (kDropout) ds[j][i] = dropped(j, i) ? 0.0f : ds[j][i] * dropout.scale;
        ds[j][i] = p[j][i] * (ds[j][i] - delta[8 * j + 2 * t + i % 2]);
      }
    }
    multiply<P>(dk, ds, q_rows, head_dim, scratch);
    __syncthreads();  // before the tiles are overwritten
    if (P::kStages == 1 && more) stream(step + 1);
  }
  const float scales[2] = {args.scale, args.scale};
  const float kept = kDropout ? dropout.scale : 1.0f, keeps[2] = {kept, kept};
  if (args.dkey.data)
    store_rows<P>(k_rows, dk, scales, key_rows<T>(args.dkey, args, at), args.dkey.row, warp_key, keys,
                  head_dim, out_vectors);
  if (args.dvalue.data)
    store_rows<P>(v_rows, dv, keeps, key_rows<T>(args.dvalue, args, at), args.dvalue.row, warp_key, keys,
                  head_dim, out_vectors);
}

}  // namespace
}  // namespace fasttune::cuda

extern "C" const char* fasttune_cuda_attention_backward(const fasttune_attention_args* args, void* stream) {
  using namespace fasttune::cuda;
  return with_tiles(
      args->dtype, args->head_dim, has_terms(*args), [&](auto shape, auto element) -> const char* {
        using P = decltype(shape);
        using T = decltype(element);
        // float32 and terms have one variant, which may drop nothing: they would take as long to compile as
        // all others.
        constexpr bool kEither = P::kIsFloat || P::kTerms;
        const bool with_dropout = kEither || args->dropout.seed;
        const auto fits = [&](const fasttune_head_rows& rows) {
          return !rows.data || in_vectors(rows, args->head_dim, sizeof(T));
        };
        const bool vectors = fits(args->query) && fits(args->key) && fits(args->value) && fits(args->dout);
        const bool out_vectors = fits(args->dquery) && fits(args->dkey) && fits(args->dvalue);
        const size_t shared = shared_bytes<P, T>(true);
        const int64_t rows = (args->offsets ? 1 : args->sequences) * args->heads * args->queries;
        const char* problem = launch(attention_delta_kernel<T>, divide_up<int64_t>(rows, kDeltaWarps),
                                     kDeltaWarps * kWarp, 0, stream, *args);
        if (!problem && args->dquery.data) {
          const int64_t tiles = tiles_of(*args, args->queries, P::kRows);
          const auto kernel =
              with_dropout ? attention_dq_kernel<P, T, true> : attention_dq_kernel<P, T, kEither>;
          problem = launch(kernel, blocks_of(*args, tiles), P::kThreads, shared, stream, *args, tiles,
                           vectors, out_vectors);
        }
        if (!problem && (args->dkey.data || args->dvalue.data)) {
          const int64_t tiles = tiles_of(*args, args->keys, P::kRows);
          const auto kernel =
              with_dropout ? attention_dkdv_kernel<P, T, true> : attention_dkdv_kernel<P, T, kEither>;
          problem = launch(kernel, blocks_of(*args, tiles), P::kThreads, shared, stream, *args, tiles,
                           vectors, out_vectors);
        }
        return problem ? problem : attention_terms_backward(*args, stream);
      });
}
