// RMSNorm with a frozen weight: alone, behind the addition of a branch to the residual stream, and its gradient.
//
//   rms_norm       rstd = 1 / sqrt(mean(x^2) + eps)             y = round(round(x * rstd) * w)
//   add_rms_norm   sum = round(x + round(multiplier * branch))  and the same of the sum
//   backward       dx = round(d_residual + rstd * (g - n * mean(g * n)))   with g = dy * w, n = x * rstd
//
// Operands
//   x, branch, sum, y, dy, d_residual, dx   [rows, columns] bf16, last stride 1, row strides in elements, any address
//   weight [columns] bf16, rstd [rows] f32. columns <= 16384.
//   sum may be x or branch, dx may be any input of its shape: a thread reads its elements before it writes any.
//   All arithmetic is in f32; round is to bf16, to nearest even, where the twin rounds; dx is rounded once.
//
// Launch   grid rows, block (columns / 8 / V) threads rounded up to warps, at most 512 (256 for V = 1)
//   A block holds its row in registers: thread t owns the eight elements of vector t, t + blockDim.x, ...
//   Kernels _1, _2 and _4 hold V of them a thread and move each as one 16-byte access: all addresses and row strides
//   must be multiples of 16 bytes, columns of 8. Kernel _any holds 4 and moves elements one by one.
//   One sum over the block, in a fixed order: no atomics, the same bits in every run.
//
// Cost     bytes an element: 4 for rms_norm, 8 for add_rms_norm, 8 for backward, each read or written once; the weight
//   comes from the caches. Bound by memory: at 4096 columns 256 threads with 2 vectors have 8-24 KB a block in flight.
//
// Twin     rms_norm_reference and rms_norm_backward_reference in src/kernels/rms_norm.rs, add_scaled in the decoder.
#include "bf16x8.cuh"

namespace {

using granite::Bf16x8;

struct RmsNormParams {
  const __nv_bfloat16* x;
  const __nv_bfloat16* branch;  // add_rms_norm only
  const __nv_bfloat16* weight;
  __nv_bfloat16* sum;  // add_rms_norm only
  __nv_bfloat16* y;
  float* rstd;
  uint64_t x_stride;
  uint64_t branch_stride;
  uint64_t sum_stride;
  uint64_t y_stride;
  uint32_t columns;
  float multiplier;
  float eps;
  float inverse_columns;
};
static_assert(sizeof(RmsNormParams) == 96, "src/kernels/rms_norm.rs asserts the same size");

struct RmsNormBackwardParams {
  const __nv_bfloat16* dy;
  const __nv_bfloat16* x;
  const __nv_bfloat16* weight;
  const float* rstd;
  const __nv_bfloat16* d_residual;
  __nv_bfloat16* dx;
  uint64_t dy_stride;
  uint64_t x_stride;
  uint64_t d_residual_stride;
  uint64_t dx_stride;
  uint32_t columns;
  float inverse_columns;
};
static_assert(sizeof(RmsNormBackwardParams) == 88, "src/kernels/rms_norm.rs asserts the same size");

// Vector v of this thread begins at this element of the row.
__device__ __forceinline__ uint32_t first_of(int v) { return (v * blockDim.x + threadIdx.x) * 8; }

// This thread's part of a row; +0 beyond its end.
template <bool kVectorised, int V>
__device__ __forceinline__ void load_row(Bf16x8 (&to)[V], const __nv_bfloat16* row, uint32_t columns) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const uint32_t first = first_of(v);
    to[v] = granite::load8<kVectorised>(row + first, granite::valid8(first, columns));
  }
}

template <bool kVectorised, int V>
__device__ __forceinline__ void store_row(__nv_bfloat16* row, const Bf16x8 (&from)[V], uint32_t columns) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const uint32_t first = first_of(v);
    granite::store8<kVectorised>(row + first, from[v], granite::valid8(first, columns));
  }
}

// x + round(multiplier * branch), rounded, in place of x.
template <int V>
__device__ __forceinline__ void add_scaled(Bf16x8 (&x)[V], const Bf16x8 (&branch)[V], float multiplier) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 b = granite::unpack(branch[v].words[i]);
      const float2 scaled = granite::unpack(granite::pack(b.x * multiplier, b.y * multiplier));
      const float2 a = granite::unpack(x[v].words[i]);
      x[v].words[i] = granite::pack(a.x + scaled.x, a.y + scaled.y);
    }
  }
}

template <int V>
__device__ __forceinline__ float sum_of_squares(const Bf16x8 (&x)[V]) {
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = granite::unpack(x[v].words[i]);
      squares = fmaf(a.x, a.x, squares);
      squares = fmaf(a.y, a.y, squares);
    }
  }
  return granite::block_sum(squares);
}

template <bool kVectorised, int V, bool kAdd>
__device__ __forceinline__ void rms_norm(const RmsNormParams& p) {
  const uint64_t row = blockIdx.x;
  Bf16x8 x[V], weight[V];
  load_row<kVectorised>(x, p.x + row * p.x_stride, p.columns);
  load_row<kVectorised>(weight, p.weight, p.columns);
  if constexpr (kAdd) {
    Bf16x8 branch[V];
    load_row<kVectorised>(branch, p.branch + row * p.branch_stride, p.columns);
    add_scaled(x, branch, p.multiplier);
    store_row<kVectorised>(p.sum + row * p.sum_stride, x, p.columns);
  }

  const float mean = sum_of_squares(x) * p.inverse_columns;
  const float rstd = __frsqrt_rn(mean + p.eps);
  if (threadIdx.x == 0) p.rstd[row] = rstd;

#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = granite::unpack(x[v].words[i]);
      const float2 normed = granite::unpack(granite::pack(a.x * rstd, a.y * rstd));
      const float2 w = granite::unpack(weight[v].words[i]);
      x[v].words[i] = granite::pack(normed.x * w.x, normed.y * w.y);
    }
  }
  store_row<kVectorised>(p.y + row * p.y_stride, x, p.columns);
}

template <bool kVectorised, int V>
__device__ __forceinline__ void rms_norm_backward(const RmsNormBackwardParams& p) {
  const uint64_t row = blockIdx.x;
  Bf16x8 dy[V], x[V], residual[V], weight[V];
  load_row<kVectorised>(dy, p.dy + row * p.dy_stride, p.columns);
  load_row<kVectorised>(x, p.x + row * p.x_stride, p.columns);
  load_row<kVectorised>(residual, p.d_residual + row * p.d_residual_stride, p.columns);
  load_row<kVectorised>(weight, p.weight, p.columns);
  const float rstd = p.rstd[row];

  float along = 0.0f;
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 d = granite::unpack(dy[v].words[i]);
      const float2 w = granite::unpack(weight[v].words[i]);
      const float2 a = granite::unpack(x[v].words[i]);
      along = fmaf(d.x * w.x, a.x * rstd, along);
      along = fmaf(d.y * w.y, a.y * rstd, along);
    }
  }
  const float mean = granite::block_sum(along) * p.inverse_columns;

#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 d = granite::unpack(dy[v].words[i]);
      const float2 w = granite::unpack(weight[v].words[i]);
      const float2 a = granite::unpack(x[v].words[i]);
      const float2 r = granite::unpack(residual[v].words[i]);
      const float low = fmaf(-(a.x * rstd), mean, d.x * w.x);
      const float high = fmaf(-(a.y * rstd), mean, d.y * w.y);
      dy[v].words[i] = granite::pack(fmaf(low, rstd, r.x), fmaf(high, rstd, r.y));
    }
  }
  store_row<kVectorised>(p.dx + row * p.dx_stride, dy, p.columns);
}

}  // namespace

#define GRANITE_RMS_NORM(SUFFIX, VECTORISED, V, THREADS)                                       \
  extern "C" __global__ void __launch_bounds__(THREADS)                                        \
      rms_norm_##SUFFIX(const __grid_constant__ RmsNormParams p) {                             \
    rms_norm<VECTORISED, V, false>(p);                                                         \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(THREADS)                                        \
      add_rms_norm_##SUFFIX(const __grid_constant__ RmsNormParams p) {                         \
    rms_norm<VECTORISED, V, true>(p);                                                          \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(THREADS)                                        \
      rms_norm_backward_##SUFFIX(const __grid_constant__ RmsNormBackwardParams p) {            \
    rms_norm_backward<VECTORISED, V>(p);                                                       \
  }

GRANITE_RMS_NORM(1, true, 1, 256)
GRANITE_RMS_NORM(2, true, 2, 512)
GRANITE_RMS_NORM(4, true, 4, 512)
GRANITE_RMS_NORM(any, false, 4, 512)
