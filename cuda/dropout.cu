// Dropout whose mask is a function of a counter.
//
//   forward   y[i]  = bits(i) >= threshold ? round(x[i] * scale) : +0
//   backward  dx[i] = bits(i) >= threshold ? round(dy[i] * scale) : +0      the same kernel, with dy for x
//   added     y[i]  = round(y[i] + (bits(i) >= threshold ? x[i] * scale : +0))
//   bits(i)   = the low 15 bits of half i % 2 (0 the lower) of word i / 2 % 4 of Philox4x32-7 at counter
//               [i / 8, module, microbatch low, microbatch high], key = seed
//   threshold = round(p * 2^15), scale = f32(1 / (1 - threshold / 2^15))
//
// Operands
//   x, y   [elements] f32 or bf16, contiguous, any alignment an element may have; y may not overlap x
//   elements <= 2^35, so that i / 8 fits the counter's first word
//   The product (and the sum, after it) is in f32; bf16 is rounded to nearest even. A dropped element is +0 whatever x was,
//   NaN included.
//   dropout_rows_*, dropout_add_rows_*: x and y are [elements / columns, columns], row r begins at r * x_stride and
//   r * y_stride (in elements), and i = row * columns + column, as if they were contiguous.
//
// Launch   grid ceil(elements / (256 * 16 / sizeof(T))), block 256, no shared memory
//   A thread owns 16 bytes: four f32 (half a Philox) or eight bf16 (one). With `vectorised` it moves them as one access;
//   the last thread, and every thread when x or y is not 16-byte aligned, moves them one by one. Of rows all must be aligned
//   and whole numbers of 16 bytes, at most 2^32 - 1 of these each; one division then finds a thread's row.
//
// Cost     2 * sizeof(T) bytes an element, each read or written once: bound by memory, provided the 7 rounds hide. Added: 3 * sizeof(T).
//   A Philox is 14 wide multiplications and 28 xors for eight elements. An H100 at 3.0 TB/s moves 0.75 T bf16 elements
//   a second, which asks for 1.3 T wide multiplications a second, of about 14 T it can issue.
//   Measured fraction: see cuda/NOTES.md.
//
// Twin     dropout_reference, dropout_add_rows_reference in src/kernels/dropout.rs, equal bit for bit.
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

struct DropoutRowsParams {
  const void* x;
  void* y;
  uint64_t elements;
  uint64_t columns;
  uint64_t x_stride;
  uint64_t y_stride;
  uint64_t seed;
  uint64_t microbatch;
  uint32_t module;
  uint32_t threshold;
  float scale;
  uint32_t vectorised;
};
static_assert(sizeof(DropoutRowsParams) == 80, "src/kernels/dropout.rs asserts the same size");

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

template <typename T, typename Params>
__device__ __forceinline__ T dropped(T x, uint32_t bits, const Params& p) {
  return bits >= p.threshold ? scaled(x, p.scale) : static_cast<T>(0.0f);
}

__device__ __forceinline__ float added(float y, float x, uint32_t bits, const DropoutRowsParams& p) {
  return __fadd_rn(y, dropped(x, bits, p));
}

__device__ __forceinline__ __nv_bfloat16 added(__nv_bfloat16 y, __nv_bfloat16 x, uint32_t bits,
                                               const DropoutRowsParams& p) {
  return __float2bfloat16_rn(added(__bfloat162float(y), __bfloat162float(x), bits, p));
}

// The bits of kSize elements, four or eight, the first of them a multiple of kSize.
template <int kSize>
struct Bits {
  uint32_t values[kSize];
};

template <int kSize, typename Params>
__device__ __forceinline__ Bits<kSize> bits_from(uint64_t first, const Params& p) {
  static_assert(kSize == 4 || kSize == 8, "a Philox decides eight");
  const uint4 counter = make_uint4(static_cast<uint32_t>(first / 8), p.module, static_cast<uint32_t>(p.microbatch),
                                   static_cast<uint32_t>(p.microbatch >> 32));
  const uint2 key = make_uint2(static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
  const uint4 four = granite::philox4x32<granite::kPhiloxRounds>(counter, key);
  const bool second = kSize == 4 && first % 8 != 0;
  const uint32_t words[4] = {second ? four.z : four.x, second ? four.w : four.y, four.z, four.w};
  Bits<kSize> bits;
#pragma unroll
  for (int i = 0; i < kSize; ++i) bits.values[i] = words[i / 2] >> 16 * (i % 2) & 0x7fff;
  return bits;
}

template <typename T>
__device__ __forceinline__ void dropout(const DropoutParams& p) {
  constexpr int kSize = Pack<T>::kSize;
  const uint64_t first = (static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (first >= p.elements) return;

  const Bits<kSize> bits = bits_from<kSize>(first, p);
  const T* x = static_cast<const T*>(p.x) + first;
  T* y = static_cast<T*>(p.y) + first;
  if (p.vectorised != 0 && p.elements - first >= kSize) {
    Pack<T> pack = *reinterpret_cast<const Pack<T>*>(x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) pack.values[i] = dropped(pack.values[i], bits.values[i], p);
    *reinterpret_cast<Pack<T>*>(y) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (p.elements - first > i) y[i] = dropped(x[i], bits.values[i], p);
    }
  }
}

template <typename T, bool kAdd>
__device__ __forceinline__ void dropout_rows(const DropoutRowsParams& p) {
  constexpr int kSize = Pack<T>::kSize;
  const uint64_t first = (static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (first >= p.elements) return;

  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  if (p.vectorised != 0) {
    const uint32_t pack = static_cast<uint32_t>(first / kSize);
    const uint32_t packs_per_row = static_cast<uint32_t>(p.columns / kSize);
    const uint32_t row = pack / packs_per_row;
    const uint64_t column = static_cast<uint64_t>(pack - row * packs_per_row) * kSize;
    const Pack<T> from = *reinterpret_cast<const Pack<T>*>(x + row * p.x_stride + column);
    Pack<T>* at = reinterpret_cast<Pack<T>*>(y + row * p.y_stride + column);
    Pack<T> to;
    if constexpr (kAdd) to = *at;
    const Bits<kSize> bits = bits_from<kSize>(first, p);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (kAdd) {
        to.values[i] = added(to.values[i], from.values[i], bits.values[i], p);
      } else {
        to.values[i] = dropped(from.values[i], bits.values[i], p);
      }
    }
    *at = to;
    return;
  }
  const Bits<kSize> bits = bits_from<kSize>(first, p);
  uint64_t row = first / p.columns;
  uint64_t column = first - row * p.columns;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (p.elements - first > i) {
      const T from = x[row * p.x_stride + column];
      T& to = y[row * p.y_stride + column];
      if constexpr (kAdd) {
        to = added(to, from, bits.values[i], p);
      } else {
        to = dropped(from, bits.values[i], p);
      }
    }
    column += 1;
    if (column == p.columns) {
      column = 0;
      row += 1;
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

extern "C" __global__ void __launch_bounds__(kThreads) dropout_rows_f32(const __grid_constant__ DropoutRowsParams p) {
  dropout_rows<float, false>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) dropout_rows_bf16(const __grid_constant__ DropoutRowsParams p) {
  dropout_rows<__nv_bfloat16, false>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) dropout_add_rows_f32(const __grid_constant__ DropoutRowsParams p) {
  dropout_rows<float, true>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) dropout_add_rows_bf16(const __grid_constant__ DropoutRowsParams p) {
  dropout_rows<__nv_bfloat16, true>(p);
}
