// Dropout whose mask is a function of a counter.
//
//   forward   y[i]  = word(i) >= threshold ? round(x[i] * scale) : +0
//   backward  dx[i] = word(i) >= threshold ? round(dy[i] * scale) : +0      the same kernel, with dy for x
//   word(i)   = word i % 4 of Philox4x32-7 at counter [i / 4, module, microbatch low, microbatch high], key = seed
//   threshold = floor(p * 2^32), scale = f32(1 / (1 - p))
//
// Operands
//   x, y   [elements] f32 or bf16, contiguous, any alignment an element may have; y may not overlap x
//   elements <= 2^34, so that i / 4 fits the counter's first word
//   The product is in f32; bf16 is rounded to nearest even. A dropped element is +0 whatever x was, NaN included.
//
// Launch   grid ceil(elements / (256 * 16 / sizeof(T))), block 256, no shared memory
//   A thread owns 16 bytes: four f32 (one Philox) or eight bf16 (two). With `vectorised` it moves them as one access;
//   the last thread, and every thread when x or y is not 16-byte aligned, moves them one by one.
//
// Cost     2 * sizeof(T) bytes an element, each read or written once: bound by memory, provided the 7 rounds hide.
//   A Philox is 14 wide multiplications and 28 xors for four elements. An H100 at 3.0 TB/s moves 0.75 T bf16 elements
//   a second, which asks for 2.6 T wide multiplications a second, of about 14 T it can issue.
//   Measured fraction: see cuda/NOTES.md.
//
// Twin     dropout_reference in src/kernels/dropout.rs, equal bit for bit.
#include <cuda_bf16.h>

#include "philox.cuh"

namespace {

struct DropoutParams {
  const void* x;
  void* y;
  uint64_t elements;
  uint64_t seed;
  uint64_t microbatch;
  uint32_t module;
  uint32_t threshold;
  float scale;
  uint32_t vectorised;  // 1 when x and y both begin at a multiple of 16 bytes
};
static_assert(sizeof(DropoutParams) == 56, "src/kernels/dropout.rs asserts the same size");

constexpr int kThreads = 256;

__device__ __forceinline__ float scaled(float x, float scale) { return __fmul_rn(x, scale); }

__device__ __forceinline__ __nv_bfloat16 scaled(__nv_bfloat16 x, float scale) {
  return __float2bfloat16_rn(__fmul_rn(__bfloat162float(x), scale));
}

// The elements of one thread: 16 bytes, so that they can move as one access.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <typename T>
__device__ __forceinline__ T dropped(T x, uint32_t word, const DropoutParams& p) {
  return word >= p.threshold ? scaled(x, p.scale) : static_cast<T>(0.0f);
}

template <typename T>
__device__ __forceinline__ void dropout(const DropoutParams& p) {
  constexpr int kSize = Pack<T>::kSize;
  const uint64_t first = (static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (first >= p.elements) return;

  uint32_t words[kSize];
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const uint4 counter = make_uint4(static_cast<uint32_t>((first + i) / 4), p.module,
                                     static_cast<uint32_t>(p.microbatch), static_cast<uint32_t>(p.microbatch >> 32));
    const uint2 key = make_uint2(static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
    const uint4 four = granite::philox4x32<granite::kPhiloxRounds>(counter, key);
    words[i] = four.x;
    words[i + 1] = four.y;
    words[i + 2] = four.z;
    words[i + 3] = four.w;
  }

  const T* x = static_cast<const T*>(p.x) + first;
  T* y = static_cast<T*>(p.y) + first;
  if (p.vectorised != 0 && p.elements - first >= kSize) {
    Pack<T> pack = *reinterpret_cast<const Pack<T>*>(x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) pack.values[i] = dropped(pack.values[i], words[i], p);
    *reinterpret_cast<Pack<T>*>(y) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (p.elements - first > i) y[i] = dropped(x[i], words[i], p);
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) dropout_f32(const __grid_constant__ DropoutParams p) {
  dropout<float>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) dropout_bf16(const __grid_constant__ DropoutParams p) {
  dropout<__nv_bfloat16>(p);
}
