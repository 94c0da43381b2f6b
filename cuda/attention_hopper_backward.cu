// Causal packed attention with grouped heads on Hopper, backward: dQ, dK and dV, the same bits at every run.
// targets: sm_90a
//
// Operands   include/attention.cuh has the arguments, tiles, turns and the order of dq_sums.
//   q, d_o [tokens, heads, d], k, v [tokens, kv_heads, d] bf16 behind tensor maps; lse2, delta from attention_prepare;
//   dk, dv [tokens, kv_heads, d] bf16, aligned to 16 bytes, token stride a multiple of 8. dq_sums is what
//   attention_finish turns into dq. d is 64 or 128.
//   P = exp2(scale * log2(e) * S - lse2) and dS = P * (dP - delta) are f32 and rounded to bf16 as operands.
//
// Launch     blocks of 384, at most one a multiprocessor, dynamic shared memory of kBytes<d> (below), all tickets taken.
//
// Shape      A block keeps 128 keys and values of one key head and walks, for each query head of its group, the blocks of
//   64 queries from its diagonal on, so dK and dV stay in registers until all heads have given their part. Scores are
//   computed transposed, keys down and queries across: P is then the left operand of dV += P^T dO as it lies in
//   registers. Both warpgroups put their half of dS into shared memory, for dK += dS^T Q, to have its registers back, and
//   for dQ = dS K, of which each computes half of the columns; two warps take turns to add them to dq_sums, by TMA, when
//   it is the tile's turn. The scores of the next block are on the tensor cores while dS of this one is gathered.
//   In a tile's first block no query sees the upper 64 keys.
//
// Cost       10 d FLOPs a visible pair. dq_sums takes 4 d bytes a row for every key tile, in L2 mostly.
//
// Twin       attention_backward_reference in src/kernels/attention/reference.rs.
#include "attention_hopper.cuh"
#include "hopper.cuh"

namespace {

using namespace granite::attention;
using namespace granite::hopper;

// Queries are let go at the end of their step and wanted again, for the scores ahead, in the middle of the one before their
// own: with two stages half a step would have to hide the load.
constexpr int kQueryStages = 3;
constexpr int kGradientStages = 2;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kThreads = kWarpgroup + kConsumerThreads;
constexpr int kConsumerWarps = kConsumerThreads / 32;
constexpr int kWriters = 2;
constexpr int kKeys = kKeyTile / kConsumers;  // keys of a warpgroup

// Numbered barriers: 0 is __syncthreads.
constexpr uint32_t kConsumerBarrier = 1;

template <int kHeadDim>
struct Shared {
  static constexpr int kPanels = kHeadDim / 64;
  __nv_bfloat16 k[kPanels][kKeyTile * 64];
  __nv_bfloat16 v[kPanels][kKeyTile * 64];
  __nv_bfloat16 q[kQueryStages][kPanels][kBlockRows * 64];
  __nv_bfloat16 d_o[kGradientStages][kPanels][kBlockRows * 64];
  __nv_bfloat16 ds[2][kKeyTile * kBlockRows];  // a row a key
  float dq[kConsumers][kBlockRows * kHeadDim / kConsumers];
  float lse2[kQueryStages][kBlockRows];
  float delta[kGradientStages][kBlockRows];
  uint64_t kv_full, kv_empty;
  uint64_t q_full[kQueryStages], q_empty[kQueryStages];
  uint64_t d_o_full[kGradientStages], d_o_empty[kGradientStages];
  uint64_t dq_full[kWriters][kConsumers], dq_empty[kConsumers];
  uint64_t ticket_full[2], ticket_empty[2];
  uint32_t tickets[2];
};

template <int kHeadDim>
constexpr uint32_t kBytes = sizeof(Shared<kHeadDim>);
static_assert(kBytes<128> == 214456 && kBytes<64> == 124344, "src/kernels/attention/gpu.rs has the same numbers");

// Where the compiler knows its address: registers are too few for pointers into it.
extern __shared__ __align__(1024) uint8_t shared_memory[];

// The next ticket, as all roles but the loading one read it.
template <bool kWholeWarp, int kHeadDim>
__device__ __forceinline__ uint32_t next_ticket(Shared<kHeadDim>& shared, uint32_t turn) {
  const uint32_t slot = turn % 2;
  barrier_wait(shared.ticket_full[slot], turn / 2 % 2);
  const uint32_t ticket = shared.tickets[slot];
  if (kWholeWarp) __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(shared.ticket_empty[slot]);
  return ticket;
}

// A ring of stages: where it is, and in which round.
template <int kStages>
struct Pipe {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// A walk over a tile's blocks, for each of its heads.
struct Walk {
  int head, m, first, blocks, left;
  __device__ __forceinline__ Walk(const Tile& tile, uint32_t kv_head, int group)
      : head(static_cast<int>(kv_head) * group),
        m(tile.row / kBlockRows),
        first(m),
        blocks((tile.length + kBlockRows - 1) / kBlockRows),
        left(group * (blocks - m)) {}
  __device__ __forceinline__ void advance() {
    --left;
    if (++m == blocks) m = first, ++head;
  }
};

// ---- the warp that takes tickets and loads keys, values and queries, and the one that loads dO: one lane of each ----

template <int kHeadDim>
__device__ __forceinline__ void load_queries(const HopperBackwardParams& p, Shared<kHeadDim>& shared) {
  constexpr int kPanels = Shared<kHeadDim>::kPanels;
  constexpr uint32_t kTileBytes = kKeyTile * kHeadDim * 2, kBlockBytes = kBlockRows * kHeadDim * 2;
  constexpr uint32_t kRowBytes = kBlockRows * sizeof(float);
  const uint32_t works = p.tile_count;
  prefetch_map(&p.q), prefetch_map(&p.k), prefetch_map(&p.v);
  Pipe<kQueryStages> pipe;
  for (uint32_t turn = 0;; ++turn) {
    const uint32_t ticket = take_ticket(p.tickets);
    const uint32_t slot = turn % 2;
    barrier_wait(shared.ticket_empty[slot], turn / 2 % 2 ^ 1);
    shared.tickets[slot] = ticket;
    barrier_arrive(shared.ticket_full[slot]);
    if (ticket >= works) break;

    const Tile& tile = p.tiles[ticket];
    const int start = tile.start, kv_head = tile.kv_head;
    barrier_wait(shared.kv_empty, turn % 2 ^ 1);
    barrier_arrive_expecting(shared.kv_full, 2 * kTileBytes);
    for (int panel = 0; panel < kPanels; ++panel) {
      load_box(shared.k[panel], &p.k, shared.kv_full, 64 * panel, kv_head, start + tile.row);
      load_box(shared.v[panel], &p.v, shared.kv_full, 64 * panel, kv_head, start + tile.row);
    }
    const uint32_t block = tile.first_block;
#pragma unroll 1
    for (Walk walk(tile, kv_head, p.heads / p.kv_heads); walk.left > 0; walk.advance()) {
      uint64_t& full = shared.q_full[pipe.stage];
      // A stage is empty before its first use.
      barrier_wait(shared.q_empty[pipe.stage], pipe.parity ^ 1);
      barrier_arrive_expecting(full, kBlockBytes + kRowBytes);
      for (int panel = 0; panel < kPanels; ++panel)
        load_passing_box(shared.q[pipe.stage][panel], &p.q, full, 64 * panel, walk.head, start + walk.m * kBlockRows);
      load_bytes(shared.lse2[pipe.stage], p.lse2 + ((block + walk.m) * p.heads + walk.head) * kBlockRows, kRowBytes, full);
      pipe.advance();
    }
  }
  return_tickets(p.tickets);
}

template <int kHeadDim>
__device__ __forceinline__ void load_gradients(const HopperBackwardParams& p, Shared<kHeadDim>& shared) {
  constexpr int kPanels = Shared<kHeadDim>::kPanels;
  constexpr uint32_t kBlockBytes = kBlockRows * kHeadDim * 2, kRowBytes = kBlockRows * sizeof(float);
  const uint32_t works = p.tile_count;
  prefetch_map(&p.d_o);
  Pipe<kGradientStages> pipe;
  for (uint32_t turn = 0;; ++turn) {
    const uint32_t ticket = next_ticket<false>(shared, turn);
    if (ticket >= works) break;
    const Tile& tile = p.tiles[ticket];
    const int start = tile.start;
    const uint32_t block = tile.first_block;
#pragma unroll 1
    for (Walk walk(tile, tile.kv_head, p.heads / p.kv_heads); walk.left > 0; walk.advance()) {
      uint64_t& full = shared.d_o_full[pipe.stage];
      barrier_wait(shared.d_o_empty[pipe.stage], pipe.parity ^ 1);
      barrier_arrive_expecting(full, kBlockBytes + kRowBytes);
      for (int panel = 0; panel < kPanels; ++panel)
        load_passing_box(shared.d_o[pipe.stage][panel], &p.d_o, full, 64 * panel, walk.head, start + walk.m * kBlockRows);
      load_bytes(shared.delta[pipe.stage], p.delta + ((block + walk.m) * p.heads + walk.head) * kBlockRows, kRowBytes,
                 full);
      pipe.advance();
    }
  }
}

// ---- the warps that add dq: one lane of each, every second block ----

template <int kHeadDim, bool kOrdered>
__device__ __forceinline__ void write(const HopperBackwardParams& p, Shared<kHeadDim>& shared, uint32_t writer) {
  constexpr uint32_t kHalf = kBlockRows * kHeadDim / kConsumers;
  const uint32_t works = p.tile_count;
  uint32_t step = 0;
  for (uint32_t turns = 0;; ++turns) {
    const uint32_t ticket = next_ticket<false>(shared, turns);
    if (ticket >= works) break;
    const Tile& tile = p.tiles[ticket];
    const int group_last = tile.group_last, before = tile.group_first - tile.row / kKeyTile;
    const uint32_t block = tile.first_block;
#pragma unroll 1
    for (Walk walk(tile, tile.kv_head, p.heads / p.kv_heads); walk.left > 0; walk.advance(), ++step) {
      if (step % kWriters != writer) continue;
      const uint32_t at = (block + walk.m) * p.heads + walk.head;
      const int turn = kOrdered ? before + min(group_last, walk.m / 2) : 0;
      if (kOrdered) {
        await_turn(p.semaphores + at, turn);
        fence_global_for_async();
      }
      float* to = p.dq_sums + static_cast<uint64_t>(at) * (kBlockRows * kHeadDim);
#pragma unroll
      for (int part = 0; part < kConsumers; ++part) {
        barrier_wait(shared.dq_full[writer][part], step / kWriters % 2);
        if (kOrdered && turn == 0)
          store_kept_bytes(to + part * kHalf, shared.dq[part], kHalf * sizeof(float));
        else
          add_kept_f32(to + part * kHalf, shared.dq[part], kHalf * sizeof(float));
        stores_commit();
      }
      stores_wait_read<1>();
      barrier_arrive(shared.dq_empty[0]);
      stores_wait_read<0>();
      barrier_arrive(shared.dq_empty[1]);
      if (kOrdered) {
        stores_wait<0>();
        end_turn(p.semaphores + at, turn, turn == walk.m / 2);
      }
    }
  }
  stores_wait<0>();
}

// ---- the warpgroups that compute ----

// Rows that belong to the next sequence count for nothing, whatever they hold: zeros, because a zero probability times NaN
// would be NaN.
template <int kRows>
__device__ __forceinline__ void clear_rows(__nv_bfloat16 (&panel)[kRows * 64], int first, int thread) {
  for (int i = first * 8 + thread; i < kRows * 8; i += kConsumerThreads)
    reinterpret_cast<uint4*>(panel)[i] = make_uint4(0, 0, 0, 0);
}

// Transposed scores of 64 keys and a block of queries; also dP^T from values and dO.
template <int kHeadDim>
__device__ __forceinline__ void scores(float (&s)[8][4], uint64_t keys, uint64_t queries) {
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const uint64_t along = step % 4 * kStepByRows;
    const uint64_t key_panel = step / 4 * (kKeyTile * 128 >> 4), query_panel = step / 4 * (kBlockRows * 128 >> 4);
    product<false, false>(s, keys + key_panel + along, queries + query_panel + along, step > 0);
  }
  products_commit();
}

// sums += a b, of a [64 keys, 64 queries] in registers and b [64 queries, d] in shared memory.
template <int kHeadDim>
__device__ __forceinline__ void accumulate(float (&sums)[kHeadDim / 8][4], const uint32_t (&a)[4][4], uint64_t b,
                                           int keep) {
#pragma unroll
  for (int step = 0; step < 4; ++step) product<true>(sums, a[step], b + step * kStepByColumns, keep | (step > 0));
  products_commit();
}

// Writes 64 rows of keys' or values' gradients from their accumulators.
template <int kHeadDim>
__device__ __forceinline__ void store_rows(const float (&d)[kHeadDim / 8][4], float factor, __nv_bfloat16* to,
                                           uint64_t stride, int upper, int rows) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = upper + 8 * r;
    __nv_bfloat16* at = to + static_cast<uint64_t>(row) * stride + 8 * (threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; j += 4) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = granite::pack(d[j + i][2 * r] * factor, d[j + i][2 * r + 1] * factor);
      const granite::Bf16x8 eight = gather_quad(pairs);
      if (row < rows) *reinterpret_cast<granite::Bf16x8*>(at + 8 * j) = eight;
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void compute(const HopperBackwardParams& p, Shared<kHeadDim>& shared) {
  constexpr int kPanels = Shared<kHeadDim>::kPanels;
  constexpr int kColumns = kHeadDim / 8;
  constexpr int kDqColumns = kColumns / kConsumers;
  const int thread = threadIdx.x - kWarpgroup;
  const int part = thread / kWarpgroup;
  const int warp = thread / 32 % 4, lane = threadIdx.x % 32;
  const int upper = kKeys * part + 16 * warp + lane / 4;  // this lane's upper key in the tile; the lower is 8 below
  const uint32_t works = p.tile_count;
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const float scale_log2 = p.scale * kLog2E;

  const uint64_t half_rows = part * (kKeys * 128 >> 4);
  const uint64_t keys = by_rows(shared.k[0]) + half_rows, values = by_rows(shared.v[0]) + half_rows;
  // The warpgroup's half of the columns of K, as the right operand of dQ.
  const uint64_t keys_down = kPanels == 2 ? by_columns(shared.k[part], 0)
                                          : by_columns(shared.k[0], 0) + part * (kHeadDim >> 4);
  // Where this lane's rows of stmatrix begin, less the buffer and the column.
  const int ds_row = kKeys * part + 16 * warp + lane % 16;

  Pipe<kQueryStages> queries;
  Pipe<kGradientStages> gradients;
  uint32_t step = 0;
  for (uint32_t turns = 0;; ++turns) {
    const uint32_t ticket = next_ticket<true>(shared, turns);
    if (ticket >= works) break;
    const Tile tile = p.tiles[ticket];
    const uint32_t kv_head = tile.kv_head;
    const int first = tile.row / kBlockRows, blocks = (tile.length + kBlockRows - 1) / kBlockRows;
    const int steps = group * (blocks - first);

    float dk[kColumns][4], dv[kColumns][4];
    float s[8][4];
    // Waits for a block of queries and, where the sequence ends in it, clears what follows.
    auto await_queries = [&](int m) {
      barrier_wait(shared.q_full[queries.stage], queries.parity);
      const int rows = tile.length - m * kBlockRows;
      if (rows < kBlockRows) {
        barrier_wait(shared.d_o_full[gradients.stage], gradients.parity);
        for (int panel = 0; panel < kPanels; ++panel) {
          clear_rows<kBlockRows>(shared.q[queries.stage][panel], rows, thread);
          clear_rows<kBlockRows>(shared.d_o[gradients.stage][panel], rows, thread);
        }
        fence_shared_for_async();
        named_sync(kConsumerBarrier, kConsumerThreads);
      }
    };

    barrier_wait(shared.kv_full, turns % 2);
    if (tile.row + kKeyTile > tile.length) {
      for (int panel = 0; panel < kPanels; ++panel)
        clear_rows<kKeyTile>(shared.k[panel], tile.length - tile.row, thread);
      fence_shared_for_async();
      named_sync(kConsumerBarrier, kConsumerThreads);
    }
    await_queries(first);
    products_begin();
    scores<kHeadDim>(s, keys, by_rows(shared.q[queries.stage][0]));
    products_wait<0>();
    settle(s);

    int m = first;
    for (int i = 0;;) {
      const uint32_t stage = queries.stage, d_o_stage = gradients.stage;
      float dp[8][4];
      barrier_wait(shared.d_o_full[d_o_stage], gradients.parity);
      products_begin();
      scores<kHeadDim>(dp, values, by_rows(shared.d_o[d_o_stage][0]));

      const int offset = (m - first) * kBlockRows + 2 * (lane % 4);  // this lane's first query, from the tile's first key
      const bool masked = m - first < 2;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 lse2 = *reinterpret_cast<const float2*>(&shared.lse2[stage][8 * j + 2 * (lane % 4)]);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          s[j][e] = exp2_fast(fmaf(s[j][e], scale_log2, -(e % 2 == 0 ? lse2.x : lse2.y)));
      }
      if (masked) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (upper + 8 * (e / 2) > offset + 8 * j + e % 2) s[j][e] = 0.0f;
        }
      }
      uint32_t operand[4][4];
      as_operand(operand, s);
      settle(operand);
      products_begin();
      accumulate<kHeadDim>(dv, operand, by_columns(shared.d_o[d_o_stage][0], kBlockRows * 128), i > 0);
      products_wait<1>();
      settle(dp);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 delta = *reinterpret_cast<const float2*>(&shared.delta[d_o_stage][8 * j + 2 * (lane % 4)]);
#pragma unroll
        for (int e = 0; e < 4; ++e) dp[j][e] = s[j][e] * (dp[j][e] - (e % 2 == 0 ? delta.x : delta.y));
      }
      if (masked) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (upper + 8 * (e / 2) > offset + 8 * j + e % 2) dp[j][e] = 0.0f;
        }
      }
      uint32_t ds[4][4];
      as_operand(ds, dp);
      __nv_bfloat16* buffer = shared.ds[step % 2];
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        const uint32_t chunk = static_cast<uint32_t>(2 * column + lane / 16) ^ (ds_row % 8);
        store_matrices(shared_address(buffer) + ds_row * 128 + chunk * 16, ds[column]);
      }
      fence_shared_for_async();

      // The scores of the next block, on the tensor cores while this one's dS is gathered; after the last block once more
      // those of this one, which nobody reads.
      const bool more = ++i < steps;
      queries.advance();
      gradients.advance();
      if (more) {
        if (++m == blocks) m = first;
        await_queries(m);
      }
      products_begin();
      scores<kHeadDim>(s, keys, by_rows(shared.q[more ? queries.stage : stage][0]));
      products_wait<1>();  // dV, whose operand's registers dQ needs
      settle(operand);
      __syncwarp();
      if (lane == 0) barrier_arrive(shared.d_o_empty[d_o_stage]);
      named_sync(kConsumerBarrier, kConsumerThreads);
      products_begin();
      const uint64_t left = by_columns(buffer, 0);
      float dq[kDqColumns][4];
#pragma unroll
      for (int step16 = 0; step16 < kKeyTile / 16; ++step16)
        product<true, true>(dq, left + step16 * kStepByColumns, keys_down + step16 * kStepByColumns, step16 > 0);
      products_commit();
      // dS from shared memory here too: its registers are the next scores'.
      const uint64_t own = by_rows(buffer) + half_rows, queries_down = by_columns(shared.q[stage][0], kBlockRows * 128);
#pragma unroll
      for (int step16 = 0; step16 < kBlockRows / 16; ++step16)
        product<false, true>(dk, own + step16 * kStepByRows, queries_down + step16 * kStepByColumns,
                             (i > 1) | (step16 > 0));
      products_commit();
      products_wait<1>();
      settle(dq);
      settle(s);
      barrier_wait(shared.dq_empty[part], step % 2 ^ 1);
      float4* to = reinterpret_cast<float4*>(shared.dq[part]) + thread % kWarpgroup;
#pragma unroll
      for (int j = 0; j < kDqColumns; ++j)
        to[j * kWarpgroup] = make_float4(dq[j][0], dq[j][1], dq[j][2], dq[j][3]);
      fence_shared_for_async();
      __syncwarp();
      if (lane == 0) barrier_arrive(shared.dq_full[step % kWriters][part]);
      ++step;
      products_wait<0>();
      __syncwarp();
      if (lane == 0) barrier_arrive(shared.q_empty[stage]);
      if (!more) break;
    }

    settle(dk);
    settle(dv);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.kv_empty);
    const uint64_t token = static_cast<uint64_t>(tile.start + tile.row);
    const int rows = tile.length - tile.row;
    store_rows<kHeadDim>(dv, 1.0f, p.dv + token * p.dv_stride + kv_head * kHeadDim, p.dv_stride, upper, rows);
    store_rows<kHeadDim>(dk, p.scale, p.dk + token * p.dk_stride + kv_head * kHeadDim, p.dk_stride, upper, rows);
  }
}

template <int kHeadDim, bool kOrdered>
__device__ __forceinline__ void backward(const HopperBackwardParams& p) {
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(shared_memory);
  if (threadIdx.x == 0) {
    if (shared_address(shared_memory) % kAtomBytes != 0) __trap();  // the swizzle counts from multiples of it
    barrier_init(shared.kv_full, 1);
    barrier_init(shared.kv_empty, kConsumerWarps);
    for (int i = 0; i < kQueryStages; ++i) {
      barrier_init(shared.q_full[i], 1);
      barrier_init(shared.q_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kGradientStages; ++i) {
      barrier_init(shared.d_o_full[i], 1);
      barrier_init(shared.d_o_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kConsumers; ++i) {
      for (int writer = 0; writer < kWriters; ++writer)
        barrier_init(shared.dq_full[writer][i], kConsumerWarps / kConsumers);
      barrier_init(shared.dq_empty[i], 1);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.ticket_full[i], 1);
      barrier_init(shared.ticket_empty[i], kConsumerWarps + kWriters + 1);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    registers_down<24>();
    const uint32_t warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) load_queries<kHeadDim>(p, shared);
      if (warp == 3) load_gradients<kHeadDim>(p, shared);
      if (warp >= 1 && warp <= kWriters) write<kHeadDim, kOrdered>(p, shared, warp - 1);
    }
  } else {
    registers_up<240>();
    compute<kHeadDim>(p, shared);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_hopper_backward_64(const __grid_constant__ HopperBackwardParams p) {
  backward<64, true>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_hopper_backward_128(const __grid_constant__ HopperBackwardParams p) {
  backward<128, true>(p);
}

// Adds to dq_sums, zeroed before, in any order: the price of the order, for the benchmark.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_hopper_backward_unordered_64(const __grid_constant__ HopperBackwardParams p) {
  backward<64, false>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_hopper_backward_unordered_128(const __grid_constant__ HopperBackwardParams p) {
  backward<128, false>(p);
}
