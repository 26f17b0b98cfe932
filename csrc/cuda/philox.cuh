// The shared dropout generator (docs/dropout.md) on the device, bit for bit the C++ and the reference.
//
// A counter gives eight 16-bit uniforms, for the eight columns 16 apart of a block of 128 whose number modulo
// 16 is the counter's. Their decisions are a byte: bit k for column 128 * block + 16 * k + counter % 16.
// Philox costs about 90 integer operations, so 11 per element, as long as all eight bits of a byte are used.
#pragma once
#include "cuda/device.cuh"

namespace fasttune::cuda {

constexpr uint32_t kElementwiseDomain = 0;
constexpr uint32_t kAttentionDomain = 1;
constexpr int kDropoutBlock = 128;

struct DropoutKey {
  uint32_t key0, key1, threshold;
  float scale;
};

__device__ __forceinline__ DropoutKey dropout_key(const fasttune_dropout_options& options) {
  if (!options.seed) return {0, 0, 0, 1.0f};  // drops nothing
  const uint64_t seed = static_cast<uint64_t>(*options.seed);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), options.threshold, options.scale};
}

// Bit k: is column 128 * (counter / 16) + 16 * k + counter % 16 at (c1, c2, domain) dropped?
__device__ __forceinline__ uint32_t dropped_bits(const DropoutKey& dropout, uint32_t counter, uint32_t c1,
                                                 uint32_t c2, uint32_t domain) {
  if (dropout.threshold == 0) return 0;
  uint32_t x0 = counter, x1 = c1, x2 = c2, x3 = domain, key0 = dropout.key0, key1 = dropout.key1;
  FASTTUNE_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * x0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * x2;
    x0 = static_cast<uint32_t>(product1 >> 32) ^ x1 ^ key0;
    x1 = static_cast<uint32_t>(product1);
    x2 = static_cast<uint32_t>(product0 >> 32) ^ x3 ^ key1;
    x3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const uint32_t words[4] = {x0, x1, x2, x3};
  uint32_t bits = 0;
  FASTTUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    bits |= static_cast<uint32_t>((words[i] & 0xffffu) < dropout.threshold) << (2 * i);
    bits |= static_cast<uint32_t>((words[i] >> 16) < dropout.threshold) << (2 * i + 1);
  }
  return bits;
}

// Elementwise dropout of the 256 columns from `first` (a multiple of 256) on that a warp holds, eight
// consecutive ones per lane: bit k says whether column first + 8 * lane + k of that row is dropped. All lanes
// of the warp call it.
//
// Each lane evaluates one counter, whose eight columns belong to eight lanes; eight ballots hand the bits
// round: ballot k holds columns 16 * k to 16 * k + 15 of two blocks of 128, in its lower and upper half.
__device__ __forceinline__ uint32_t dropped_columns(const DropoutKey& dropout, uint64_t row, int64_t first) {
  const int lane = lane_index();
  const uint32_t bits =
      dropped_bits(dropout, static_cast<uint32_t>(first / 8) + lane, static_cast<uint32_t>(row),
                   static_cast<uint32_t>(row >> 32), kElementwiseDomain);
  uint32_t mine = 0;
  FASTTUNE_UNROLL
  for (int k = 0; k < 8; ++k) {
    const uint32_t ballot = __ballot_sync(kFullWarp, (bits >> k) & 1u);
    if (k == lane % 16 / 2) mine = ballot;
  }
  return (mine >> (16 * (lane / 16) + 8 * (lane % 2))) & 0xffu;
}

}  // namespace fasttune::cuda
