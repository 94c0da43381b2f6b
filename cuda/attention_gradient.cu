// Before and after the backward pass of attention: row sums of dO * O, and the queries' gradient from its sums.
//
//   prepare   delta[block, head, row] <- sum over d of dO * O;  lse2 <- lse * log2(e);  0 and +inf where a row does not count
//   finish    dq[token, head, :] <- round(scale * dq_sums[block, head])
//
// Operands   include/attention.cuh. o, d_o, dq [tokens, heads, d] bf16, aligned to 16 bytes, token stride a multiple of 8.
//   delta is a sum in f32 in a fixed order.
//
// Launch     grid (blocks, heads), block 128, no shared memory.
//
// Cost       prepare reads 4 d bytes a row and head, finish reads 4 d and writes 2 d; both bound by memory.
//
// Twin       in attention_backward_reference, src/kernels/attention/reference.rs.
#include "attention.cuh"

namespace {

using namespace granite::attention;
using granite::Bf16x8;

constexpr int kThreads = 128;

template <int kHeadDim>
__device__ __forceinline__ void prepare(const PrepareParams& p) {
  constexpr int kLanes = kHeadDim / 8;  // lanes of a row
  constexpr int kStep = kThreads / kLanes;
  constexpr int kSteps = kBlockRows / kStep;
  const Block block = p.blocks[blockIdx.x];
  const uint64_t head = blockIdx.y;
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;

  Bf16x8 o[kSteps], d_o[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = first + i * kStep;
    const uint32_t counts = row < block.rows ? 8 : 0;
    const uint64_t token = static_cast<uint64_t>(block.token + row), column = head * kHeadDim + 8 * lane;
    o[i] = granite::load8<true>(p.o + token * p.o_stride + column, counts);
    d_o[i] = granite::load8<true>(p.d_o + token * p.d_o_stride + column, counts);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = first + i * kStep;
    float sum = 0.0f;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const float2 a = granite::unpack(o[i].words[word]), b = granite::unpack(d_o[i].words[word]);
      sum = fmaf(a.x, b.x, sum);
      sum = fmaf(a.y, b.y, sum);
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(granite::kAllLanes, sum, distance);
    if (lane == 0) {
      const bool counts = row < block.rows;
      const uint64_t to = (blockIdx.x * static_cast<uint64_t>(p.heads) + head) * kBlockRows + row;
      p.delta[to] = sum;
      p.lse2[to] = counts ? p.lse[head * p.tokens + block.token + row] * kLog2E : INFINITY;
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void finish(const FinishParams& p) {
  constexpr int kColumns = kHeadDim / 8;
  const Block block = p.blocks[blockIdx.x];
  if (block.rows == 0) return;
  const uint64_t head = blockIdx.y;
  const float4* sums =
      reinterpret_cast<const float4*>(p.dq_sums) +
      (blockIdx.x * static_cast<uint64_t>(p.heads) + head) * (kBlockRows * kHeadDim / 4);
  float4 s[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) s[j] = __ldcs(sums + j * kThreads + threadIdx.x);
  const int lane = threadIdx.x % 32, upper = 16 * (threadIdx.x / 32) + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = upper + 8 * r;
    __nv_bfloat16* to =
        p.dq + static_cast<uint64_t>(block.token + row) * p.dq_stride + head * kHeadDim + 8 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kColumns; j += 4) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4& four = s[j + i];
        pairs[i] = r == 0 ? granite::pack(four.x * p.scale, four.y * p.scale)
                          : granite::pack(four.z * p.scale, four.w * p.scale);
      }
      const Bf16x8 eight = gather_quad(pairs);
      if (row < block.rows) *reinterpret_cast<Bf16x8*>(to + 8 * j) = eight;
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) attention_prepare_64(const __grid_constant__ PrepareParams p) {
  prepare<64>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) attention_prepare_128(const __grid_constant__ PrepareParams p) {
  prepare<128>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) attention_finish_64(const __grid_constant__ FinishParams p) {
  finish<64>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) attention_finish_128(const __grid_constant__ FinishParams p) {
  finish<128>(p);
}
