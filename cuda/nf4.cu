// NF4 weights to numbers, and numbers to NF4 weights.
//
//   scale[b]  = nested_code[absmax[b]] * nested_absmax[b / 256] + nested_offset       each step rounded to f32
//   weight[i] = round(level[nibble(i)] * scale[i / 64])                               the product in f32
//   nibble(i) = packed[i / 2] >> 4 for even i, & 15 for odd i;  i = row * columns + column, whatever out's layout
//
//   scale[b]  = max |weight| of the block;  nibble = boundaries between levels below weight * (1 / max(scale, 1e-38))
//   nested_offset = f32(mean of the scales), the sum in f64 over the sums of 256
//   absmax[b] = nearest of nested_code to (scale[b] - nested_offset) * (1 / max(nested_absmax, 1e-38)), the even of two as near
//   nested_absmax = max |scale - nested_offset| of 256
//
// Operands
//   packed         [elements / 2] u8, elements a multiple of 64
//   absmax         [elements / 64] u8
//   nested_absmax  [ceil(elements / 64 / 256)] f32
//   nested_code    [256] f32
//   scales         [elements / 64] f32, sums [ceil(elements / 64 / 256)] f64: on the way to absmax
//   weights        [elements] f32, bf16 or f16, contiguous
//   out            [elements / columns, columns] f32 or bf16, row r beginning at r * row_stride (in elements); rows may not
//                  overlap each other or an operand. Columns beyond `columns` of a wider row are left alone.
//
// Launch
//   nf4_dequantize_{f32,bf16}       grid ceil(chunks / 1024), block 256, 64 bytes of shared memory
//     A chunk is 16 bytes of out: 8 bf16 or 4 f32, which lie in one block of 64 and, `columns` being a multiple of the chunk,
//     in one row. Wants out and its rows aligned to 16 bytes and packed to a chunk's codes (4 or 2 bytes). A thread takes
//     four chunks, 256 apart, and asks for all it reads before it needs any of it. Neighbouring lanes have neighbouring
//     chunks: a warp reads 128 bytes of codes and writes 512 bytes in one access each. chunks < 2^31.
//   nf4_dequantize_any_{f32,bf16}   grid ceil(elements / 2 / 256), block 256: one byte of codes a thread, any layout
//   nf4_quantize_{f32,bf16,f16}     grid ceil(elements / 64 / 8), block 256: a warp a block, a lane two weights and their byte
//   nf4_sum_scales                  grid ceil(elements / 64 / 256 / 256), block 256: a thread sums 256 scales in their order
//   nf4_nest                        grid ceil(elements / 64 / 256 / 8), block 256, 1 KiB of shared memory: a warp 256 scales
//     Quantisation happens once per weight, as fast as a file is read; the mean is taken on the host, from the sums, which
//     are finite where every weight is.
//
// Cost     0.516 bytes read and sizeof(T) written a weight: 2.516 for bf16. An H100 at 3.0 TB/s writes 1.2 T weights a second, and
//   issues about 24 instructions a weight meanwhile; this takes 10. The 16 levels lie in 16 banks of shared memory: lanes
//   with one level read one word, lanes with different levels different banks. The measured fraction: see cuda/NOTES.md.
//
// Twin     Nf4Weight::dequantize_reference, and Nf4Weight::quantize on the CPU, in src/kernels/nf4.rs, equal bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace {

struct DequantizeParams {
  const uint8_t* packed;
  const uint8_t* absmax;
  const float* nested_absmax;
  const float* nested_code;
  void* out;
  uint64_t elements;
  uint64_t columns;
  uint64_t row_stride;
  uint32_t chunks_per_row;   // columns / chunk, where that has no rest
  uint32_t row_multiplier;   // chunk / chunks_per_row = (hi32(chunk * row_multiplier) + chunk) >> row_shift
  uint32_t row_shift;
  float nested_offset;
};
static_assert(sizeof(DequantizeParams) == 80, "src/kernels/nf4/gpu.rs asserts the same size");

struct QuantizeParams {
  const void* weights;
  uint8_t* packed;
  float* scales;
  double* sums;
  const float* nested_code;
  uint8_t* absmax;
  float* nested_absmax;
  uint64_t blocks;
  uint64_t nested_blocks;
  float nested_offset;
  uint32_t unused;
};
static_assert(sizeof(QuantizeParams) == 80, "src/kernels/nf4/gpu.rs asserts the same size");

constexpr int kThreads = 256;
constexpr int kChunksPerThread = 4;
constexpr int kBlock = 64;
constexpr int kNestedBlock = 256;

// LEVELS of the twin.
__constant__ float kLevels[16] = {-1.0f,        -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                                  -0.091050036f, 0.0f,       0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                                  0.44070983f,  0.562617f,   0.72295684f,  1.0f};

__device__ __forceinline__ float scale_of(uint8_t code, float nested_absmax, const DequantizeParams& p) {
  return __fadd_rn(__fmul_rn(__ldg(p.nested_code + code), nested_absmax), p.nested_offset);
}

// The level of the nibble at bit kShift: shifted so that it is the level's offset in bytes.
template <int kShift>
__device__ __forceinline__ float level_at(const float* levels, uint32_t packed) {
  const uint32_t offset = (kShift >= 2 ? packed >> (kShift >= 2 ? kShift - 2 : 0) : packed << 2) & 0x3c;
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(levels) + offset);
}

// Byte kByte of the packed codes: two weights, the first in the high nibble.
template <int kByte>
__device__ __forceinline__ float2 pair_at(const float* levels, uint32_t packed, float scale) {
  return make_float2(__fmul_rn(level_at<8 * kByte + 4>(levels, packed), scale),
                     __fmul_rn(level_at<8 * kByte>(levels, packed), scale));
}

__device__ __forceinline__ uint32_t rounded(float2 pair) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(pair.x, pair.y);
  return *reinterpret_cast<const uint32_t*>(&two);
}

// How a chunk of 16 bytes is made from its codes.
template <typename T>
struct Chunk;

template <>
struct Chunk<__nv_bfloat16> {
  using Packed = uint32_t;
  static constexpr uint32_t kWeights = 8;
  static __device__ __forceinline__ uint4 made(const float* levels, Packed packed, float scale) {
    return make_uint4(rounded(pair_at<0>(levels, packed, scale)), rounded(pair_at<1>(levels, packed, scale)),
                      rounded(pair_at<2>(levels, packed, scale)), rounded(pair_at<3>(levels, packed, scale)));
  }
};

template <>
struct Chunk<float> {
  using Packed = uint16_t;
  static constexpr uint32_t kWeights = 4;
  static __device__ __forceinline__ uint4 made(const float* levels, Packed packed, float scale) {
    const float2 first = pair_at<0>(levels, packed, scale);
    const float2 second = pair_at<1>(levels, packed, scale);
    return make_uint4(__float_as_uint(first.x), __float_as_uint(first.y), __float_as_uint(second.x),
                      __float_as_uint(second.y));
  }
};

template <typename T>
__device__ __forceinline__ void dequantize(const DequantizeParams& p) {
  using Packed = typename Chunk<T>::Packed;
  constexpr uint32_t kWeights = Chunk<T>::kWeights;
  __shared__ float levels[16];

  const uint32_t chunks = static_cast<uint32_t>(p.elements / kWeights);
  const uint32_t first = blockIdx.x * (kThreads * kChunksPerThread) + threadIdx.x;
  Packed packed[kChunksPerThread] = {};
  uint8_t codes[kChunksPerThread] = {};
  float nested[kChunksPerThread] = {};
#pragma unroll
  for (int i = 0; i < kChunksPerThread; ++i) {
    const uint32_t chunk = first + i * kThreads;
    if (chunk < chunks) {
      const uint32_t block = chunk / (kBlock / kWeights);
      packed[i] = __ldcs(reinterpret_cast<const Packed*>(p.packed) + chunk);
      codes[i] = __ldg(p.absmax + block);
      nested[i] = __ldg(p.nested_absmax + block / kNestedBlock);
    }
  }
  if (threadIdx.x < 16) levels[threadIdx.x] = kLevels[threadIdx.x];
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kChunksPerThread; ++i) {
    const uint32_t chunk = first + i * kThreads;
    if (chunk < chunks) {
      const uint32_t row = (__umulhi(chunk, p.row_multiplier) + chunk) >> p.row_shift;
      const uint32_t column = (chunk - row * p.chunks_per_row) * kWeights;
      const float scale = scale_of(codes[i], nested[i], p);
      T* out = static_cast<T*>(p.out) + (row * p.row_stride + column);
      *reinterpret_cast<uint4*>(out) = Chunk<T>::made(levels, packed[i], scale);
    }
  }
}

__device__ __forceinline__ void store(float* out, float value) { *out = value; }
__device__ __forceinline__ void store(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }

template <typename T>
__device__ __forceinline__ void dequantize_any(const DequantizeParams& p) {
  const uint64_t byte = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (byte >= p.elements / 2) return;
  const uint64_t block = byte / (kBlock / 2);
  const float scale = scale_of(p.absmax[block], p.nested_absmax[block / kNestedBlock], p);
  const uint32_t packed = p.packed[byte];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint64_t element = 2 * byte + i;
    const uint64_t row = element / p.columns;
    const uint32_t nibble = i == 0 ? packed >> 4 : packed & 15;
    store(static_cast<T*>(p.out) + row * p.row_stride + (element - row * p.columns), __fmul_rn(kLevels[nibble], scale));
  }
}

// ---- Quantisation.

constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }

// The largest magnitude in the warp; no number where one is none, as its bits are the largest.
__device__ __forceinline__ float largest_magnitude(uint32_t bits) {
  return __uint_as_float(__reduce_max_sync(kWholeWarp, bits));
}

__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ __forceinline__ float reciprocal(float scale) { return __fdiv_rn(1.0f, fmaxf(scale, 1e-38f)); }

// How many boundaries between levels lie below x.
__device__ __forceinline__ uint32_t nearest_level(float x) {
  uint32_t below = 0;
#pragma unroll
  for (int i = 0; i < 15; ++i) below += x > __fmul_rn(__fadd_rn(kLevels[i], kLevels[i + 1]), 0.5f);
  return below;
}

template <typename T>
__device__ __forceinline__ void quantize(const QuantizeParams& p) {
  const uint64_t block = static_cast<uint64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (block >= p.blocks) return;
  const uint32_t lane = threadIdx.x % 32;
  const T* weights = static_cast<const T*>(p.weights) + block * kBlock + 2 * lane;
  const float first = widened(weights[0]);
  const float second = widened(weights[1]);
  const uint32_t larger = magnitude(first) > magnitude(second) ? magnitude(first) : magnitude(second);
  const float scale = largest_magnitude(larger);
  const float by = reciprocal(scale);
  const uint32_t byte = nearest_level(__fmul_rn(first, by)) << 4 | nearest_level(__fmul_rn(second, by));
  p.packed[block * (kBlock / 2) + lane] = static_cast<uint8_t>(byte);
  if (lane == 0) p.scales[block] = scale;
}

// The nearest of ascending levels; of two as near the one with the even number.
__device__ __forceinline__ uint32_t nearest_code(const float* levels, float x) {
  uint32_t below = 0;  // levels below x
#pragma unroll
  for (uint32_t step = 128; step > 0; step /= 2) {
    if (levels[below + step - 1] < x) below += step;
  }
  const uint32_t above = below < 1 ? 1 : below;  // at most 255, as the steps sum to that
  const float middle = __fmul_rn(__fadd_rn(levels[above - 1], levels[above]), 0.5f);
  return x > middle || (x == middle && above % 2 == 0) ? above : above - 1;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) nf4_quantize_f32(const __grid_constant__ QuantizeParams p) {
  quantize<float>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) nf4_quantize_bf16(const __grid_constant__ QuantizeParams p) {
  quantize<__nv_bfloat16>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) nf4_quantize_f16(const __grid_constant__ QuantizeParams p) {
  quantize<__half>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) nf4_sum_scales(const __grid_constant__ QuantizeParams p) {
  const uint64_t nested = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (nested >= p.nested_blocks) return;
  const uint64_t first = nested * kNestedBlock;
  const uint64_t end = first + kNestedBlock < p.blocks ? first + kNestedBlock : p.blocks;
  double sum = 0.0;
  for (uint64_t block = first; block < end; ++block) sum += static_cast<double>(p.scales[block]);
  p.sums[nested] = sum;
}

extern "C" __global__ void __launch_bounds__(kThreads) nf4_nest(const __grid_constant__ QuantizeParams p) {
  __shared__ float levels[kNestedBlock];
  levels[threadIdx.x] = p.nested_code[threadIdx.x];
  __syncthreads();
  const uint64_t nested = static_cast<uint64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (nested >= p.nested_blocks) return;
  constexpr int kPerLane = kNestedBlock / 32;
  const uint32_t lane = threadIdx.x % 32;
  const uint64_t first = nested * kNestedBlock + lane;
  float off[kPerLane];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint64_t block = first + 32 * i;
    off[i] = block < p.blocks ? __fsub_rn(p.scales[block], p.nested_offset) : 0.0f;
    largest = magnitude(off[i]) > largest ? magnitude(off[i]) : largest;
  }
  const float scale = largest_magnitude(largest);
  const float by = reciprocal(scale);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint64_t block = first + 32 * i;
    if (block < p.blocks) p.absmax[block] = static_cast<uint8_t>(nearest_code(levels, __fmul_rn(off[i], by)));
  }
  if (lane == 0) p.nested_absmax[nested] = scale;
}

extern "C" __global__ void __launch_bounds__(kThreads) nf4_dequantize_f32(const __grid_constant__ DequantizeParams p) {
  dequantize<float>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) nf4_dequantize_bf16(const __grid_constant__ DequantizeParams p) {
  dequantize<__nv_bfloat16>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) nf4_dequantize_any_f32(const __grid_constant__ DequantizeParams p) {
  dequantize_any<float>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) nf4_dequantize_any_bf16(const __grid_constant__ DequantizeParams p) {
  dequantize_any<__nv_bfloat16>(p);
}
