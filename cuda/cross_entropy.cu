// Cross entropy of rows of logits, and its gradient in their place.
//
//   z = logits * inverse_scaling over the first `vocab` columns
//   loss     = lse(z) - z[label]
//   dlogits  = round((softmax(z) - onehot(label)) * weight * inverse_scaling), 0 in the columns from `vocab` on
//   label -100: loss 0, gradient 0, logits not read. Any other label outside [0, vocab): both NaN.
//   A row whose logits hold NaN or +infinity has a loss and a gradient that are NaN.
//
// Operands
//   logits  [rows, columns] bf16, last stride 1, row stride in elements, any address; columns >= vocab; what the
//           columns from `vocab` on hold takes no part
//   labels  [rows] i64, losses [rows] f32
//   All arithmetic is in f32; a gradient is rounded once, to nearest even.
//
// Launch   grid rows, block 512
//   cross_entropy             the loss alone; one read
//   cross_entropy_kept        with the gradient; the row waits in 16 * ceil(vocab / 8) bytes of dynamic shared memory
//                             between the two passes: one read, one write. 98,320 bytes for a vocabulary of 49,155: two blocks
//                             an SM on sm_90, so that one reads while the other writes; one where there are 99 KB
//   cross_entropy_reread      with the gradient for rows that do not fit: the second pass reads the row once more
//   *_any                     as the latter, elements moved one by one: for addresses, row strides or columns that are
//                             no multiples of 8 elements
//   Thread t owns the eight elements of vector t, t + 512, ... in both passes, so the row needs no barrier of its own.
//   First pass: four vectors a turn, their largest first, then the sum of exponentials relative to the largest so far,
//   all in base 2: exp2(fma(logit, k, -shift)), k = inverse_scaling * log2 e. Threads are combined in a fixed order.
//
// Cost     4 bytes an element (2 for the loss alone, 6 reread). Two exponentials and about 13 instructions an element: at
//   3 TB/s a third of the issue slots of an H100, provided the two blocks overlap. Bound by memory.
//
// Twin     cross_entropy_logits_reference in src/kernels/cross_entropy.rs.
#include "bf16x8.cuh"

namespace {

using granite::Bf16x8;

struct CrossEntropyParams {
  __nv_bfloat16* logits;
  const int64_t* labels;
  float* losses;
  uint64_t stride;
  uint32_t columns;
  uint32_t vocab;
  float inverse_scaling;
  float weight;
};
static_assert(sizeof(CrossEntropyParams) == 48, "src/kernels/cross_entropy.rs asserts the same size");

constexpr uint32_t kThreads = 512;
constexpr uint32_t kWarps = kThreads / 32;
constexpr int kTurn = 4;  // vectors in flight a thread
constexpr int64_t kIgnore = -100;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr uint32_t kMinusInfinity = 0xff80u;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Sum of exp2(z - shift), and the largest z so far, which is the shift: minus infinity while there is nothing to sum.
struct SoftmaxSum {
  float largest;
  float sum;
};

// What to subtract, so that a sum of nothing stays 0 rather than becoming NaN.
__device__ __forceinline__ float shift_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }

__device__ __forceinline__ SoftmaxSum join(SoftmaxSum a, SoftmaxSum b) {
  const float largest = fmaxf(a.largest, b.largest);
  const float shift = shift_of(largest);
  // Two products that are each rounded: fused, the result would depend on which of the two comes first.
  return {largest, __fadd_rn(__fmul_rn(a.sum, exp2_fast(a.largest - shift)),
                             __fmul_rn(b.sum, exp2_fast(b.largest - shift)))};
}

__device__ __forceinline__ SoftmaxSum join_warp(SoftmaxSum mine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const SoftmaxSum other = {__shfl_xor_sync(granite::kAllLanes, mine.largest, distance),
                              __shfl_xor_sync(granite::kAllLanes, mine.sum, distance)};
    mine = join(mine, other);
  }
  return mine;
}

// Over the block; the same bits in every thread, because join of two is symmetric.
__device__ __forceinline__ SoftmaxSum join_block(SoftmaxSum mine) {
  __shared__ SoftmaxSum of_warp[kWarps];
  mine = join_warp(mine);
  const uint32_t lane = threadIdx.x % 32;
  if (lane == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  return join_warp(lane < kWarps ? of_warp[lane] : SoftmaxSum{-INFINITY, 0.0f});
}

// Makes minus infinity of the elements that do not exist.
__device__ __forceinline__ void mask(Bf16x8& x, uint32_t valid) {
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < valid ? x.words[i] & 0xffffu : kMinusInfinity;
    const uint32_t high = 2 * i + 1 < valid ? x.words[i] & 0xffff0000u : kMinusInfinity << 16;
    x.words[i] = low | high;
  }
}

// The vectors of a turn, which lie kThreads apart: the first begins at column `first`. Minus infinity from `vocab` on.
template <bool kVectorised>
__device__ __forceinline__ void load_turn(Bf16x8 (&x)[kTurn], const __nv_bfloat16* row, uint32_t first, uint32_t vocab) {
#pragma unroll
  for (int v = 0; v < kTurn; ++v) {
    // Columns behind `vocab` exist up to the vector's end, so a vectorised access may take them along.
    const uint32_t column = first + 8 * kThreads * v;
    x[v] = granite::load8<kVectorised>(row + column, granite::valid8(column, vocab));
  }
  // Apart from the loads, so that no branch stands between them.
  if (first + 8 * kThreads * (kTurn - 1) + 8 > vocab) {
#pragma unroll
    for (int v = 0; v < kTurn; ++v) mask(x[v], granite::valid8(first + 8 * kThreads * v, vocab));
  }
}

__device__ __forceinline__ void add(SoftmaxSum& total, const Bf16x8 (&x)[kTurn], float k) {
  float largest = -INFINITY;
#pragma unroll
  for (int v = 0; v < kTurn; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 logit = granite::unpack(x[v].words[i]);
      largest = fmaxf(largest, fmaxf(logit.x, logit.y));
    }
  }
  // k is positive, so the largest logit has the largest product.
  largest = fmaxf(total.largest, largest * k);
  const float shift = shift_of(largest);
  float sum = total.sum * exp2_fast(total.largest - shift);
#pragma unroll
  for (int v = 0; v < kTurn; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 logit = granite::unpack(x[v].words[i]);
      sum += exp2_fast(fmaf(logit.x, k, -shift)) + exp2_fast(fmaf(logit.y, k, -shift));
    }
  }
  total = {largest, sum};
}

// How a row's gradient is made: (exp2(fma(logit, k, -shift)) * inverse_sum - onehot) * factor; scale is their product.
struct Gradient {
  float k;
  float shift;
  float inverse_sum;
  float factor;
  float scale;
  uint32_t label;

  __device__ __forceinline__ float at(float logit) const {
    return exp2_fast(fmaf(logit, k, -shift)) * scale;
  }

  __device__ __forceinline__ float at_label(float logit) const {
    return (exp2_fast(fmaf(logit, k, -shift)) * inverse_sum - 1.0f) * factor;
  }

  // Of the eight logits from column `first` on.
  __device__ __forceinline__ Bf16x8 of(const Bf16x8& x, uint32_t first) const {
    Bf16x8 d;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const float2 logit = granite::unpack(x.words[i]);
      d.words[i] = granite::pack(at(logit.x), at(logit.y));
    }
    if (label - first < 8) {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const float2 logit = granite::unpack(x.words[i]);
        const uint32_t low = first + 2 * i;
        if (label == low) d.words[i] = granite::pack(at_label(logit.x), at(logit.y));
        if (label == low + 1) d.words[i] = granite::pack(at(logit.x), at_label(logit.y));
      }
    }
    return d;
  }
};

// Zero for the elements from `valid` on.
__device__ __forceinline__ void clear(Bf16x8& x, uint32_t valid) {
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    if (2 * i >= valid) x.words[i] &= 0xffff0000u;
    if (2 * i + 1 >= valid) x.words[i] &= 0x0000ffffu;
  }
}

template <bool kVectorised>
__device__ __forceinline__ void write_zeros(__nv_bfloat16* row, uint32_t columns) {
  const Bf16x8 zeros = {{0, 0, 0, 0}};
  for (uint32_t first = 8 * threadIdx.x; first < columns; first += 8 * kThreads) {
    granite::store8<kVectorised>(row + first, zeros, granite::valid8(first, columns));
  }
}

// kKeep: the row stays in shared memory between the passes.
template <bool kVectorised, bool kGradient, bool kKeep>
__device__ __forceinline__ void cross_entropy(const CrossEntropyParams& p) {
  extern __shared__ Bf16x8 kept[];
  const uint64_t row_index = blockIdx.x;
  __nv_bfloat16* row = p.logits + row_index * p.stride;
  const int64_t label = p.labels[row_index];
  if (label == kIgnore) {
    if (threadIdx.x == 0) p.losses[row_index] = 0.0f;
    if constexpr (kGradient) write_zeros<kVectorised>(row, p.columns);
    return;
  }
  const bool known = label >= 0 && label < p.vocab;
  const float k = p.inverse_scaling * kLog2E;
  // Read now: other threads will have written the gradient over it when the loss is known.
  float label_logit = NAN;
  if (threadIdx.x == 0 && known) label_logit = __bfloat162float(row[label]);

  SoftmaxSum total = {-INFINITY, 0.0f};
  for (uint32_t first = 8 * threadIdx.x; first < p.vocab; first += 8 * kThreads * kTurn) {
    Bf16x8 x[kTurn];
    load_turn<kVectorised>(x, row, first, p.vocab);
    if constexpr (kKeep) {
#pragma unroll
      for (int v = 0; v < kTurn; ++v) {
        const uint32_t vector = first / 8 + kThreads * v;
        if (8 * vector < p.vocab) kept[vector] = x[v];
      }
    }
    add(total, x, k);
  }
  total = join_block(total);

  const float shift = shift_of(total.largest);
  if (threadIdx.x == 0) p.losses[row_index] = (log2f(total.sum) - fmaf(label_logit, k, -shift)) * kLn2;
  if constexpr (kGradient) {
    const float factor = known ? p.weight * p.inverse_scaling : NAN;
    const float inverse_sum = 1.0f / total.sum;
    const uint32_t column = known ? static_cast<uint32_t>(label) : UINT32_MAX;
    const Gradient gradient = {k, shift, inverse_sum, factor, inverse_sum * factor, column};
    for (uint32_t first = 8 * threadIdx.x; first < p.columns; first += 8 * kThreads) {
      Bf16x8 d = {{0, 0, 0, 0}};
      const uint32_t valid = granite::valid8(first, p.vocab);
      if (valid != 0) {
        if constexpr (kKeep) {
          d = gradient.of(kept[first / 8], first);
        } else {
          d = gradient.of(granite::load8<kVectorised>(row + first, valid), first);
        }
        if (valid < 8) clear(d, valid);
      }
      granite::store8<kVectorised>(row + first, d, granite::valid8(first, p.columns));
    }
  }
}

}  // namespace

#define GRANITE_CROSS_ENTROPY(NAME, VECTORISED, GRADIENT, KEEP)                                                  \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) NAME(const __grid_constant__ CrossEntropyParams p) { \
    cross_entropy<VECTORISED, GRADIENT, KEEP>(p);                                                                \
  }

GRANITE_CROSS_ENTROPY(cross_entropy, true, false, false)
GRANITE_CROSS_ENTROPY(cross_entropy_any, false, false, false)
GRANITE_CROSS_ENTROPY(cross_entropy_kept, true, true, true)
GRANITE_CROSS_ENTROPY(cross_entropy_reread, true, true, false)
GRANITE_CROSS_ENTROPY(cross_entropy_reread_any, false, true, false)
