// Eight bf16 as one 16-byte access, and sums over a block.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

namespace granite {

// Element 2 i is the low half of word i.
struct alignas(16) Bf16x8 {
  uint32_t words[4];
};

// The two elements of a word. bf16 is the upper half of f32.
__device__ __forceinline__ float2 unpack(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

// Rounds two f32 to nearest even, `low` into the low half: one instruction from sm_80 on.
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return static_cast<uint32_t>(__bfloat16_as_ushort(pair.x)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}

// Eight elements, of which `valid` count; the others are not read and +0. Vectorised: all eight or none are read.
template <bool kVectorised>
__device__ __forceinline__ Bf16x8 load8(const __nv_bfloat16* from, uint32_t valid) {
  Bf16x8 x = {{0, 0, 0, 0}};
  if constexpr (kVectorised) {
    if (valid != 0) x = *reinterpret_cast<const Bf16x8*>(from);
  } else {
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      if (i < valid) x.words[i / 2] |= static_cast<uint32_t>(__bfloat16_as_ushort(from[i])) << 16 * (i % 2);
    }
  }
  return x;
}

// Writes those of eight elements that count, vectorised all eight or none.
template <bool kVectorised>
__device__ __forceinline__ void store8(__nv_bfloat16* to, const Bf16x8& x, uint32_t valid) {
  if constexpr (kVectorised) {
    if (valid != 0) *reinterpret_cast<Bf16x8*>(to) = x;
  } else {
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      if (i < valid) to[i] = __ushort_as_bfloat16(static_cast<uint16_t>(x.words[i / 2] >> 16 * (i % 2)));
    }
  }
}

// How many of the eight elements from `first` on lie below `columns`.
__device__ __forceinline__ uint32_t valid8(uint32_t first, uint32_t columns) {
  return first >= columns ? 0 : min(8u, columns - first);
}

constexpr uint32_t kAllLanes = 0xffffffffu;

// The sum over all lanes of a warp, the same bits in each.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// The sum over all threads of a block of whole warps, in an order that only the block's size decides. May be called
// once in a kernel: nothing waits until the last thread has read the partial sums.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float partial[32];
  const uint32_t lane = threadIdx.x % 32;
  value = warp_sum(value);
  if (lane == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(lane < blockDim.x / 32 ? partial[lane] : 0.0f);
}

}  // namespace granite
