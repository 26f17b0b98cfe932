// softmax(scale Q Kᵀ) V for each sequence and head, dense (N, Q, H, D) or packed (T, H, D) with offsets.
//
// Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022): a block owns 64 queries of a head (float32:
// 32) and walks over the keys in tiles. Each warp keeps the running maximum m and sum l of its 16 queries and
// the unscaled result in registers; lse = m + log2 l is kept for backward, to base 2, as exp2 wants it. A
// query that sees no key has l = 0: it gives 0, and lse = inf makes its weights 0 in backward.
//
// Bytes: q, out and lse once, k and v once for each block of queries, most of it from L2. Operations: 4 Q K D
// a head, half of it if causal: tiles above the diagonal and outside a window are never touched, and those
// that neither crosses carry no mask.
// Matrix instructions are the bound. Causal blocks run longest first.
#include "cuda/attention.cuh"

namespace fasttune::cuda {
namespace {

// Blocks for which registers are left. Below sm_90 shared memory has room for three (sm_80) or two: left to
// itself the assembler aims at four on sm_86 and sm_89, and spills. They are built from sm_80's code. float32
// with terms: two, as in backward.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kPlainBlocks = 3;
#else
constexpr int kPlainBlocks = 0;  // the assembler's choice
#endif
template <class P>
constexpr int kBlocks = P::kIsFloat && P::kTerms ? 2 : kPlainBlocks;

template <class P, class T, bool kDropout>
__global__ void __launch_bounds__(P::kThreads, kBlocks<P>)
    attention_forward_kernel(const fasttune_attention_args args, int64_t tiles, bool vectors,
                             bool out_vectors) {
  FASTTUNE_DYNAMIC_SHARED(shared);
  T* q_tile = reinterpret_cast<T*>(shared);
  T* k_tiles = q_tile + P::kOwned;
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
  if (first_step < steps) stream(first_step);

  const int g = lane_index() / 4, t = lane_index() % 4, warp_query = first_query + 16 * warp_index();
  const int position[2] = {at.position(warp_query + g), at.position(warp_query + g + 8)};
  T* q_rows = q_tile + 16 * warp_index() * P::kPitch;
  const float scale = args.scale * kLog2e;
  float acc[P::kDim / 8][4], m[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  clear(acc);
  DropoutKey dropout = {};
  DroppedKeys dropped = {};
  if constexpr (kDropout) dropout = dropout_key(args.dropout);

  if (first_step >= steps) {  // the copy of q is still under way, and its place is about to be written
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
  for (int step = first_step; step < steps; ++step) {
    const int first_key = step * P::kSteps, stage = step % P::kStages;
    if (P::kStages == 2 && step + 1 < steps) {
      stream(step + 1);
      if (!FASTTUNE_SEEDED(kBugMissingWait)) cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    if (!FASTTUNE_SEEDED(kBugMissingTileSync)) __syncthreads();
    if constexpr (kDropout)
      if (first_key % kDropoutBlock == 0 || step == first_step)
        dropped.draw(dropout, first_key, position, head_number(args, at));

    float s[P::kSteps / 8][4];
    clear(s);
    multiply_transposed<P>(s, q_rows, k_tiles + stage * P::kStreamed, head_dim);
    const bool masked = first_key + P::kSteps > seen.full || first_key < seen.inner;
    FASTTUNE_UNROLL
    for (int j = 0; j < P::kSteps / 8; ++j) {
      FASTTUNE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + 8 * j + 2 * t + i % 2;
        if constexpr (P::kTerms)
          s[j][i] = Terms<T>(args, at).score(args, at, s[j][i], position[i / 2] + offset,
                                             warp_query + g + i / 2 * 8, key);
        else
          s[j][i] *= scale;
        if (masked) {
          if (key >= keys || hidden(args, position[i / 2] + offset, key)) s[j][i] = -INFINITY;
        }
      }
    }
    FASTTUNE_UNROLL
    for (int row = 0; row < 2; ++row) {
      float largest = m[row];
      FASTTUNE_UNROLL
      for (int j = 0; j < P::kSteps / 8; ++j)
        largest = fmaxf(largest, fmaxf(s[j][2 * row], s[j][2 * row + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
      // A row that has seen no key yet has maximum -inf; subtracting 0 instead keeps its weights at 0, not
      // NaN.
      const float shift = largest == -INFINITY ? 0.0f : largest;
      const float rescale = exp2f(m[row] - shift);
      m[row] = largest;
      float sum = 0.0f;
      FASTTUNE_UNROLL
      for (int j = 0; j < P::kSteps / 8; ++j) {
        FASTTUNE_UNROLL
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          s[j][i] = exp2f(s[j][i] - shift);
          sum += s[j][i];
          if constexpr (kDropout)
            if (dropped(first_key, j, i)) s[j][i] = 0.0f;
        }
      }
      total[row] = fmaf(total[row], rescale, sum);  // of this lane's keys; the four lanes of a row share m
      FASTTUNE_UNROLL
      for (int j = 0; j < P::kDim / 8; ++j) {
        acc[j][2 * row] *= rescale;
        acc[j][2 * row + 1] *= rescale;
      }
    }
    multiply<P>(acc, s, v_tiles + stage * P::kStreamed, head_dim, scratch);
    __syncthreads();  // before the tile is overwritten
    if (P::kStages == 1 && step + 1 < steps) stream(step + 1);
  }

  float factor[2];
  FASTTUNE_UNROLL
  for (int row = 0; row < 2; ++row) {
    float sum = total[row];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    factor[row] = sum > 0.0f ? (kDropout ? dropout.scale : 1.0f) / sum : 0.0f;
    if (sum != sum) factor[row] = sum;  // NaN in, NaN out
    const int query = warp_query + g + 8 * row;
    if (t == 0 && query < queries)
      args.lse[at.statistics + query] = sum > 0.0f ? m[row] + log2f(sum) : (sum != sum ? sum : INFINITY);
  }
  store_rows<P>(q_rows, acc, factor, query_rows<T>(args.out, args, at), args.out.row, warp_query, queries,
                head_dim, out_vectors);
}

}  // namespace
}  // namespace fasttune::cuda

extern "C" const char* fasttune_cuda_attention_forward(const fasttune_attention_args* args, void* stream) {
  using namespace fasttune::cuda;
  return with_tiles(
      args->dtype, args->head_dim, has_terms(*args), [&](auto shape, auto element) -> const char* {
        using P = decltype(shape);
        using T = decltype(element);
        // float32 and terms have one variant, which may drop nothing: they would take as long to compile as
        // all others.
        constexpr bool kEither = P::kIsFloat || P::kTerms;
        const bool with_dropout = kEither || args->dropout.seed;
        const int64_t tiles = tiles_of(*args, args->queries, P::kRows);
        const size_t shared = shared_bytes<P, T>(false);
        const bool vectors = in_vectors(args->query, args->head_dim, sizeof(T)) &&
                             in_vectors(args->key, args->head_dim, sizeof(T)) &&
                             in_vectors(args->value, args->head_dim, sizeof(T));
        const bool out_vectors = in_vectors(args->out, args->head_dim, sizeof(T));
        const auto kernel =
            with_dropout ? attention_forward_kernel<P, T, true> : attention_forward_kernel<P, T, kEither>;
        return launch(kernel, blocks_of(*args, tiles), P::kThreads, shared, stream, *args, tiles, vectors,
                      out_vectors);
      });
}

extern "C" int64_t fasttune_cuda_attention_shared_bytes(int dtype, int64_t head_dim, int kernel, int terms) {
  using namespace fasttune::cuda;
  int64_t bytes = -1;
  with_tiles(dtype, head_dim, terms != 0, [&](auto shape, auto element) -> const char* {
    using P = decltype(shape);
    using T = decltype(element);
    bytes = static_cast<int64_t>(kernel == 2 ? terms_shared_bytes<P, T>() : shared_bytes<P, T>(kernel != 0));
    return nullptr;
  });
  return bytes;
}
