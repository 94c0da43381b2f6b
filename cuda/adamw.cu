// AdamW over flat parameters, with 32-bit or 8-bit moments, and the norm by which gradients are clipped.
//
//   g' = g * min(1, max_norm / (norm + 1e-6))        max_norm 0: g' = g;  norm = sqrt(*norm_squared)
//   m' = beta1 * m + (1 - beta1) * g'
//   v' = beta2 * v + (1 - beta2) * g'^2
//   p' = p * (1 - lr * weight_decay) - (lr / correction1) * m' / (sqrt(v') / correction2 + eps)
//   copy = bf16(p')
//   When norm_squared is not finite nothing is written: such gradients would spoil every parameter.
//
// Moments in 8 bits are kept in blocks of 256 elements from the first on: absmax[b] is the largest magnitude of the block, a
// code the level of the dynamic code (signed for m, unsigned for v) nearest to the moment over absmax, the lower one of
// two as near. The update uses the moments before they are rounded. All arithmetic is in f32, norm and clipping in f64.
//
// Operands
//   p, g           [elements] f32
//   copy           [elements] bf16, or null
//   m, v           [elements] f32, or u8 codes
//   *_absmax       [ceil(elements / 256)] f32, with codes
//   norm_squared   [1] f64
//   partials       [1024] f64, scratch of the norm
//   Contiguous. p, g, m and v in f32 begin at multiples of 16 bytes, copy at one of 8 and codes at one of 4, where the norm
//   and adamw_32bit are told so by `vectorised`, and always in adamw_8bit.
//
// Launch
//   grad_norm_partials   grid 1024, block 256: each block the squares of its share, in an order that depends on nothing but
//                        the number of elements and their alignment
//   grad_norm_sum        grid 1, block 256: norm_squared
//   adamw_32bit          grid ceil(elements / 1024), block 256: a thread has four neighbouring elements
//   adamw_8bit           grid at most 2 a multiprocessor, block 512, 25.1 KiB of shared memory; elements a multiple of 256
//     A warp takes a block of 256, a lane four elements of each half, so that every access of a warp is one piece of
//     memory. Decoding reads a level, encoding one entry of the code's table, both in shared memory; the tables are made
//     once by each block (about 3 us), which is why blocks stay and take block after block.
//   adamw_8bit_any       the same element by element: any number of them at any address
//
// Cost     norm 4 bytes an element; adamw_32bit 30 (28 without copy); adamw_8bit 18.06: p and g read, p and copy written, codes
//   and scales read and written. 198 M parameters of a rank-64 adapter: 0.26 + 1.19 ms at 3.0 TB/s. About 86
//   instructions an element in adamw_8bit, of 170 that an H100 issues meanwhile. Measured: see cuda/NOTES.md.
//
// Twin     the functions *_reference in src/kernels/adamw.rs. The dynamic code is equal bit for bit; moments and parameters
//   differ in their last bits, as the twin rounds products and sums one after the other and divides where this multiplies.
#include <cuda_bf16.h>

#include "dynamic_map.cuh"

namespace {

struct GradNormParams {
  const float* g;
  double* partials;
  double* out;
  uint64_t elements;
  uint64_t vectorised;
};
static_assert(sizeof(GradNormParams) == 40, "src/kernels/adamw/gpu.rs asserts the same size");

struct AdamWParams {
  float* p;
  __nv_bfloat16* copy;
  const float* g;
  void* m;
  float* m_absmax;
  void* v;
  float* v_absmax;
  const double* norm_squared;
  double max_norm;
  uint64_t elements;
  float beta1;
  float beta1_rest;   // 1 - beta1
  float beta2;
  float beta2_rest;   // 1 - beta2
  float decay;        // 1 - lr * weight_decay
  float rate;         // lr / correction1
  float root_scale;   // 1 / correction2
  float eps;
  uint64_t vectorised;
};
static_assert(sizeof(AdamWParams) == 120, "src/kernels/adamw/gpu.rs asserts the same size");

constexpr int kPartials = 1024;
constexpr int kThreads = 256;
constexpr int kThreads8bit = 512;
constexpr int kBlock = 256;
constexpr unsigned kWholeWarp = 0xffffffffu;

// ---- The norm.

// The sum over the block, in its first thread.
__device__ __forceinline__ double block_sum(double sum) {
  __shared__ double warps[kThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(kWholeWarp, sum, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 1; warp < kThreads / 32; ++warp) sum += warps[warp];
  }
  return sum;
}

__device__ __forceinline__ double square(float x) { return static_cast<double>(x) * static_cast<double>(x); }

// ---- One element.

struct Moments {
  float m;
  float v;
};

// What gradients are multiplied by; less than zero when they are no numbers.
__device__ __forceinline__ float clip_factor(const AdamWParams& p) {
  const double squared = *p.norm_squared;
  if (!(squared < 1.7e308)) return -1.0f;
  if (p.max_norm == 0.0) return 1.0f;
  const double factor = p.max_norm / (sqrt(squared) + 1e-6);
  return factor < 1.0 ? static_cast<float>(factor) : 1.0f;
}

__device__ __forceinline__ Moments advanced(Moments old, float g, const AdamWParams& p) {
  return {__fmaf_rn(p.beta1, old.m, __fmul_rn(p.beta1_rest, g)),
          __fmaf_rn(p.beta2, old.v, __fmul_rn(__fmul_rn(p.beta2_rest, g), g))};
}

// Within 2^-23 of the root, and without the branch of the correctly rounded one.
__device__ __forceinline__ float root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float updated(float parameter, Moments moments, const AdamWParams& p) {
  const float denominator = __fmaf_rn(root(moments.v), p.root_scale, p.eps);
  return __fmaf_rn(-p.rate, __fdividef(moments.m, denominator), __fmul_rn(parameter, p.decay));
}

// ---- Four neighbouring elements: kWhole as one access, else those of them that lie before the end one by one.

struct Four {
  float values[4];
};

template <bool kWhole>
__device__ __forceinline__ Four load(const float* x, uint64_t first, uint64_t end) {
  Four four = {};
  if constexpr (kWhole) {
    const float4 loaded = *reinterpret_cast<const float4*>(x + first);
    four = {loaded.x, loaded.y, loaded.z, loaded.w};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < end) four.values[i] = x[first + i];
    }
  }
  return four;
}

template <bool kWhole>
__device__ __forceinline__ void store(float* x, Four four, uint64_t first, uint64_t end) {
  if constexpr (kWhole) {
    *reinterpret_cast<float4*>(x + first) =
        make_float4(four.values[0], four.values[1], four.values[2], four.values[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < end) x[first + i] = four.values[i];
    }
  }
}

__device__ __forceinline__ uint32_t rounded(float first, float second) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&two);
}

template <bool kWhole>
__device__ __forceinline__ void store_rounded(__nv_bfloat16* x, Four four, uint64_t first, uint64_t end) {
  if (x == nullptr) return;
  if constexpr (kWhole) {
    *reinterpret_cast<uint2*>(x + first) =
        make_uint2(rounded(four.values[0], four.values[1]), rounded(four.values[2], four.values[3]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < end) x[first + i] = __float2bfloat16_rn(four.values[i]);
    }
  }
}

// Four codes, the first in the lowest byte; `zero` where there is none.
template <bool kWhole>
__device__ __forceinline__ uint32_t load(const uint8_t* x, uint64_t first, uint64_t end, uint32_t zero) {
  if constexpr (kWhole) return *reinterpret_cast<const uint32_t*>(x + first);
  uint32_t four = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) four |= (first + i < end ? x[first + i] : zero) << (8 * i);
  return four;
}

template <bool kWhole>
__device__ __forceinline__ void store(uint8_t* x, uint32_t four, uint64_t first, uint64_t end) {
  if constexpr (kWhole) {
    *reinterpret_cast<uint32_t*>(x + first) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < end) x[first + i] = static_cast<uint8_t>(four >> (8 * i));
    }
  }
}

// ---- 8-bit moments.

// What a block of 256 moments is multiplied by to come to at most 1 (and a rounding): 1 / absmax in two factors, because
// the reciprocal of a small number overflows.
struct Norming {
  float first;
  float second;
};

__device__ __forceinline__ Norming norming(float absmax) {
  // 2^64: then even the smallest subnormal number has a reciprocal.
  const float first = absmax < 0x1p-64f ? 0x1p64f : 1.0f;
  return {first, absmax > 0.0f ? __fdiv_rn(1.0f, __fmul_rn(absmax, first)) : 0.0f};
}

__device__ __forceinline__ float normed(float moment, Norming by) {
  return __fmul_rn(__fmul_rn(moment, by.first), by.second);
}

struct Codes {
  float signed_levels[granite::kLevels];
  float unsigned_levels[granite::kLevels];
  granite::NearestTable signed_nearest;
  granite::NearestTable unsigned_nearest;
};

__device__ __forceinline__ void fill(Codes& codes) {
  for (int code = threadIdx.x; code < granite::kLevels; code += kThreads8bit) {
    codes.signed_levels[code] = granite::dynamic_map_level<true>(code);
    codes.unsigned_levels[code] = granite::dynamic_map_level<false>(code);
  }
  __syncthreads();
  codes.signed_nearest.fill(codes.signed_levels, 127);
  codes.unsigned_nearest.fill(codes.unsigned_levels, 0);
}

constexpr uint32_t kSignedZero = 127;
constexpr uint32_t kUnsignedZero = 0;

__device__ __forceinline__ uint32_t byte(uint32_t four, int index) { return four >> (8 * index) & 0xff; }

// Four elements with moments in f32.
template <bool kWhole>
__device__ __forceinline__ void step_four(uint64_t first, float factor, const AdamWParams& p) {
  float* m_all = static_cast<float*>(p.m);
  float* v_all = static_cast<float*>(p.v);
  Four parameters = load<kWhole>(p.p, first, p.elements);
  Four m = load<kWhole>(m_all, first, p.elements);
  Four v = load<kWhole>(v_all, first, p.elements);
  const Four g = load<kWhole>(p.g, first, p.elements);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Moments moments = advanced({m.values[i], v.values[i]}, __fmul_rn(g.values[i], factor), p);
    m.values[i] = moments.m;
    v.values[i] = moments.v;
    parameters.values[i] = updated(parameters.values[i], moments, p);
  }
  store<kWhole>(p.p, parameters, first, p.elements);
  store_rounded<kWhole>(p.copy, parameters, first, p.elements);
  store<kWhole>(m_all, m, first, p.elements);
  store<kWhole>(v_all, v, first, p.elements);
}

// A warp's block of 256 elements with moments in 8 bits. A lane has two fours, 128 elements apart.
template <bool kWhole>
__device__ __forceinline__ void step_block(uint64_t block, float factor, const Codes& codes, const AdamWParams& p) {
  constexpr int kFours = 2;
  constexpr int kApart = kBlock / kFours;
  uint8_t* m_codes = static_cast<uint8_t*>(p.m);
  uint8_t* v_codes = static_cast<uint8_t*>(p.v);
  const uint32_t lane = threadIdx.x % 32;
  const uint64_t first = block * kBlock + lane * 4;
  Four parameters[kFours];
  Four g[kFours];
  uint32_t m_four[kFours];
  uint32_t v_four[kFours];
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    g[i] = load<kWhole>(p.g, first + kApart * i, p.elements);
    m_four[i] = load<kWhole>(m_codes, first + kApart * i, p.elements, kSignedZero);
    v_four[i] = load<kWhole>(v_codes, first + kApart * i, p.elements, kUnsignedZero);
    parameters[i] = load<kWhole>(p.p, first + kApart * i, p.elements);
  }
  const float m_absmax = p.m_absmax[block];
  const float v_absmax = p.v_absmax[block];

  Four m[kFours];
  Four v[kFours];
  uint32_t m_largest = 0;  // bits of a magnitude, which are ordered as the magnitudes are
  uint32_t v_largest = 0;
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Moments old = {__fmul_rn(codes.signed_levels[byte(m_four[i], j)], m_absmax),
                           __fmul_rn(codes.unsigned_levels[byte(v_four[i], j)], v_absmax)};
      const Moments moments = advanced(old, __fmul_rn(g[i].values[j], factor), p);
      m[i].values[j] = moments.m;
      v[i].values[j] = moments.v;
      m_largest = max(m_largest, __float_as_uint(moments.m) & 0x7fffffffu);
      v_largest = max(v_largest, __float_as_uint(moments.v));
      parameters[i].values[j] = updated(parameters[i].values[j], moments, p);
    }
    store<kWhole>(p.p, parameters[i], first + kApart * i, p.elements);
    store_rounded<kWhole>(p.copy, parameters[i], first + kApart * i, p.elements);
  }

  m_largest = __reduce_max_sync(kWholeWarp, m_largest);
  v_largest = __reduce_max_sync(kWholeWarp, v_largest);
  if (lane == 0) {
    p.m_absmax[block] = __uint_as_float(m_largest);
    p.v_absmax[block] = __uint_as_float(v_largest);
  }
  const Norming m_norming = norming(__uint_as_float(m_largest));
  const Norming v_norming = norming(__uint_as_float(v_largest));
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    m_four[i] = 0;
    v_four[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      m_four[i] |= granite::nearest_signed(codes.signed_nearest, normed(m[i].values[j], m_norming)) << (8 * j);
      v_four[i] |= granite::nearest_unsigned(codes.unsigned_nearest, normed(v[i].values[j], v_norming)) << (8 * j);
    }
    store<kWhole>(m_codes, m_four[i], first + kApart * i, p.elements);
    store<kWhole>(v_codes, v_four[i], first + kApart * i, p.elements);
  }
}

template <bool kWhole>
__device__ __forceinline__ void step_blocks(const AdamWParams& p) {
  __shared__ Codes codes;
  __shared__ float clip;
  if (threadIdx.x == 0) clip = clip_factor(p);
  fill(codes);
  __syncthreads();
  const float factor = clip;
  if (factor < 0.0f) return;

  constexpr int kWarps = kThreads8bit / 32;
  const uint64_t blocks = (p.elements + kBlock - 1) / kBlock;
  for (uint64_t block = static_cast<uint64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; block < blocks;
       block += static_cast<uint64_t>(gridDim.x) * kWarps) {
    step_block<kWhole>(block, factor, codes, p);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) grad_norm_partials(const __grid_constant__ GradNormParams p) {
  const uint64_t threads = static_cast<uint64_t>(kPartials) * kThreads;
  const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const uint64_t fours = p.vectorised != 0 ? p.elements / 4 : 0;
  double sum = 0.0;
#pragma unroll 4
  for (uint64_t four = thread; four < fours; four += threads) {
    const float4 g = reinterpret_cast<const float4*>(p.g)[four];
    sum += (square(g.x) + square(g.y)) + (square(g.z) + square(g.w));
  }
  for (uint64_t element = fours * 4 + thread; element < p.elements; element += threads) sum += square(p.g[element]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(kThreads) grad_norm_sum(const __grid_constant__ GradNormParams p) {
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kPartials / kThreads; ++i) sum += p.partials[i * kThreads + threadIdx.x];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *p.out = sum;
}

extern "C" __global__ void __launch_bounds__(kThreads) adamw_32bit(const __grid_constant__ AdamWParams p) {
  __shared__ float clip;
  if (threadIdx.x == 0) clip = clip_factor(p);
  __syncthreads();
  const float factor = clip;
  const uint64_t first = (static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (factor < 0.0f || first >= p.elements) return;
  if (p.vectorised != 0 && p.elements - first >= 4) {
    step_four<true>(first, factor, p);
  } else {
    step_four<false>(first, factor, p);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads8bit, 2) adamw_8bit(const __grid_constant__ AdamWParams p) {
  step_blocks<true>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads8bit) adamw_8bit_any(const __grid_constant__ AdamWParams p) {
  step_blocks<false>(p);
}
