// The 256 levels of the dynamic 8-bit code, and the code nearest to a number.
// Dettmers et al., "8-bit Optimizers via Block-wise Quantization", section 1.3. The twin is src/kernels/dynamic_map.rs,
// equal bit for bit.
#pragma once
#include <cstdint>

namespace granite {

constexpr int kLevels = 256;

// Middle of part `part` of 2^log2_parts equal parts of [0.1, 1], rounded as torch.linspace rounds: counted from the nearer
// end, product and sum in one rounding.
__device__ __forceinline__ float dynamic_map_middle(int part, int log2_parts) {
  const int parts = 1 << log2_parts;
  const float step = __fdiv_rn(__fsub_rn(1.0f, 0.1f), static_cast<float>(parts));
  const auto boundary = [=](int index) {
    return index < (parts + 1) / 2 ? __fmaf_rn(step, static_cast<float>(index), 0.1f)
                                   : __fmaf_rn(-step, static_cast<float>(parts - index), 1.0f);
  };
  return __fmul_rn(__fadd_rn(boundary(part), boundary(part + 1)), 0.5f);
}

// 10^(exponent - 6), exponent from 0 to 6.
__device__ __forceinline__ float dynamic_map_decade(int exponent) {
  float decade = 1e-6f;
  if (exponent == 1) decade = 1e-5f;
  if (exponent == 2) decade = 1e-4f;
  if (exponent == 3) decade = 1e-3f;
  if (exponent == 4) decade = 1e-2f;
  if (exponent == 5) decade = 1e-1f;
  if (exponent == 6) decade = 1.0f;
  return decade;
}

// Level `code` of the code in ascending order.
template <bool kSigned>
__device__ __forceinline__ float dynamic_map_level(int code) {
  if (code == kLevels - 1) return 1.0f;
  // Levels other than 0 and 1 are counted away from zero, from 1 on where there is a sign and from 2 on where there is none:
  // the exponent of two of that number tells the decade, what is left of it the part.
  const int distance = kSigned ? (code < 127 ? 127 - code : code - 127) : code + 1;
  if (distance == (kSigned ? 0 : 1)) return 0.0f;
  const int log2_parts = 31 - __clz(distance);
  const float decade = dynamic_map_decade(kSigned ? log2_parts : log2_parts - 1);
  const float level = __fmul_rn(decade, dynamic_map_middle(distance - (1 << log2_parts), log2_parts));
  return kSigned && code < 127 ? -level : level;
}

// A table in shared memory from which the nearest code is read in one access.
//
// Numbers that share their sign, exponent and first seven bits of mantissa make a bucket. The levels lie so far apart that
// no bucket holds more than one boundary between two of them, so a bucket's entry is the number of boundaries before it,
// and where its own boundary lies: the last 16 bits of that number, or 2^16 where it has none.
// Buckets reach from 2^-23, below which lies no boundary, to the bucket of 1, above all of them.
struct NearestTable {
  static constexpr int kFirstKey = (127 - 23) << 7;
  static constexpr int kBuckets = 23 * 128 + 1;
  static constexpr uint32_t kNoBoundary = 1u << 16;
  uint32_t entries[kBuckets];

  // Fills the table for the levels `from`, `from` + 1, ..., kLevels - 1 of the code, which begin with zero. All threads of the
  // block call this; `levels` must be visible to them, and the table is after the next __syncthreads().
  __device__ __forceinline__ void fill(const float* levels, int from) {
    const auto boundary = [=](int index) {
      return __fmul_rn(__fadd_rn(levels[from + index], levels[from + index + 1]), 0.5f);
    };
    const int boundaries = kLevels - 1 - from;
    for (int bucket = threadIdx.x; bucket < kBuckets; bucket += blockDim.x) {
      const float edge = __uint_as_float(static_cast<uint32_t>(kFirstKey + bucket) << 16);
      int below = 0;  // boundaries below the bucket's lower edge
      for (int step = 128; step > 0; step /= 2) {
        if (below + step <= boundaries && boundary(below + step - 1) < edge) below += step;
      }
      uint32_t own = kNoBoundary;
      if (below < boundaries) {
        const uint32_t bits = __float_as_uint(boundary(below));
        if (static_cast<int>(bits >> 16) == kFirstKey + bucket) own = bits & 0xffff;
      }
      entries[bucket] = static_cast<uint32_t>(below) << 24 | own;
    }
  }

  __device__ __forceinline__ uint32_t entry(uint32_t magnitude) const {
    const int bucket = static_cast<int>(magnitude >> 16) - kFirstKey;
    return entries[min(max(bucket, 0), kBuckets - 1)];
  }

  // How many boundaries lie below `magnitude`, the bits of a number from zero to one and a little.
  __device__ __forceinline__ uint32_t below(uint32_t magnitude) const {
    const uint32_t found = entry(magnitude);
    return (found >> 24) + ((magnitude & 0xffff) > (found & 0x1ffff));
  }

  // How many lie below it or at it.
  __device__ __forceinline__ uint32_t up_to(uint32_t magnitude) const {
    const uint32_t found = entry(magnitude);
    return (found >> 24) + ((magnitude & 0xffff) >= (found & 0x1ffff));
  }
};

// The signed code nearest to x in [-1, 1], the lower one of two as near; the table begins with level 127, which is zero.
__device__ __forceinline__ uint32_t nearest_signed(const NearestTable& table, float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (bits == magnitude) return 127 + table.below(magnitude);
  // Below zero the levels are the same but for 1, and the lower one of two is the farther one.
  const uint32_t down = table.up_to(magnitude);
  return 127 - (down < 127 ? down : 127);
}

// The unsigned code nearest to x in [0, 1], the lower one of two as near; the table begins with level 0.
__device__ __forceinline__ uint32_t nearest_unsigned(const NearestTable& table, float x) {
  return table.below(__float_as_uint(x));
}

}  // namespace granite
