// What the attention kernels share: how a batch is cut into tiles, the ABI, the mask and the softmax.
//
// Attention is causal and packed: sequences lie one after the other in [tokens, heads, head_dim], and a query attends to
// the keys of its own sequence up to itself. `heads` query heads share `kv_heads` key heads, group = heads / kv_heads.
//
// Tiles (src/kernels/attention/plan.rs makes them once a batch; all layers and both passes use them)
//   forward    128 query rows of a sequence, one query head; kernels take tile x head in the order of the list, longest
//              first.
//   backward   128 key rows of a sequence, one key head, all query heads of its group; the list names the key head too.
//              What runs at a time should touch few blocks of dq_sums: they should stay in the L2 cache from the first part
//              to the last. So the list goes through whole sequences and key heads, as many at a time as fill the GPU with
//              half of their tiles: the longer half first, then the shorter, each block of threads one of each.
//   gradients  64 query rows of a sequence are a block. Its number is first_block + row / 64; blocks of different
//              sequences never share a number, so lse2, delta and the sums of dq have whole blocks.
//
// Order of summation. Block m of dq gets a part from every key tile n <= m / 2. They are added in the order in which the
// list names the tiles: key tiles come in groups [group_first, group_last], groups ascending, and within a group from the
// last to the first. Then tile n, which begins at its own diagonal, never waits for one that starts with it: its
// neighbour n + 1 is a step ahead at every block. The longer half of a sequence's tiles is one group, each of the others
// is one of its own. A part's place is therefore
//   turn(n, m) = group_first + min(group_last, m / 2) - n,     and the last has turn m / 2.
// A block's semaphore counts the parts added. Kernels take tiles by ticket, in order, so whoever waits does so for a tile
// that already runs.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

#include "bf16x8.cuh"

namespace granite::attention {

constexpr int kQueryTile = 128;
constexpr int kKeyTile = 128;
constexpr int kBlockRows = 64;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// One entry of a tile list; 32 bytes.
struct alignas(16) Tile {
  int32_t start;        // the sequence's first token
  int32_t length;       // its tokens
  int32_t row;          // the tile's first row in the sequence, a multiple of 128
  int32_t first_block;  // number of the sequence's first block
  int32_t group_first;  // backward: first and last key tile of the group
  int32_t group_last;
  int32_t kv_head;      // backward: the key head
  int32_t reserved;
};
static_assert(sizeof(Tile) == 32, "src/kernels/attention/plan.rs asserts the same size");

// One block of 64 query rows; 16 bytes.
struct alignas(16) Block {
  int32_t token;  // its first row's token in the batch
  int32_t rows;   // rows that count; 0 for a number that no sequence uses
  int32_t reserved[2];
};
static_assert(sizeof(Block) == 16, "src/kernels/attention/plan.rs asserts the same size");

// Arguments of the kernels. A stride is the distance from a token to the next in elements; the heads of a token lie side
// by side. lse is [heads, tokens] f32, natural logarithm. Of a block's 64 rows lse2 (lse in units of log2) and delta
// (rowsum(dO * O)) are [blocks, heads, 64] f32, +inf and 0 where a row does not count, so that P and dS are 0 there.
// dq_sums is [blocks, heads, 64 * head_dim] f32 in the order of fragments: vector (j, t) of four, at 4 * (128 j + t), is what
// lane t % 32 of the warp with rows 16 (t / 32) holds of column block j. It need not be set before an ordered backward.
// semaphores is [blocks, heads] u32, 0 before and after.

struct ForwardParams {
  const __nv_bfloat16* q;
  const __nv_bfloat16* k;
  const __nv_bfloat16* v;
  __nv_bfloat16* o;
  float* lse;
  const Tile* tiles;
  uint32_t* tickets;
  uint64_t q_stride;
  uint64_t k_stride;
  uint64_t v_stride;
  uint64_t o_stride;
  uint64_t tokens;
  uint32_t tile_count;
  uint32_t heads;
  uint32_t kv_heads;
  float scale;
};
static_assert(sizeof(ForwardParams) == 112, "src/kernels/attention/gpu.rs asserts the same size");

struct PrepareParams {
  const __nv_bfloat16* o;
  const __nv_bfloat16* d_o;
  const float* lse;
  float* lse2;
  float* delta;
  const Block* blocks;
  uint64_t o_stride;
  uint64_t d_o_stride;
  uint64_t tokens;
  uint32_t heads;
  uint32_t reserved;
};
static_assert(sizeof(PrepareParams) == 80, "src/kernels/attention/gpu.rs asserts the same size");

struct BackwardParams {
  const __nv_bfloat16* q;
  const __nv_bfloat16* k;
  const __nv_bfloat16* v;
  const __nv_bfloat16* d_o;
  const float* lse2;
  const float* delta;
  float* dq_sums;
  uint32_t* semaphores;
  __nv_bfloat16* dk;
  __nv_bfloat16* dv;
  const Tile* tiles;
  uint32_t* tickets;
  uint64_t q_stride;
  uint64_t k_stride;
  uint64_t v_stride;
  uint64_t d_o_stride;
  uint64_t dk_stride;
  uint64_t dv_stride;
  uint32_t tile_count;
  uint32_t heads;
  uint32_t kv_heads;
  float scale;
};
static_assert(sizeof(BackwardParams) == 160, "src/kernels/attention/gpu.rs asserts the same size");

struct FinishParams {
  const float* dq_sums;
  __nv_bfloat16* dq;
  const Block* blocks;
  uint64_t dq_stride;
  uint32_t heads;
  float scale;
};
static_assert(sizeof(FinishParams) == 40, "src/kernels/attention/gpu.rs asserts the same size");

// A kernel takes tiles by ticket. tickets[0] counts those taken, tickets[1] the blocks that found none left; both are 0
// before and after a launch.
__device__ __forceinline__ uint32_t take_ticket(uint32_t* tickets) { return atomicAdd(tickets, 1u); }

// Called once by every block after its last ticket: the last of them sets both back.
__device__ __forceinline__ void return_tickets(uint32_t* tickets) {
  __threadfence();
  if (atomicInc(tickets + 1, gridDim.x - 1) == gridDim.x - 1) atomicExch(tickets, 0u);
}

__device__ __forceinline__ int32_t turn(const Tile& tile, int32_t n, int32_t m) {
  return tile.group_first + min(tile.group_last, m / 2) - n;
}

// Waits until as many parts as `turn` were added, with what their writers wrote visible.
__device__ __forceinline__ void await_turn(const uint32_t* semaphore, uint32_t turn) {
  uint32_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(semaphore) : "memory");
  } while (found != turn);
}

// Announces a part; after the last one the semaphore is 0 again.
__device__ __forceinline__ void end_turn(uint32_t* semaphore, uint32_t turn, bool last) {
  const uint32_t next = last ? 0 : turn + 1;
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(semaphore), "r"(next) : "memory");
}

// exp2 at full rate; -inf gives +0, NaN gives NaN.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Fragments. The accumulators of mma.m16n8 and of wgmma.m64 lie alike: a warp holds 16 rows; of each block of eight
// columns lane l holds s[j][0], s[j][1] of row l / 4 and s[j][2], s[j][3] of row l / 4 + 8, columns 8 j + 2 (l % 4) and
// the next.

// Hides what a row may not see: column c of row r is kept where first_column + c <= first_row + r (both positions in the
// sequence; `row` is this lane's upper row, `column` its first column, within the tile's own positions).
template <int kColumns>
__device__ __forceinline__ void mask_causal(float (&s)[kColumns][4], int row, int column) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (column + 8 * j + e % 2 > row + 8 * (e / 2)) s[j][e] = -INFINITY;
    }
  }
}

// Softmax of rows that arrive a tile of columns at a time (Milakov and Gimelshein 2018). Two rows a lane; the four lanes
// of a quad share them.
struct Softmax {
  float max[2] = {-INFINITY, -INFINITY};  // of the scores so far, times scale_log2, rounded
  float sum[2] = {0.0f, 0.0f};            // this lane's part of the sum of exponentials

  // Turns raw scores into exp2(scale_log2 * score - max) and gives the factors for what was summed before: exactly 1 where
  // the maximum stays, because both are the same rounded product. What its rounding leaves over when scores are large is
  // then the same in all tiles. scale_log2 is positive.
  template <bool kFirst, int kColumns>
  __device__ __forceinline__ float2 update(float (&s)[kColumns][4], float scale_log2) {
    float factors[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = s[0][2 * r];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) now = fmaxf(now, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 1));
      now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 2));
      now = fmaxf(max[r], __fmul_rn(now, scale_log2));
      // A row that sees nothing yet stays at 0 rather than at inf - inf.
      const float shift = now == -INFINITY ? 0.0f : now;
      factors[r] = kFirst ? 1.0f : exp2_fast(max[r] - shift);
      max[r] = now;
      float added = 0.0f;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          s[j][2 * r + e] = exp2_fast(fmaf(s[j][2 * r + e], scale_log2, -shift));
          added += s[j][2 * r + e];
        }
      }
      sum[r] = kFirst ? added : fmaf(sum[r], factors[r], added);
    }
    return make_float2(factors[0], factors[1]);
  }

  // After the last tile: one over each row's sum, and the natural logarithm of its sum of exponentials in lse.
  __device__ __forceinline__ float2 finish(float (&lse)[2]) {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      // No key was seen only by rows past the end of a sequence, which nobody reads.
      inverse[r] = total == 0.0f ? 0.0f : 1.0f / total;
      lse[r] = (max[r] + __log2f(total)) * kLn2;
    }
    return make_float2(inverse[0], inverse[1]);
  }
};

// Two columns next to each other, of the four lanes of a quad over four blocks of eight columns, become eight columns of
// one block: lane l of the quad gets block l whole, as a 16-byte word.
__device__ __forceinline__ Bf16x8 gather_quad(const uint32_t (&pairs)[4]) {
  const uint32_t lane = threadIdx.x % 4;
  // Two exchanges, with the neighbour and with the one after it: a transposition of 4 x 4.
  uint32_t a[4] = {pairs[0], pairs[1], pairs[2], pairs[3]};
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t give = lane & 1 ? a[i] : a[i + 1];
    const uint32_t take = __shfl_xor_sync(kAllLanes, give, 1);
    if (lane & 1) a[i] = take; else a[i + 1] = take;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t give = lane & 2 ? a[i] : a[i + 2];
    const uint32_t take = __shfl_xor_sync(kAllLanes, give, 2);
    if (lane & 2) a[i] = take; else a[i + 2] = take;
  }
  return {{a[0], a[1], a[2], a[3]}};
}

}  // namespace granite::attention
