// Philox4x32: random bits as a function of a counter and a key.
// Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC11, section 3.3.
// The twin, with the authors' known answers as its test, is src/kernels/philox.rs.
#pragma once
#include <cstdint>

namespace granite {

// Rounds used for dropout; must equal ROUNDS of the twin.
constexpr int kPhiloxRounds = 7;

// Four words for one counter. kRounds is a constant, so that the loop unrolls and the key schedule folds.
template <int kRounds>
__device__ __forceinline__ uint4 philox4x32(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * counter.x;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * counter.z;
    counter = make_uint4(static_cast<uint32_t>(p1 >> 32) ^ counter.y ^ key.x, static_cast<uint32_t>(p1),
                         static_cast<uint32_t>(p0 >> 32) ^ counter.w ^ key.y, static_cast<uint32_t>(p0));
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

// The same with the keys of all rounds at hand: as a kernel's argument they cost no instruction.
template <int kRounds>
__device__ __forceinline__ uint4 philox4x32_scheduled(uint4 counter, const uint2 (&keys)[kRounds]) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * counter.x;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * counter.z;
    counter = make_uint4(static_cast<uint32_t>(p1 >> 32) ^ counter.y ^ keys[round].x, static_cast<uint32_t>(p1),
                         static_cast<uint32_t>(p0 >> 32) ^ counter.w ^ keys[round].y, static_cast<uint32_t>(p0));
  }
  return counter;
}

}  // namespace granite
