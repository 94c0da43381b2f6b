// Rotary position embedding in place, in the half-split layout: element i of a head turns with element i + half.
//
//   x[i]        <- round(x[i] * cos[i] - x[i + half] * sin[i])
//   x[i + half] <- round(x[i + half] * cos[i] + x[i] * sin[i])        backward: sin negated
//
// Operands
//   x         [tokens, heads, 2 * half] bf16; heads side by side, any distance (in elements) from a token to the next:
//             the query and key heads of packed rows [q | k | v] are one such view
//   cos, sin  [tokens, half] f32, contiguous
//   All arithmetic is in f32, rounded once to nearest even.
//
// Launch   grid tokens, block 128, no shared memory
//   rope_4 (half 32) and rope_8 (half 64): x aligned to 16 bytes, token stride a multiple of 8. Thread t owns vector
//   t % C of both halves (C = half / 8) of heads t / C, t / C + 128 / C, ...; its 8 cosines and sines stay in
//   registers, and the vectors of 2 or 3 heads are in flight at once: Granite's 40 query and key heads in one turn.
//   rope_any: any half and any address, a pair of elements at a time.
//
// Cost     4 bytes an element of x, read and written once, and 8 * half bytes a token of cosines and sines, which the
//   heads share (5 % at 40 heads). Bound by memory.
//
// Twin     RotaryAngles in src/kernels/rope.rs, whose angles are in the activations' dtype.
#include "bf16x8.cuh"

namespace {

using granite::Bf16x8;

struct RopeParams {
  __nv_bfloat16* x;
  const float* cos;
  const float* sin;
  uint64_t token_stride;
  uint32_t heads;
  uint32_t half;
  float sign;  // 1 forward, -1 backward
  uint32_t reserved;
};
static_assert(sizeof(RopeParams) == 48, "src/kernels/rope.rs asserts the same size");

constexpr uint32_t kThreads = 128;

struct Angles {
  float cos[8];
  float sin[8];
};

__device__ __forceinline__ void load_f32x8(float (&to)[8], const float* from) {
  const float4 low = __ldg(reinterpret_cast<const float4*>(from));
  const float4 high = __ldg(reinterpret_cast<const float4*>(from) + 1);
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
  to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

// Turns eight pairs.
__device__ __forceinline__ void rotate(Bf16x8& first, Bf16x8& second, const Angles& angles) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = granite::unpack(first.words[i]);
    const float2 b = granite::unpack(second.words[i]);
    const float c0 = angles.cos[2 * i], c1 = angles.cos[2 * i + 1];
    const float s0 = angles.sin[2 * i], s1 = angles.sin[2 * i + 1];
    first.words[i] = granite::pack(fmaf(a.x, c0, -(b.x * s0)), fmaf(a.y, c1, -(b.y * s1)));
    second.words[i] = granite::pack(fmaf(b.x, c0, a.x * s0), fmaf(b.y, c1, a.y * s1));
  }
}

// kVectors of a half head, kHeads of them in flight a thread.
template <uint32_t kVectors, uint32_t kHeads>
__device__ __forceinline__ void rope(const RopeParams& p) {
  constexpr uint32_t kHalf = 8 * kVectors;
  constexpr uint32_t kStep = kThreads / kVectors;  // heads that the block turns side by side
  const uint64_t token = blockIdx.x;
  const uint32_t vector = threadIdx.x % kVectors;

  Angles angles;
  load_f32x8(angles.cos, p.cos + token * kHalf + 8 * vector);
  load_f32x8(angles.sin, p.sin + token * kHalf + 8 * vector);
#pragma unroll
  for (int i = 0; i < 8; ++i) angles.sin[i] *= p.sign;

  __nv_bfloat16* row = p.x + token * p.token_stride + 8 * vector;
  for (uint32_t begin = threadIdx.x / kVectors; begin < p.heads; begin += kHeads * kStep) {
    Bf16x8 first[kHeads], second[kHeads];
#pragma unroll
    for (uint32_t i = 0; i < kHeads; ++i) {
      const uint32_t head = begin + i * kStep;
      if (head < p.heads) {
        const __nv_bfloat16* at = row + static_cast<uint64_t>(head) * (2 * kHalf);
        first[i] = *reinterpret_cast<const Bf16x8*>(at);
        second[i] = *reinterpret_cast<const Bf16x8*>(at + kHalf);
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kHeads; ++i) {
      const uint32_t head = begin + i * kStep;
      if (head < p.heads) {
        rotate(first[i], second[i], angles);
        __nv_bfloat16* at = row + static_cast<uint64_t>(head) * (2 * kHalf);
        *reinterpret_cast<Bf16x8*>(at) = first[i];
        *reinterpret_cast<Bf16x8*>(at + kHalf) = second[i];
      }
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) rope_4(const __grid_constant__ RopeParams p) { rope<4, 2>(p); }

extern "C" __global__ void __launch_bounds__(kThreads) rope_8(const __grid_constant__ RopeParams p) { rope<8, 3>(p); }

extern "C" __global__ void __launch_bounds__(kThreads) rope_any(const __grid_constant__ RopeParams p) {
  const uint64_t token = blockIdx.x;
  __nv_bfloat16* row = p.x + token * p.token_stride;
  for (uint64_t pair = threadIdx.x; pair < static_cast<uint64_t>(p.heads) * p.half; pair += kThreads) {
    const uint64_t head = pair / p.half;
    const uint64_t i = pair % p.half;
    const float cos = p.cos[token * p.half + i];
    const float sin = p.sin[token * p.half + i] * p.sign;
    __nv_bfloat16* at = row + head * 2 * p.half + i;
    const float a = __bfloat162float(at[0]);
    const float b = __bfloat162float(at[p.half]);
    at[0] = __float2bfloat16_rn(fmaf(a, cos, -(b * sin)));
    at[p.half] = __float2bfloat16_rn(fmaf(b, cos, a * sin));
  }
}
