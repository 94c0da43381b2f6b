// Causal packed attention with grouped heads, forward: O = softmax(scale * Q K^T) V. For every GPU from sm_80 on.
//
// Operands   include/attention.cuh has the arguments, tiles and tickets.
//   q [tokens, heads, d], k, v [tokens, kv_heads, d], o [tokens, heads, d] bf16, all aligned to 16 bytes, token strides
//   multiples of 8; lse [heads, tokens] f32. d is 64 or 128. Rows of other sequences are never used, whatever they hold.
//   Scores, exponentials and sums are f32; probabilities are rounded to bf16 before the product with V, as everywhere.
//
// Launch     grid tile_count * heads, block 128, one ticket a block, dynamic shared memory of kBytes (below):
//   attention_forward_128           65,536 bytes, two blocks a multiprocessor on sm_80 and sm_90
//   attention_forward_compact_128   49,152 bytes, key tiles of 32: two blocks a multiprocessor of 100 KB (sm_86, sm_89)
//   attention_forward_64            32,768 bytes
//
// Shape (after FlashAttention-2, Dao 2023)
//   Four warps of 32 query rows each, so that a fragment of keys or values from shared memory serves two products: with 16
//   rows a warp shared memory, not the tensor cores, would set the pace on sm_80 and sm_90. The sums of O take 128
//   registers a lane at d = 128, the scores 64. Keys and values come in tiles of 64 by cp.async: values while the scores are
//   computed, the next keys while the values are used. The other block of the multiprocessor computes its products under
//   this one's exponentials. Key tiles are walked from the diagonal to the first; only those on the diagonal are masked, and
//   a warp skips those that lie behind all of its rows.
//
// Cost       4 d FLOPs a visible pair of query and key, and what is hidden of the diagonal tiles; each query tile reads its
//   keys and values once, mostly from L2.
//
// Twin       attention_reference in src/kernels/attention/reference.rs.
#include "attention.cuh"
#include "mma.cuh"

namespace {

using namespace granite::attention;
using namespace granite::mma;
using granite::Bf16x8;
using granite::pack;

constexpr int kThreads = 128;
constexpr int kWarpRows = kQueryTile / (kThreads / 32);
constexpr int kParts = kWarpRows / 16;  // products side by side in a warp

// Queries, keys, values.
template <int kHeadDim, int kKeys>
constexpr uint32_t kBytes = (kQueryTile + 2 * kKeys) * kHeadDim * 2;
static_assert(kBytes<128, 64> == 65536 && kBytes<128, 32> == 49152 && kBytes<64, 64> == 32768,
              "src/kernels/attention/gpu.rs has the same numbers");

// What a block works on.
struct Work {
  Tile tile;
  uint32_t head;
  uint32_t kv_head;
};

__device__ __forceinline__ Work work_of(const ForwardParams& p, uint32_t ticket) {
  const uint32_t head = ticket % p.heads;
  return {p.tiles[ticket / p.heads], head, head / (p.heads / p.kv_heads)};
}

// s = q k^T of the warp's rows and a tile of keys.
template <int kHeadDim, int kKeys>
__device__ __forceinline__ void scores(float (&s)[kParts][kKeys / 8][4], uint32_t q, uint32_t k) {
  using Rows = Swizzled<kHeadDim>;
  const uint32_t thread = fresh_thread();
  const uint32_t of_rows = Rows::lane_offset(thread), of_columns = Rows::lane_offset_of_columns(thread);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) s[part][j][0] = s[part][j][1] = s[part][j][2] = s[part][j][3] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[kParts][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) load_matrices(a[part], q + Rows::at(of_rows, 16 * part, step));
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      uint32_t b[4];
      load_matrices(b, k + Rows::at(of_columns, 16 * j, step));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        product(s[part][2 * j], a[part], b[0], b[1]);
        product(s[part][2 * j + 1], a[part], b[2], b[3]);
      }
    }
  }
}

// o += p v, p in place of the scores.
template <int kHeadDim, int kKeys>
__device__ __forceinline__ void values(float (&o)[kParts][kHeadDim / 8][4], const float (&p)[kParts][kKeys / 8][4],
                                       uint32_t v) {
  using Rows = Swizzled<kHeadDim>;
  const uint32_t of_rows = Rows::lane_offset(fresh_thread());
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    uint32_t a[kParts][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) as_operand(a[part], p[part][2 * step], p[part][2 * step + 1]);
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j) {
      uint32_t b[4];
      load_transposed(b, v + Rows::at(of_rows, 16 * step, j));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        product(o[part][2 * j], a[part], b[0], b[1]);
        product(o[part][2 * j + 1], a[part], b[2], b[3]);
      }
    }
  }
}

// Writes 16 rows of o and their lse, of which lane l has rows `upper` and upper + 8 of the sequence.
template <int kHeadDim>
__device__ __forceinline__ void store(const ForwardParams& p, const Tile& tile, uint32_t head, int upper,
                                      const float (&o)[kHeadDim / 8][4], float2 inverse, const float (&lse)[2]) {
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = upper + 8 * r;
    const bool counts = row < tile.length;
    const uint64_t token = tile.start + row;
    const float factor = r == 0 ? inverse.x : inverse.y;
    __nv_bfloat16* to = p.o + token * p.o_stride + head * kHeadDim;
    if (counts && quad_lane == 0) p.lse[head * p.tokens + token] = lse[r];
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; j += 4) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = pack(o[j + i][2 * r] * factor, o[j + i][2 * r + 1] * factor);
      const Bf16x8 word = gather_quad(pairs);
      if (counts) store16(to + 8 * (j + quad_lane), word);
    }
  }
}

template <int kHeadDim, int kKeys>
__device__ __forceinline__ void attend(const ForwardParams& p) {
  using Rows = Swizzled<kHeadDim>;
  extern __shared__ __align__(128) uint8_t bytes[];
  const uint32_t q_tile = shared_address(bytes);
  const uint32_t k_tile = q_tile + kQueryTile * Rows::kRowBytes;
  const uint32_t v_tile = k_tile + kKeys * Rows::kRowBytes;

  __shared__ uint32_t shared_ticket;
  if (threadIdx.x == 0) shared_ticket = take_ticket(p.tickets);
  __syncthreads();
  uint32_t ticket = shared_ticket;
  const auto [tile, head, kv_head] = work_of(p, ticket);
  uint32_t start = tile.start;
  uint32_t kv_column = kv_head * kHeadDim;

  const int first_row = tile.row + kWarpRows * (threadIdx.x / 32);  // of the warp
  const uint32_t q_rows = q_tile + (first_row - tile.row) * Rows::kRowBytes;
  const float scale_log2 = p.scale * kLog2E;

  float o[kParts][kHeadDim / 8][4];
  Softmax softmax[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) o[part][j][0] = o[part][j][1] = o[part][j][2] = o[part][j][3] = 0.0f;
  }

  int n = (min(tile.row + kQueryTile, tile.length) - 1) / kKeys;
  Rows::template copy<kQueryTile, kThreads>(q_tile, p.q + (start + tile.row) * p.q_stride + head * kHeadDim,
                                            p.q_stride, tile.length - tile.row);
  Rows::template copy<kKeys, kThreads>(k_tile, p.k + (start + n * kKeys) * p.k_stride + kv_column, p.k_stride,
                                       tile.length - n * kKeys);
  copies_commit();

  for (; n >= 0; --n) {
    const int first_key = n * kKeys;
    // The same in all lanes. Where the compiler knows it, it mixes more instructions and wants more registers; for small
    // tiles it finds none.
    bool sees = first_key < first_row + kWarpRows;
    if (kKeys == 64) sees = __any_sync(granite::kAllLanes, sees);
    float s[kParts][kKeys / 8][4];

    forget(start), forget(kv_column);  // Pointers that follow from them would take registers that the sums need.

    // Keys are here, and nobody reads the values of the tile before.
    copies_wait<0>();
    __syncthreads();
    Rows::template copy<kKeys, kThreads>(v_tile, p.v + (start + first_key) * p.v_stride + kv_column,
                                         p.v_stride, tile.length - first_key);
    copies_commit();
    if (sees) scores<kHeadDim, kKeys>(s, q_rows, k_tile);

    // Values are here, and nobody reads the keys.
    copies_wait<0>();
    __syncthreads();
    if (n > 0) {
      Rows::template copy<kKeys, kThreads>(k_tile, p.k + (start + first_key - kKeys) * p.k_stride + kv_column,
                                           p.k_stride, kKeys);
    }
    copies_commit();
    if (!sees) continue;

#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int upper = first_row + 16 * part;
      if (first_key + kKeys > upper + 1) {
        const int lane = threadIdx.x % 32;
        mask_causal(s[part], upper - first_key + lane / 4, 2 * (lane % 4));
      }
      const float2 factors = softmax[part].template update<false>(s[part], scale_log2);
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        o[part][j][0] *= factors.x, o[part][j][1] *= factors.x;
        o[part][j][2] *= factors.y, o[part][j][3] *= factors.y;
      }
    }
    values<kHeadDim, kKeys>(o, s, v_tile);
  }

  if (threadIdx.x == 0) return_tickets(p.tickets);  // here its fence delays nobody
  // Read again rather than kept in registers all the way.
  ticket = *static_cast<volatile uint32_t*>(&shared_ticket);
  const Work work = work_of(p, ticket);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    float lse[2];
    const float2 inverse = softmax[part].finish(lse);
    store<kHeadDim>(p, work.tile, work.head, first_row + 16 * part + threadIdx.x % 32 / 4, o[part], inverse, lse);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    attention_forward_64(const __grid_constant__ ForwardParams p) {
  attend<64, 64>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    attention_forward_128(const __grid_constant__ ForwardParams p) {
  attend<128, 64>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    attention_forward_compact_128(const __grid_constant__ ForwardParams p) {
  attend<128, 32>(p);
}
