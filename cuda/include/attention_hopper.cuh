// Arguments of the attention kernels of sm_90a: operands that TMA loads come as tensor maps, over [tokens, heads, head_dim]
// in boxes of 64 columns, one head and a tile's rows, swizzled by 128 bytes. A map is aligned to 128 bytes, and so are the arguments. The rest is as in attention.cuh.
#pragma once
#include <cuda.h>

#include "attention.cuh"

namespace granite::attention {

struct HopperForwardParams {
  CUtensorMap q;  // boxes of 64 rows
  CUtensorMap k;  // boxes of 128 rows
  CUtensorMap v;  // boxes of 128 rows
  __nv_bfloat16* o;
  float* lse;
  const Tile* tiles;
  uint32_t* tickets;
  uint64_t o_stride;
  uint64_t tokens;
  uint32_t tile_count;
  uint32_t heads;
  uint32_t kv_heads;
  float scale;
  uint64_t reserved[8];
};
static_assert(sizeof(HopperForwardParams) == 512, "src/kernels/attention/gpu.rs asserts the same size");

struct HopperBackwardParams {
  CUtensorMap q;    // boxes of 64 rows
  CUtensorMap k;    // boxes of 128 rows
  CUtensorMap v;    // boxes of 128 rows
  CUtensorMap d_o;  // boxes of 64 rows
  const float* lse2;
  const float* delta;
  float* dq_sums;
  uint32_t* semaphores;
  __nv_bfloat16* dk;
  __nv_bfloat16* dv;
  const Tile* tiles;
  uint32_t* tickets;
  uint64_t dk_stride;
  uint64_t dv_stride;
  uint32_t tile_count;
  uint32_t heads;
  uint32_t kv_heads;
  float scale;
  uint64_t reserved[4];
};
static_assert(sizeof(HopperBackwardParams) == 640, "src/kernels/attention/gpu.rs asserts the same size");

}  // namespace granite::attention
