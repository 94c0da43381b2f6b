// Causal packed attention with grouped heads on Hopper, forward: O = softmax(scale * Q K^T) V.
// targets: sm_90a
//
// Operands   include/attention.cuh has the arguments, tiles and tickets.
//   q [tokens, heads, d], k, v [tokens, kv_heads, d] bf16 behind tensor maps; o [tokens, heads, d] bf16, aligned to 16
//   bytes, token stride a multiple of 8; lse [heads, tokens] f32. d is 64 or 128.
//   Scores, exponentials and sums are f32; probabilities are rounded to bf16 before the product with V, as everywhere.
//
// Launch     blocks of 384, at most one a multiprocessor, dynamic shared memory of kBytes<d> (below), all tickets taken.
//
// Shape (after FlashAttention-3, Shah et al. 2024)
//   One warp brings tiles by TMA, two warpgroups compute 64 query rows each. Keys and values come in tiles of 128 in two
//   stages, from the diagonal to the first, so that only the first tile is masked. A warpgroup runs the scores of the next
//   tile and the values of this one on the tensor cores while it computes exponentials; the two take turns in issuing
//   products, so that one's exponentials lie under the other's products. Blocks take tiles by ticket: the loads of the
//   next tile run under the end of this one.
//
// Cost       4 d FLOPs a visible pair of query and key (and the hidden half of the diagonal tiles); each query tile reads
//   its keys and values once, mostly from L2.
//
// Twin       attention_reference in src/kernels/attention/reference.rs.
#include "attention_hopper.cuh"
#include "hopper.cuh"

namespace {

using namespace granite::attention;
using namespace granite::hopper;

constexpr int kStages = 2;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kThreads = kWarpgroup + kConsumerThreads;
constexpr int kConsumerWarps = kConsumerThreads / 32;
constexpr int kRows = kQueryTile / kConsumers;  // query rows of a warpgroup

// Numbered barriers: 0 is __syncthreads.
constexpr uint32_t kTurnBarrier = 1;  // and 2: the warpgroup's turn to issue products
constexpr uint32_t kConsumerBarrier = 3;

template <int kHeadDim>
struct Shared {
  static constexpr int kPanels = kHeadDim / 64;
  __nv_bfloat16 q[kConsumers][kPanels][kRows * 64];
  __nv_bfloat16 k[kStages][kPanels][kKeyTile * 64];
  __nv_bfloat16 v[kStages][kPanels][kKeyTile * 64];
  uint64_t q_full[kConsumers], q_empty[kConsumers];
  uint64_t k_full[kStages], k_empty[kStages];
  uint64_t v_full[kStages], v_empty[kStages];
  uint64_t ticket_full[2], ticket_empty[2];
  uint32_t tickets[2];
};

template <int kHeadDim>
constexpr uint32_t kBytes = sizeof(Shared<kHeadDim>);
static_assert(kBytes<128> == 163976 && kBytes<64> == 82056, "src/kernels/attention/gpu.rs has the same numbers");

// Where the compiler knows its address: registers are too few for pointers into it.
extern __shared__ __align__(1024) uint8_t shared_memory[];

// ---- the warp that loads: one lane of it ----

template <int kHeadDim>
__device__ __forceinline__ void load(const HopperForwardParams& p, Shared<kHeadDim>& shared) {
  constexpr uint32_t kPanels = Shared<kHeadDim>::kPanels;
  constexpr uint32_t kTileBytes = kKeyTile * kHeadDim * 2;
  const uint32_t works = p.tile_count * p.heads;
  const uint32_t group = p.heads / p.kv_heads;
  prefetch_map(&p.q), prefetch_map(&p.k), prefetch_map(&p.v);
  uint32_t stage = 0, parity = 1;  // a stage is empty before its first use
  for (uint32_t turn = 0;; ++turn) {
    const uint32_t ticket = take_ticket(p.tickets);
    const uint32_t slot = turn % 2;
    barrier_wait(shared.ticket_empty[slot], turn / 2 % 2 ^ 1);
    shared.tickets[slot] = ticket;
    barrier_arrive(shared.ticket_full[slot]);
    if (ticket >= works) break;

    const Tile tile = p.tiles[ticket / p.heads];
    const int head = static_cast<int>(ticket % p.heads);
    const int kv_head = head / static_cast<int>(group);
    const int first = tile.start + tile.row;
    for (int n = tile.row / kKeyTile; n >= 0; --n) {
      const int token = tile.start + n * kKeyTile;
      barrier_wait(shared.k_empty[stage], parity);
      barrier_arrive_expecting(shared.k_full[stage], kTileBytes);
      for (uint32_t panel = 0; panel < kPanels; ++panel)
        load_box(shared.k[stage][panel], &p.k, shared.k_full[stage], 64 * panel, kv_head, token);
      if (n == tile.row / kKeyTile) {
        for (int part = 0; part < kConsumers; ++part) {
          barrier_wait(shared.q_empty[part], turn % 2 ^ 1);
          barrier_arrive_expecting(shared.q_full[part], kTileBytes / kConsumers);
          for (uint32_t panel = 0; panel < kPanels; ++panel)
            load_box(shared.q[part][panel], &p.q, shared.q_full[part], 64 * panel, head, first + part * kRows);
        }
      }
      barrier_wait(shared.v_empty[stage], parity);
      barrier_arrive_expecting(shared.v_full[stage], kTileBytes);
      for (uint32_t panel = 0; panel < kPanels; ++panel)
        load_box(shared.v[stage][panel], &p.v, shared.v_full[stage], 64 * panel, kv_head, token);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  }
  return_tickets(p.tickets);
}

// ---- the warpgroups that compute ----

// Rows of a tile of values that belong to the next sequence count for nothing, whatever they hold: zeros, because a zero
// probability times NaN would be NaN.
template <int kHeadDim>
__device__ __forceinline__ void clear_rows(__nv_bfloat16 (&panels)[kHeadDim / 64][kKeyTile * 64], int first,
                                           int thread) {
  for (int i = first * 8 + thread; i < kKeyTile * 8; i += kConsumerThreads) {
#pragma unroll
    for (int panel = 0; panel < kHeadDim / 64; ++panel)
      reinterpret_cast<uint4*>(panels[panel])[i] = make_uint4(0, 0, 0, 0);
  }
  fence_shared_for_async();
  named_sync(kConsumerBarrier, kConsumerThreads);
}

struct Pipe {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// s = q k^T of 64 rows and a tile of keys.
template <int kHeadDim>
__device__ __forceinline__ void scores(float (&s)[16][4], uint64_t q, uint64_t k) {
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const uint64_t along = step % 4 * kStepByRows;
    const uint64_t q_panel = step / 4 * (kRows * 128 >> 4), k_panel = step / 4 * (kKeyTile * 128 >> 4);
    product<false, false>(s, q + q_panel + along, k + k_panel + along, step > 0);
  }
  products_commit();
}

// o += p v.
template <int kHeadDim>
__device__ __forceinline__ void values(float (&o)[kHeadDim / 8][4], const uint32_t (&p)[8][4], uint64_t v, int keep) {
#pragma unroll
  for (int step = 0; step < 8; ++step) product<true>(o, p[step], v + step * kStepByColumns, keep | (step > 0));
  products_commit();
}

template <int kHeadDim>
__device__ __forceinline__ void compute(const HopperForwardParams& p, Shared<kHeadDim>& shared) {
  constexpr int kColumns = kHeadDim / 8;
  const int thread = threadIdx.x - kWarpgroup;
  const int part = thread / kWarpgroup;
  const int warp = thread / 32 % 4, lane = threadIdx.x % 32;
  const int upper = kRows * part + 16 * warp + lane / 4;  // this lane's upper row in the tile; the lower is 8 below
  const uint32_t works = p.tile_count * p.heads;
  const float scale_log2 = p.scale * kLog2E;
  const uint32_t own_turn = kTurnBarrier + part, other_turn = kTurnBarrier + (1 - part);
  if (part == 1) named_arrive(other_turn, kConsumerThreads);  // the first turn is the first warpgroup's

  const uint64_t q = by_rows(shared.q[part][0]);
  Pipe keys, values_pipe;
  for (uint32_t turn = 0;; ++turn) {
    const uint32_t slot = turn % 2;
    barrier_wait(shared.ticket_full[slot], turn / 2 % 2);
    const uint32_t ticket = shared.tickets[slot];
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.ticket_empty[slot]);
    if (ticket >= works) break;
    const Tile tile = p.tiles[ticket / p.heads];
    const uint32_t head = ticket % p.heads;

    float o[kColumns][4];
    float s[16][4];
    uint32_t probabilities[8][4];
    Softmax softmax;
    const int last = tile.row / kKeyTile;

    // The tile on the diagonal.
    barrier_wait(shared.q_full[part], turn % 2);
    barrier_wait(shared.k_full[keys.stage], keys.parity);
    products_begin();
    scores<kHeadDim>(s, q, by_rows(shared.k[keys.stage][0]));
    products_wait<0>();
    settle(s);
    __syncwarp();
    if (lane == 0) {
      barrier_arrive(shared.k_empty[keys.stage]);
      if (last == 0) barrier_arrive(shared.q_empty[part]);
    }
    keys.advance();
    mask_causal(s, upper, 2 * (lane % 4));
    softmax.update<true>(s, scale_log2);
    as_operand(probabilities, s);
    if (tile.row + kKeyTile > tile.length) {
      barrier_wait(shared.v_full[values_pipe.stage], values_pipe.parity);
      clear_rows<kHeadDim>(shared.v[values_pipe.stage], tile.length - tile.row, thread);
    }

    // The scores of tile n beside the values of tile n + 1.
    for (int n = last - 1; n >= 0; --n) {
      barrier_wait(shared.k_full[keys.stage], keys.parity);
      named_sync(own_turn, kConsumerThreads);
      settle(probabilities);
      products_begin();
      scores<kHeadDim>(s, q, by_rows(shared.k[keys.stage][0]));
      barrier_wait(shared.v_full[values_pipe.stage], values_pipe.parity);
      values<kHeadDim>(o, probabilities, by_columns(shared.v[values_pipe.stage][0], kKeyTile * 128), n != last - 1);
      named_arrive(other_turn, kConsumerThreads);
      products_wait<1>();
      settle(s);
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(shared.k_empty[keys.stage]);
        if (n == 0) barrier_arrive(shared.q_empty[part]);
      }
      keys.advance();
      const float2 factors = softmax.update<false>(s, scale_log2);
      products_wait<0>();
      settle(o);
      settle(probabilities);
      __syncwarp();
      if (lane == 0) barrier_arrive(shared.v_empty[values_pipe.stage]);
      values_pipe.advance();
      // Mostly no row of the warp has a new maximum.
      if (__any_sync(granite::kAllLanes, factors.x != 1.0f || factors.y != 1.0f)) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          o[j][0] *= factors.x, o[j][1] *= factors.x;
          o[j][2] *= factors.y, o[j][3] *= factors.y;
        }
      }
      as_operand(probabilities, s);
    }

    // The values of the first tile.
    barrier_wait(shared.v_full[values_pipe.stage], values_pipe.parity);
    settle(probabilities);
    products_begin();
    values<kHeadDim>(o, probabilities, by_columns(shared.v[values_pipe.stage][0], kKeyTile * 128), last > 0);
    float lse[2];
    const float2 inverse = softmax.finish(lse);
    products_wait<0>();
    settle(o);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.v_empty[values_pipe.stage]);
    values_pipe.advance();

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile.row + upper + 8 * r;
      const bool counts = row < tile.length;
      const uint64_t token = static_cast<uint64_t>(tile.start + row);
      const float factor = r == 0 ? inverse.x : inverse.y;
      __nv_bfloat16* to = p.o + token * p.o_stride + head * kHeadDim + 8 * (lane % 4);
#pragma unroll
      for (int j = 0; j < kColumns; j += 4) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          pairs[i] = granite::pack(o[j + i][2 * r] * factor, o[j + i][2 * r + 1] * factor);
        const granite::Bf16x8 eight = gather_quad(pairs);
        if (counts) *reinterpret_cast<granite::Bf16x8*>(to + 8 * j) = eight;
      }
      if (counts && lane % 4 == 0) p.lse[head * p.tokens + token] = lse[r];
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void forward(const HopperForwardParams& p) {
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(shared_memory);
  if (threadIdx.x == 0) {
    if (shared_address(shared_memory) % kAtomBytes != 0) __trap();  // the swizzle counts from multiples of it
    for (int i = 0; i < kConsumers; ++i) {
      barrier_init(shared.q_full[i], 1);
      barrier_init(shared.q_empty[i], kConsumerWarps / kConsumers);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared.k_full[i], 1);
      barrier_init(shared.k_empty[i], kConsumerWarps);
      barrier_init(shared.v_full[i], 1);
      barrier_init(shared.v_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.ticket_full[i], 1);
      barrier_init(shared.ticket_empty[i], kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    registers_down<40>();
    if (threadIdx.x == 0) load<kHeadDim>(p, shared);
  } else {
    registers_up<232>();
    compute<kHeadDim>(p, shared);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_hopper_forward_64(const __grid_constant__ HopperForwardParams p) {
  forward<64>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_hopper_forward_128(const __grid_constant__ HopperForwardParams p) {
  forward<128>(p);
}
