// Causal packed attention with grouped heads, backward: dK and dV, and the sums of dQ. For every GPU from sm_80 on.
//
//   P = exp2(scale log2(e) Q K^T - lse2)   dV = P^T dO   dS = P (dO V^T - delta)   dK = scale dS^T Q   dQ = scale dS K
//
// Operands   include/attention.cuh has the arguments, tiles, tickets and turns.
//   q, d_o [tokens, heads, d], k, v, dk, dv [tokens, kv_heads, d] bf16, all aligned to 16 bytes, token strides multiples
//   of 8; lse2, delta of attention_prepare; dq_sums without the factor `scale`, which attention_finish has. d is 64 or 128.
//   Rows of other sequences are never used, whatever they hold. All sums are f32; P and dS are rounded to bf16 before
//   their products.
//   The unordered kernels add to dq_sums, zeros before, as it comes: other bits in every run. For benchmarks only; they use
//   no semaphores.
//
// Launch     grid tile_count, block 256, one ticket a block, one block a multiprocessor, dynamic shared memory
//   attention_backward_128, _unordered_128   164,992 bytes: sm_80 and sm_90, by pairs of warps
//   attention_backward_compact_128            82,560 bytes: multiprocessors of 100 KB (sm_86, sm_89)
//   attention_backward_64, _unordered_64      66,688 bytes
//
// Shape (key-stationary as in FlashAttention-2, Dao 2023, but with scores transposed)
//   A block has 128 keys and walks the query heads of its key head and, for each, blocks of 64 queries from its own diagonal
//   to the sequence's end. dK and dV stay in registers, 128 a lane at d = 128. The scores are computed with keys as rows: the
//   sums that become P^T and dS^T then lie as the left operands of dV and dK want them. A step has two barriers.
//   attention_backward_128: two warps share 32 keys. In the scores each has half of the queries, in dK and dV half of the
//   columns, so that a fragment from shared memory serves two products everywhere. P and dS pass through shared memory,
//   in matrices of 8 x 8 that are written without conflicts and read straight or transposed.
//   The others: a warp has 16 keys to itself, 32 queries at a time. P^T and dS^T never leave its registers but for dQ, the
//   fragments of V stay in 32 registers: least shared memory, but most fragments serve one product.
//   dQ of a block is computed by all eight warps, 32 rows and a quarter of the columns each. What others have added so far is
//   fetched in turn while dK is computed, and is what the product dS K starts from. What a step has stored, one thread
//   announces in the middle of the next step, when the stores have long arrived.
//
// Cost       10 d FLOPs a visible pair, and what is hidden of the diagonal blocks. Per step of 128 keys and 64 queries at
//   d = 128, in cycles: products 4,100 on sm_90, 5,100 on sm_80, 20,500 on sm_89; shared memory 5,200 by pairs, 6,100
//   otherwise. Shared memory sets the pace on sm_90. 64 KB of dq_sums a step move through L2.
//
// Twin       attention_backward_reference in src/kernels/attention/reference.rs.
#include "attention.cuh"
#include "mma.cuh"

namespace {

using namespace granite::attention;
using namespace granite::mma;
using granite::Bf16x8;
using granite::pack;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpKeys = kKeyTile / kWarps;
constexpr int kPass = 32;  // queries of which a warp has scores at a time
static_assert(kWarpKeys == 16, "a warp's keys are the rows of one product");

// dS^T lies in matrices of 8 x 8, 128 bytes each: a fragment's word of lane l is word l of a matrix.
constexpr uint32_t kMatrix = 128;
constexpr uint32_t kMatrixRow = kBlockRows / 8 * kMatrix;  // the matrices of eight keys

// Where things lie in shared memory. By pairs, values and P^T lie there too.
template <int kHeadDim, int kStages, bool kPairs>
struct Shared {
  static constexpr uint32_t kRowBytes = Swizzled<kHeadDim>::kRowBytes;
  static constexpr uint32_t kScoreBytes = kKeyTile * kBlockRows * 2;
  static constexpr uint32_t kStageBytes = 2 * kBlockRows * kRowBytes;
  static constexpr uint32_t kRowValuesBytes = 2 * kBlockRows * sizeof(float);
  static constexpr uint32_t kKeys = 0;
  static constexpr uint32_t kDScores = kKeys + kKeyTile * kRowBytes;                   // dS^T
  static constexpr uint32_t kStage = kDScores + kScoreBytes;                           // queries, dO of each stage
  static constexpr uint32_t kRowValues = kStage + kStages * kStageBytes;               // lse2, delta of each stage
  static constexpr uint32_t kTicket = kRowValues + kStages * kRowValuesBytes;
  static constexpr uint32_t kProbabilities = kTicket + 128;                            // P^T
  static constexpr uint32_t kValues = kProbabilities + (kPairs ? kScoreBytes : 0);
  static constexpr uint32_t kBytes = kValues + (kPairs ? kKeyTile * kRowBytes : 0);
};
static_assert(Shared<128, 2, true>::kBytes == 164992 && Shared<128, 1, false>::kBytes == 82560 &&
                  Shared<64, 2, false>::kBytes == 66688,
              "src/kernels/attention/gpu.rs has the same numbers");

// ---- sums of dQ, which pass from block to block through L2 ----

__device__ __forceinline__ float4 load_through_l2(const float* from) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from)
               : "memory");
  return x;
}

__device__ __forceinline__ void store_through_l2(float* to, float4 x) {
  asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

__device__ __forceinline__ void add_anywhere(float* to, float4 x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
#else
  atomicAdd(to, x.x), atomicAdd(to + 1, x.y), atomicAdd(to + 2, x.z), atomicAdd(to + 3, x.w);
#endif
}

// The sums of a warp's 32 rows and kBlocks blocks of columns: what others added to them so far, or zeros.
template <int kBlocks>
__device__ __forceinline__ void fetch_sums(float (&dq)[2][kBlocks][4], const float* from, bool begun) {
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (begun) sum = load_through_l2(from + 4 * (128 * j + 32 * part));
      dq[part][j][0] = sum.x, dq[part][j][1] = sum.y, dq[part][j][2] = sum.z, dq[part][j][3] = sum.w;
    }
  }
}

template <bool kOrdered, int kBlocks>
__device__ __forceinline__ void keep_sums(float* to, const float (&dq)[2][kBlocks][4]) {
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const float4 sum = make_float4(dq[part][j][0], dq[part][j][1], dq[part][j][2], dq[part][j][3]);
      if (kOrdered) store_through_l2(to + 4 * (128 * j + 32 * part), sum);
      else add_anywhere(to + 4 * (128 * j + 32 * part), sum);
    }
  }
}

// A part that was stored and not yet announced, if `number`, of a block and a head, is one. One thread announces it, behind
// a barrier that all have passed after their stores: what it releases includes what the barrier has shown it.
constexpr uint32_t kNone = 0xffffffffu;
struct Announcement {
  uint32_t number = kNone;
  uint32_t turn = 0;
  bool last = false;

  __device__ __forceinline__ void make(uint32_t* semaphores) const {
    if (number != kNone) end_turn(semaphores + number, turn, last);
  }
};

// One ticket, for the whole block.
__device__ __forceinline__ uint32_t block_ticket(uint32_t* tickets, uint32_t* shared_ticket) {
  if (threadIdx.x == 0) *shared_ticket = take_ticket(tickets);
  __syncthreads();
  return *shared_ticket;
}

// ---- a walk over query heads and blocks ----

struct Step {
  uint32_t head;
  int block;  // 64 queries of the sequence
};

struct Walk {
  int first, last;      // blocks
  uint32_t heads_end;   // query heads of the group
  __device__ __forceinline__ Step next(Step at) const {
    return at.block < last ? Step{at.head, at.block + 1} : Step{at.head + 1, first};
  }
  __device__ __forceinline__ bool holds(Step at) const { return at.head < heads_end; }
};

// Of a block and a head: where their semaphore lies, lse2, delta and sums in units of theirs.
__device__ __forceinline__ uint32_t number_of(const BackwardParams& p, const Tile& tile, Step at) {
  return (tile.first_block + at.block) * p.heads + at.head;
}

// Begins to load a step's queries, dO, lse2 and delta.
template <int kHeadDim, class Place>
__device__ __forceinline__ void load_step(const BackwardParams& p, const Tile& tile, Step at, uint32_t shared,
                                          uint32_t stage) {
  using Rows = Swizzled<kHeadDim>;
  const int row = at.block * kBlockRows;
  const uint32_t token = tile.start + row, column = at.head * kHeadDim;
  const uint32_t to = shared + Place::kStage + stage * Place::kStageBytes;
  Rows::template copy<kBlockRows, kThreads>(to, p.q + token * p.q_stride + column, p.q_stride, tile.length - row);
  Rows::template copy<kBlockRows, kThreads>(to + kBlockRows * Rows::kRowBytes, p.d_o + token * p.d_o_stride + column,
                                            p.d_o_stride, tile.length - row);
  if (threadIdx.x < 32) {
    const uint64_t number = number_of(p, tile, at);
    const uint32_t word = threadIdx.x % 16;
    const float* from = (threadIdx.x < 16 ? p.lse2 : p.delta) + number * kBlockRows + 4 * word;
    copy16(shared + Place::kRowValues + stage * Place::kRowValuesBytes + 16 * threadIdx.x, from, true);
  }
  copies_commit();
}

// ---- products ----

// sums += left right, `left` of 16 x 32 in registers, right the rows from `rows` on.
template <int kHeadDim>
__device__ __forceinline__ void accumulate(float (&sums)[kHeadDim / 8][4], const uint32_t (&left)[kPass / 16][4],
                                           uint32_t rows, uint32_t lane_offset) {
  using Rows = Swizzled<kHeadDim>;
#pragma unroll
  for (int step = 0; step < kPass / 16; ++step) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j) {
      uint32_t b[4];
      load_transposed(b, rows + Rows::at(lane_offset, 16 * step, j));
      product(sums[2 * j], left[step], b[0], b[1]);
      product(sums[2 * j + 1], left[step], b[2], b[3]);
    }
  }
}

// S^T and dP^T of the warp's keys and kPass queries.
template <int kHeadDim>
__device__ __forceinline__ void scores(float (&s)[kPass / 8][4], float (&dp)[kPass / 8][4],
                                       const uint32_t (&values)[kHeadDim / 16][4], uint32_t keys, uint32_t queries,
                                       uint32_t d_o, uint32_t lane_offset, uint32_t lane_offset_of_columns) {
  using Rows = Swizzled<kHeadDim>;
#pragma unroll
  for (int j = 0; j < kPass / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] = dp[j][e] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[4];
    load_matrices(a, keys + Rows::at(lane_offset, 0, step));
#pragma unroll
    for (int j = 0; j < kPass / 16; ++j) {
      uint32_t b[4];
      load_matrices(b, queries + Rows::at(lane_offset_of_columns, 16 * j, step));
      product(s[2 * j], a, b[0], b[1]);
      product(s[2 * j + 1], a, b[2], b[3]);
      load_matrices(b, d_o + Rows::at(lane_offset_of_columns, 16 * j, step));
      product(dp[2 * j], values[step], b[0], b[1]);
      product(dp[2 * j + 1], values[step], b[2], b[3]);
    }
  }
}

// Hides keys behind a query: of column j a lane has queries `query` + 8 j and the next, and keys `key` and key + 8.
__device__ __forceinline__ void mask(float (&s)[kPass / 8][4], float (&dp)[kPass / 8][4], int key, int query) {
#pragma unroll
  for (int j = 0; j < kPass / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (key + 8 * (e / 2) > query + 8 * j + e % 2) s[j][e] = -INFINITY, dp[j][e] = 0.0f;
    }
  }
}

// P^T and dS^T in place of S^T and dP^T. `rows` is where lse2 of this lane's first query lies, delta 64 floats behind it.
__device__ __forceinline__ void differentiate(float (&s)[kPass / 8][4], float (&dp)[kPass / 8][4], const float* rows,
                                              float scale_log2) {
#pragma unroll
  for (int j = 0; j < kPass / 8; ++j) {
    const float2 lse2 = *reinterpret_cast<const float2*>(rows + 8 * j);
    const float2 delta = *reinterpret_cast<const float2*>(rows + kBlockRows + 8 * j);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = exp2_fast(fmaf(s[j][e], scale_log2, -(e % 2 ? lse2.y : lse2.x)));
      dp[j][e] = s[j][e] * (dp[j][e] - (e % 2 ? delta.y : delta.x));
    }
  }
}

// Writes a left operand of 16 keys and kPass queries as matrices.
__device__ __forceinline__ void put(uint8_t* matrices, const uint32_t (&operand)[kPass / 16][4]) {
#pragma unroll
  for (int step = 0; step < kPass / 16; ++step) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      uint8_t* to = matrices + word % 2 * kMatrixRow + (2 * step + word / 2) * kMatrix;
      reinterpret_cast<uint32_t*>(to)[threadIdx.x % 32] = operand[step][word];
    }
  }
}

// dq += dS K of 32 queries and kBlocks blocks of columns.
template <int kHeadDim, int kBlocks>
__device__ __forceinline__ void query_gradient(float (&dq)[2][kBlocks][4], uint32_t d_s, uint32_t keys,
                                               uint32_t lane_offset, uint32_t first_step) {
  using Rows = Swizzled<kHeadDim>;
#pragma unroll
  for (int step = 0; step < kKeyTile / 16; ++step) {
    uint32_t a[2][4];
#pragma unroll
    for (int part = 0; part < 2; ++part) load_transposed(a[part], d_s + 2 * step * kMatrixRow + 2 * part * kMatrix);
#pragma unroll
    for (int j = 0; j < kBlocks / 2; ++j) {
      uint32_t b[4];
      load_transposed(b, keys + Rows::at(lane_offset, 16 * step, first_step + j));
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        product(dq[part][2 * j], a[part], b[0], b[1]);
        product(dq[part][2 * j + 1], a[part], b[2], b[3]);
      }
    }
  }
}

// Writes 16 rows of dK or dV, of which lane l has `upper` and upper + 8.
template <int kBlocks>
__device__ __forceinline__ void store(__nv_bfloat16* to, uint64_t stride, const float (&sums)[kBlocks][4],
                                      float factor, int upper, int length) {
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = upper + 8 * r;
#pragma unroll
    for (int j = 0; j < kBlocks; j += 4) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = pack(sums[j + i][2 * r] * factor, sums[j + i][2 * r + 1] * factor);
      const Bf16x8 word = gather_quad(pairs);
      if (row < length) store16(to + row * stride + 8 * (j + quad_lane), word);
    }
  }
}

// ---- a tile, 16 keys a warp ----

template <int kHeadDim, int kStages, bool kOrdered>
__device__ __forceinline__ void differentiate_tile(const BackwardParams& p) {
  using Rows = Swizzled<kHeadDim>;
  using Place = Shared<kHeadDim, kStages, false>;
  constexpr int kColumns = kHeadDim / 8;
  constexpr int kBlocks = kColumns / 4;  // blocks of columns of dQ a warp
  extern __shared__ __align__(128) uint8_t bytes[];
  const uint32_t shared = shared_address(bytes);
  const uint32_t ticket = block_ticket(p.tickets, reinterpret_cast<uint32_t*>(bytes + Place::kTicket));
  const Tile tile = p.tiles[ticket];
  const uint32_t kv_head = tile.kv_head;
  const uint32_t group = p.heads / p.kv_heads;
  const int n = tile.row / kKeyTile;
  const Walk walk = {2 * n, (tile.length - 1) / kBlockRows, (kv_head + 1) * group};

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_key = kWarpKeys * warp;  // in the tile
  const int dq_half = warp % 2, dq_quarter = warp / 2;
  uint32_t lane_offset = Rows::lane_offset(threadIdx.x);
  uint32_t lane_offset_of_columns = Rows::lane_offset_of_columns(threadIdx.x);
  const uint32_t keys = shared + Place::kKeys;
  // Lanes 0-15 point at the matrices of queries 0-7 and 8-15, lanes 16-31 at those of the next eight keys.
  const uint32_t d_s = shared + Place::kDScores + lane / 16 * kMatrixRow + (4 * dq_half + lane / 8 % 2) * kMatrix +
                       lane % 8 * 16;
  const float scale_log2 = p.scale * kLog2E;

  float dk[kColumns][4], dv[kColumns][4];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dk[j][e] = dv[j][e] = 0.0f;
  }

  // Keys stay in shared memory; values pass through the last stage into registers.
  uint32_t values[kHeadDim / 16][4];
  Step at = {kv_head * group, walk.first};
  {
    const uint32_t token = tile.start + tile.row, column = kv_head * kHeadDim;
    const uint32_t passage = shared + Place::kStage + (kStages - 1) * Place::kStageBytes;
    const int rows = tile.length - tile.row;
    Rows::template copy<kKeyTile, kThreads>(passage, p.v + token * p.v_stride + column, p.v_stride, rows);
    Rows::template copy<kKeyTile, kThreads>(keys, p.k + token * p.k_stride + column, p.k_stride, rows);
    copies_commit();
    if (kStages > 1) load_step<kHeadDim, Place>(p, tile, at, shared, 0);
    copies_wait<kStages - 1>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step)
      load_matrices(values[step], passage + Rows::at(lane_offset, first_key, step));
    if (kStages == 1) {
      __syncthreads();
      load_step<kHeadDim, Place>(p, tile, at, shared, 0);
    }
  }

  Announcement before;
  for (uint32_t stage = 0; walk.holds(at);) {
    const Step next = walk.next(at);
    const uint32_t queries = shared + Place::kStage + stage * Place::kStageBytes;
    const uint32_t d_o = queries + kBlockRows * Rows::kRowBytes;
    // What follows from these would take registers that the sums need.
    forget(lane_offset), forget(lane_offset_of_columns);

    // Queries have come, and nobody reads what the step before has used.
    copies_wait<0>();
    __syncthreads();
    if (kStages > 1 && walk.holds(next)) load_step<kHeadDim, Place>(p, tile, next, shared, stage ^ 1);

    const uint32_t number = number_of(p, tile, at);
    float* sums = p.dq_sums + static_cast<uint64_t>(number) * (kBlockRows * kHeadDim) +
                  4 * (128 * kBlocks * dq_quarter + 64 * dq_half + lane);
    const uint32_t own_turn = turn(tile, n, at.block);
    float dq[2][kBlocks][4];

    const int ahead = (at.block - walk.first) * kBlockRows;  // of the block's first query before the tile's first key
#pragma unroll
    for (int pass = 0; pass < kBlockRows / kPass; ++pass) {
      const int query = ahead + pass * kPass;
      const bool sees = first_key < query + kPass;
      uint32_t p_operand[kPass / 16][4], ds_operand[kPass / 16][4];
      if (sees) {
        float s[kPass / 8][4], dp[kPass / 8][4];
        scores<kHeadDim>(s, dp, values, keys + first_key * Rows::kRowBytes, queries + pass * kPass * Rows::kRowBytes,
                         d_o + pass * kPass * Rows::kRowBytes, lane_offset, lane_offset_of_columns);
        if (first_key + kWarpKeys > query + 1) mask(s, dp, first_key + lane / 4, query + 2 * (lane % 4));
        const float* rows = reinterpret_cast<const float*>(bytes + Place::kRowValues + stage * Place::kRowValuesBytes);
        differentiate(s, dp, rows + pass * kPass + 2 * (lane % 4), scale_log2);
#pragma unroll
        for (int step = 0; step < kPass / 16; ++step) {
          as_operand(p_operand[step], s[2 * step], s[2 * step + 1]);
          as_operand(ds_operand[step], dp[2 * step], dp[2 * step + 1]);
        }
      } else {
#pragma unroll
        for (int step = 0; step < kPass / 16; ++step) {
#pragma unroll
          for (int word = 0; word < 4; ++word) ds_operand[step][word] = 0;
        }
      }
      put(bytes + Place::kDScores + first_key / 8 * kMatrixRow + pass * (kPass / 8) * kMatrix, ds_operand);

      if (pass == 0 && kOrdered && threadIdx.x == 0) before.make(p.semaphores);
      if (sees) accumulate<kHeadDim>(dv, p_operand, d_o + pass * kPass * Rows::kRowBytes, lane_offset);
      if (pass == kBlockRows / kPass - 1) {
        if (kOrdered && own_turn > 0) {
          if (lane == 0) await_turn(p.semaphores + number, own_turn);
          __syncwarp();
        }
        fetch_sums(dq, sums, kOrdered && own_turn > 0);
      }
      if (sees) accumulate<kHeadDim>(dk, ds_operand, queries + pass * kPass * Rows::kRowBytes, lane_offset);
    }

    // dS is written, and nobody reads the queries.
    __syncthreads();
    if (kStages == 1 && walk.holds(next)) load_step<kHeadDim, Place>(p, tile, next, shared, 0);
    query_gradient<kHeadDim, kBlocks>(dq, d_s, keys, lane_offset, dq_quarter * kBlocks / 2);
    keep_sums<kOrdered>(sums, dq);
    before = {number, own_turn, static_cast<int>(own_turn) == at.block / 2};
    at = next;
    if (kStages > 1) stage ^= 1;
  }
  if (kOrdered) {
    __syncthreads();
    if (threadIdx.x == 0) before.make(p.semaphores);
  }
  if (threadIdx.x == 0) return_tickets(p.tickets);

  const uint64_t token = static_cast<uint32_t>(tile.start + tile.row);
  const uint32_t column = kv_head * kHeadDim;
  const int upper = first_key + lane / 4, length = tile.length - tile.row;
  store<kColumns>(p.dv + token * p.dv_stride + column, p.dv_stride, dv, 1.0f, upper, length);
  store<kColumns>(p.dk + token * p.dk_stride + column, p.dk_stride, dk, p.scale, upper, length);
}

// ---- by pairs of warps ----

// S^T and dP^T of 32 keys and kPass queries.
template <int kHeadDim>
__device__ __forceinline__ void pair_scores(float (&s)[2][kPass / 8][4], float (&dp)[2][kPass / 8][4], uint32_t keys,
                                            uint32_t values, uint32_t queries, uint32_t d_o) {
  using Rows = Swizzled<kHeadDim>;
  const uint32_t thread = fresh_thread();
  const uint32_t of_rows = Rows::lane_offset(thread), of_columns = Rows::lane_offset_of_columns(thread);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int j = 0; j < kPass / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[part][j][e] = dp[part][j][e] = 0.0f;
    }
  }
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[2][4], b[kPass / 16][4];
#pragma unroll
    for (int part = 0; part < 2; ++part) load_matrices(a[part], keys + Rows::at(of_rows, 16 * part, step));
#pragma unroll
    for (int j = 0; j < kPass / 16; ++j) load_matrices(b[j], queries + Rows::at(of_columns, 16 * j, step));
#pragma unroll
    for (int j = 0; j < kPass / 8; ++j) {
#pragma unroll
      for (int part = 0; part < 2; ++part) product(s[part][j], a[part], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) load_matrices(a[part], values + Rows::at(of_rows, 16 * part, step));
#pragma unroll
    for (int j = 0; j < kPass / 16; ++j) load_matrices(b[j], d_o + Rows::at(of_columns, 16 * j, step));
#pragma unroll
    for (int j = 0; j < kPass / 8; ++j) {
#pragma unroll
      for (int part = 0; part < 2; ++part) product(dp[part][j], a[part], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// sums += left right of 32 keys, the block's queries, and half of the columns from 16 first_column on.
template <int kHeadDim>
__device__ __forceinline__ void pair_accumulate(float (&sums)[2][kHeadDim / 16][4], uint32_t left, uint32_t rows,
                                                uint32_t first_column) {
  using Rows = Swizzled<kHeadDim>;
  const uint32_t of_rows = Rows::lane_offset(fresh_thread());
#pragma unroll
  for (int step = 0; step < kBlockRows / 16; ++step) {
    uint32_t a[2][4];
#pragma unroll
    for (int part = 0; part < 2; ++part) load_matrices(a[part], left + 2 * part * kMatrixRow + 2 * step * kMatrix);
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      uint32_t b[4];
      load_transposed(b, rows + Rows::at(of_rows, 16 * step, first_column + j));
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        product(sums[part][2 * j], a[part], b[0], b[1]);
        product(sums[part][2 * j + 1], a[part], b[2], b[3]);
      }
    }
  }
}

template <int kHeadDim, bool kOrdered>
__device__ __forceinline__ void differentiate_tile_by_pairs(const BackwardParams& p) {
  using Rows = Swizzled<kHeadDim>;
  using Place = Shared<kHeadDim, 2, true>;
  constexpr int kColumns = kHeadDim / 16;  // blocks of columns of dK and dV a warp
  constexpr int kBlocks = kHeadDim / 32;   // blocks of columns of dQ a warp
  extern __shared__ __align__(128) uint8_t bytes[];
  const uint32_t shared = shared_address(bytes);
  const uint32_t ticket = block_ticket(p.tickets, reinterpret_cast<uint32_t*>(bytes + Place::kTicket));
  const Tile tile = p.tiles[ticket];
  const uint32_t kv_head = tile.kv_head;
  const uint32_t group = p.heads / p.kv_heads;
  const int n = tile.row / kKeyTile;
  const Walk walk = {2 * n, (tile.length - 1) / kBlockRows, (kv_head + 1) * group};

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int half = warp % 2, quarter = warp / 2;
  const int first_key = 32 * quarter;  // in the tile
  const uint32_t keys = shared + Place::kKeys, values = shared + Place::kValues;
  // Of the matrices of P^T and dS^T: lanes 8-15 point at the next eight keys, lanes 16-31 at the next eight queries; for dQ,
  // transposed, the other way round.
  const uint32_t left = quarter * 4 * kMatrixRow + lane / 8 % 2 * kMatrixRow + lane / 16 * kMatrix + lane % 8 * 16;
  const uint32_t d_s = shared + Place::kDScores + lane / 16 * kMatrixRow + (4 * half + lane / 8 % 2) * kMatrix +
                       lane % 8 * 16;
  uint8_t* matrices = bytes + quarter * 4 * kMatrixRow + half * 4 * kMatrix;  // this warp's own
  const float scale_log2 = p.scale * kLog2E;

  float dk[2][kColumns][4], dv[2][kColumns][4];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[part][j][e] = dv[part][j][e] = 0.0f;
    }
  }

  Step at = {kv_head * group, walk.first};
  {
    const uint32_t token = tile.start + tile.row, column = kv_head * kHeadDim;
    const int rows = tile.length - tile.row;
    Rows::template copy<kKeyTile, kThreads>(keys, p.k + token * p.k_stride + column, p.k_stride, rows);
    Rows::template copy<kKeyTile, kThreads>(values, p.v + token * p.v_stride + column, p.v_stride, rows);
    load_step<kHeadDim, Place>(p, tile, at, shared, 0);
  }

  Announcement before;
  for (uint32_t stage = 0; walk.holds(at); stage ^= 1) {
    const Step next = walk.next(at);
    const uint32_t queries = shared + Place::kStage + stage * Place::kStageBytes;
    const uint32_t d_o = queries + kBlockRows * Rows::kRowBytes;
    const int ahead = (at.block - walk.first) * kBlockRows;  // of the block's first query before the tile's first key
    const int query = ahead + kPass * half;
    const uint32_t number = number_of(p, tile, at);
    const uint32_t own_turn = turn(tile, n, at.block);

    // Queries have come, and nobody reads what the step before has used.
    copies_wait<0>();
    __syncthreads();
    if (walk.holds(next)) load_step<kHeadDim, Place>(p, tile, next, shared, stage ^ 1);

    // One thread waits for the turn, early, so that its warp catches up; the next barrier tells the others.
    if (kOrdered && threadIdx.x == 32 && own_turn > 0) await_turn(p.semaphores + number, own_turn);
    __syncwarp();

    uint32_t p_operand[2][kPass / 16][4] = {}, ds_operand[2][kPass / 16][4] = {};
    if (first_key < query + kPass) {
      float s[2][kPass / 8][4], dp[2][kPass / 8][4];
      pair_scores<kHeadDim>(s, dp, keys + first_key * Rows::kRowBytes, values + first_key * Rows::kRowBytes,
                            queries + kPass * half * Rows::kRowBytes, d_o + kPass * half * Rows::kRowBytes);
      const float* rows = reinterpret_cast<const float*>(bytes + Place::kRowValues + stage * Place::kRowValuesBytes);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int key = first_key + 16 * part;
        if (key + 16 > query + 1) mask(s[part], dp[part], key + lane / 4, query + 2 * (lane % 4));
        differentiate(s[part], dp[part], rows + kPass * half + 2 * (lane % 4), scale_log2);
#pragma unroll
        for (int step = 0; step < kPass / 16; ++step) {
          as_operand(p_operand[part][step], s[part][2 * step], s[part][2 * step + 1]);
          as_operand(ds_operand[part][step], dp[part][2 * step], dp[part][2 * step + 1]);
        }
      }
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      put(matrices + Place::kProbabilities + 2 * part * kMatrixRow, p_operand[part]);
      put(matrices + Place::kDScores + 2 * part * kMatrixRow, ds_operand[part]);
    }

    // P and dS are written.
    __syncthreads();
    if (kOrdered && threadIdx.x == 0) before.make(p.semaphores);
    __syncwarp();
    float* sums = p.dq_sums + static_cast<uint64_t>(number) * (kBlockRows * kHeadDim) +
                  4 * (128 * kBlocks * quarter + 64 * half + lane);
    float dq[2][kBlocks][4];
    fetch_sums(dq, sums, kOrdered && own_turn > 0);
    if (first_key < ahead + kBlockRows) {
      pair_accumulate<kHeadDim>(dv, shared + Place::kProbabilities + left, d_o, kColumns / 2 * half);
      pair_accumulate<kHeadDim>(dk, shared + Place::kDScores + left, queries, kColumns / 2 * half);
    }
    query_gradient<kHeadDim, kBlocks>(dq, d_s, keys, Rows::lane_offset(fresh_thread()), quarter * kBlocks / 2);
    keep_sums<kOrdered>(sums, dq);
    before = {number, own_turn, static_cast<int>(own_turn) == at.block / 2};
    at = next;
  }
  if (kOrdered) {
    __syncthreads();
    if (threadIdx.x == 0) before.make(p.semaphores);
  }
  if (threadIdx.x == 0) return_tickets(p.tickets);

  const uint64_t token = static_cast<uint32_t>(tile.start + tile.row);
  const uint32_t column = kv_head * kHeadDim + kHeadDim / 2 * half;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int upper = first_key + 16 * part + lane / 4, length = tile.length - tile.row;
    store<kColumns>(p.dv + token * p.dv_stride + column, p.dv_stride, dv[part], 1.0f, upper, length);
    store<kColumns>(p.dk + token * p.dk_stride + column, p.dk_stride, dk[part], p.scale, upper, length);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_backward_64(const __grid_constant__ BackwardParams p) {
  differentiate_tile<64, 2, true>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_backward_128(const __grid_constant__ BackwardParams p) {
  differentiate_tile_by_pairs<128, true>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_backward_compact_128(const __grid_constant__ BackwardParams p) {
  differentiate_tile<128, 1, true>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_backward_unordered_64(const __grid_constant__ BackwardParams p) {
  differentiate_tile<64, 2, false>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_backward_unordered_128(const __grid_constant__ BackwardParams p) {
  differentiate_tile_by_pairs<128, false>(p);
}
