// Sums within a warp and within a group of warps, in a fixed order.
#pragma once
#include "cuda/device.cuh"

namespace fasttune::cuda {

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }

__device__ __forceinline__ float warp_sum(float value) {
  FASTTUNE_UNROLL
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

__device__ __forceinline__ float2 warp_sum(float2 value) {
  return make_float2(warp_sum(value.x), warp_sum(value.y));
}

// The sum over `warps` consecutive warps, group * warps to (group + 1) * warps - 1, for every thread of them.
// All threads of the block call it with one `warps`. scratch: one element per warp of the block.
__device__ __forceinline__ float2 group_sum(float2 value, int group, int warps, float2* scratch) {
  value = warp_sum(value);
  if (warps == 1) return value;
  if (!FASTTUNE_SEEDED(kBugMissingSync)) __syncthreads();  // the last call's sums have been read
  if (lane_index() == 0) scratch[warp_index()] = value;
  if (!FASTTUNE_SEEDED(kBugUnorderedReduction)) __syncthreads();
  float2 total = make_float2(0.0f, 0.0f);
  for (int i = 0; i < warps; ++i) total = total + scratch[group * warps + i];
  return total;
}

}  // namespace fasttune::cuda
