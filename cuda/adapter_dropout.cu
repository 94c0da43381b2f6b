// Products of LoRA adapters with an input that drops elements, without the dropped input ever being in memory.
//
//   input      xa[t, r]   = round(factor * sum_c keep_m(t, c) * x[t, c] * a[r, c])
//   to_input   dx[t, c]   = round(dx[t, c] + factor * sum_m keep_m(t, c) * sum_r d[t, r] * a[r, c])
//   to_a       da_m[r, c] = da_m[r, c] + factor * sum_t d[t, r] * keep_m(t, c) * x[t, c]
//   keep_m(t, c)  as in dropout.cu, of element t * width + c; the factors hold its scale, so nothing is rounded before a product
//
// Projections that share an input differ in m alone: each has a mask of its own and some of the adapters' columns r. A slice
// is up to 64 of these columns of one projection; a launch takes up to three slices, and reads x, or dx, once for all.
//
// Operands (bf16; rows any distance apart, at multiples of 16 bytes; width a multiple of 8)
//   x    [tokens, width]          dx   [tokens, width], read and written
//   a    [columns, width]         rows of A of all projections below each other
//   d    [tokens, columns]        gradient of the outputs through B, with the adapter's factor
//   xa   [tokens, columns] twice  out and kept: the product's input and what the layer keeps of it
//   da   [rank, width] f32 a slice, contiguous
//   partial  f32 [splits, slices, tokens, 64] of input, [splits, slices, 64, width] of to_a; unused with one split
//   A slice begins at any multiple of 8 columns, `width` of it are in a, d and xa (a multiple of 8), `rank` of these in da.
//
// Launch (S slices: kernels *_1 to *_3)
//   adapter_input_S     grid (ceil(tokens / 128), splits), block 128 S, shared 4 * (8192 + 4096 S)
//     A block: 128 tokens and `steps` steps of 32 columns of x. A warp: 32 tokens and a slice.
//   adapter_to_input_S  grid (ceil(width / 64), ceil(tokens / 128)), block 256, shared 25600 S
//     A warp: 32 tokens and 32 columns, one slice after the other.
//   adapter_to_a_S      grid (ceil(width / 128), splits), block 128 S, shared 4 * (4096 S + 9216)
//     A block: 128 columns and `steps` steps of 32 tokens. A warp: 32 columns and a slice.
//   adapter_*_sum       the splits in their order, so that bits repeat
//
// Cost  x once, or dx twice, in place of drop (read and write) and product (read) a projection. Then a Philox, some 30
//   instructions, for eight elements of each projection in each of the three kernels. See cuda/NOTES.md.
//
// Masks and fragments. A Philox decides eight columns of one token. Fragments want pairs of columns or of tokens in places of
// their own; a sum does not mind the order of its terms, nor a product the order of its columns, as long as both sides agree.
// So lane (g, t) = (l / 4, l % 4) takes for the k of input the columns 8 t to 8 t + 3 and then 8 t + 4 to 8 t + 7 where a
// fragment says 2 t, 2 t + 1, 2 t + 8, 2 t + 9; and where columns are the n of a product, four products j = 0 to 3 take the
// columns 4 g + j as their g. The d of these then holds the columns 8 t + j and 8 t + 4 + j: eight neighbours over all j.
//
// Twin   drop, product, add one after the other: adapter_dropout.rs.
#include <cuda_bf16.h>

#include "mma.cuh"
#include "philox.cuh"

namespace {

using namespace granite;
using namespace granite::mma;

constexpr int kMaxSlices = 3;
constexpr int kSlice = 64;  // columns of a slice

struct Slice {
  float* da;
  uint32_t column;
  uint32_t width;
  uint32_t rank;
  uint32_t module;
};

struct Params {
  const __nv_bfloat16* x;
  const __nv_bfloat16* a;
  const __nv_bfloat16* d;
  __nv_bfloat16* dx;
  __nv_bfloat16* out;
  __nv_bfloat16* kept;
  float* partial;
  uint64_t x_stride;
  uint64_t a_stride;
  uint64_t d_stride;
  uint64_t dx_stride;
  uint64_t out_stride;
  uint64_t kept_stride;
  uint64_t microbatch;
  uint32_t tokens;
  uint32_t width;
  uint32_t slices;
  uint32_t splits;
  uint32_t steps;
  uint32_t threshold;
  float factor;
  uint32_t unused;
  uint2 keys[kPhiloxRounds];
  Slice slice[kMaxSlices];
};
static_assert(sizeof(Params) == 272, "src/kernels/adapter_dropout.rs asserts the same size");

// For eight columns of a token, the first of them a multiple of eight: bits 15 and 31 of word i tell whether the columns 2 i
// and 2 i + 1 are kept.
__device__ __forceinline__ uint4 kept_of(const Params& p, uint32_t token, uint32_t column, uint32_t module) {
  const uint4 counter = make_uint4(token * (p.width / 8) + column / 8, module, static_cast<uint32_t>(p.microbatch),
                                   static_cast<uint32_t>(p.microbatch >> 32));
  const uint4 words = philox4x32_scheduled(counter, p.keys);
  const uint32_t lift = (0x8000 - p.threshold) * 0x10001;
  return make_uint4((words.x & 0x7fff7fff) + lift, (words.y & 0x7fff7fff) + lift, (words.z & 0x7fff7fff) + lift,
                    (words.w & 0x7fff7fff) + lift);
}

// The two elements of a word, +0 where they are dropped: bits 15 and 31 spread over their halves.
__device__ __forceinline__ uint32_t dropped(uint32_t x, uint32_t kept) {
  uint32_t spread;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(spread) : "r"(kept));
  return x & spread;
}

__device__ __forceinline__ uint2 shared8(uint32_t address) {
  uint2 words;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(address) : "memory");
  return words;
}

__device__ __forceinline__ uint4 shared16(uint32_t address) {
  uint4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

extern __shared__ __align__(1024) unsigned char shared_memory[];

constexpr int kStages = 4;

// Copies of `count` steps from `first` on go round kStages places, each step in a group of its own: those that are beyond the
// last step are empty, so that waiting counts them alike.
template <typename Copies>
__device__ __forceinline__ void begin_stage(const Copies& copies, const Params& p, uint32_t memory, uint32_t first,
                                            uint32_t count, uint32_t step) {
  if (step < count) {
    copies.begin(p, memory + step % kStages * Copies::kStageBytes, first + step);
  } else {
    copies_commit();
  }
}

template <typename Copies>
__device__ __forceinline__ void begin_stages(const Copies& copies, const Params& p, uint32_t memory, uint32_t first,
                                             uint32_t count) {
#pragma unroll
  for (uint32_t step = 0; step < kStages - 1; ++step) begin_stage(copies, p, memory, first, count, step);
}

// Waits until all threads' copies of `step` are there, and begins those that take the place of the step before.
template <typename Copies>
__device__ __forceinline__ void next_stage(const Copies& copies, const Params& p, uint32_t memory, uint32_t first,
                                           uint32_t count, uint32_t step) {
  copies_wait<kStages - 2>();
  __syncthreads();
  begin_stage(copies, p, memory, first, count, step + kStages - 1);
}

// input: tiles of 32 columns, rows of 64 bytes: 16 bytes each of two neighbouring rows fill all banks.
constexpr int kInputTokens = 128;
constexpr int kInputColumns = 32;
constexpr int kInputRowBytes = 64;
constexpr int kInputTileBytes = kInputTokens * kInputRowBytes;

// What a thread copies of every tile: 16 bytes each of some rows of x and of two rows of a.
template <int kSlices>
struct InputCopies {
  static constexpr int kRows = 32 * kSlices;  // of a pass over all threads
  static constexpr int kPasses = (kInputTokens + kRows - 1) / kRows;
  static constexpr int kStageBytes = kInputTileBytes + kSlices * kSlice * kInputRowBytes;

  const __nv_bfloat16* x[kPasses];
  const __nv_bfloat16* a[2];
  bool has_x[kPasses];
  bool has_a[2];

  __device__ __forceinline__ InputCopies(const Params& p) {
    const uint32_t row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const uint32_t token = blockIdx.x * kInputTokens + i * kRows + row;
      x[i] = p.x + token * p.x_stride + column;
      has_x[i] = token < p.tokens && i * kRows + row < kInputTokens;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t r = i * kRows + row;
      const Slice& slice = p.slice[r / kSlice];
      a[i] = p.a + (slice.column + r % kSlice) * p.a_stride + column;
      has_a[i] = r % kSlice < slice.width;
    }
  }

  __device__ __forceinline__ void begin(const Params& p, uint32_t to, uint32_t step) const {
    const uint32_t column = step * kInputColumns;
    const bool counts = column + threadIdx.x % 4 * 8 < p.width;
    to += threadIdx.x * 16;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if ((i + 1) * kRows <= kInputTokens || i * kRows + threadIdx.x / 4 < kInputTokens) {
        copy16(to + i * kRows * kInputRowBytes, x[i] + column, counts && has_x[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) copy16(to + kInputTileBytes + i * kRows * kInputRowBytes, a[i] + column, counts && has_a[i]);
    copies_commit();
  }
};

template <int kSlices>
__device__ __forceinline__ void adapter_input(const Params& p) {
  using Copies = InputCopies<kSlices>;
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t part = threadIdx.x / 128, row = threadIdx.x / 32 % 4 * 32;
  const uint32_t width = p.slice[part].width, module = p.slice[part].module;
  const uint32_t memory = shared_address(shared_memory);
  const uint32_t first = blockIdx.y * p.steps;
  const uint32_t total = (p.width + kInputColumns - 1) / kInputColumns;
  const uint32_t count = min(p.steps, total - first);
  const uint32_t token = blockIdx.x * kInputTokens + row + g;

  const Copies copies(p);
  begin_stages(copies, p, memory, first, count);
  float sums[2][8][4] = {};
  for (uint32_t step = 0; step < count; ++step) {
    next_stage(copies, p, memory, first, count, step);
    const uint32_t tile = memory + step % kStages * Copies::kStageBytes + g * kInputRowBytes + t * 16;
    uint32_t x[2][2][4];  // of two steps of 16 columns and two of 16 tokens
#pragma unroll
    for (uint32_t m = 0; m < 2; ++m) {
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t at = m * 16 + half * 8;
        const uint4 raw = shared16(tile + (row + at) * kInputRowBytes);
        const uint4 kept = kept_of(p, token + at, (first + step) * kInputColumns + 8 * t, module);
        x[0][m][half] = dropped(raw.x, kept.x);
        x[0][m][2 + half] = dropped(raw.y, kept.y);
        x[1][m][half] = dropped(raw.z, kept.z);
        x[1][m][2 + half] = dropped(raw.w, kept.w);
      }
    }
    const uint32_t a = tile + kInputTileBytes + part * kSlice * kInputRowBytes;
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      if (j * 8 < width) {
        const uint4 b = shared16(a + j * 8 * kInputRowBytes);
        product(sums[0][j], x[0][0], b.x, b.y);
        product(sums[1][j], x[0][1], b.x, b.y);
        product(sums[0][j], x[1][0], b.z, b.w);
        product(sums[1][j], x[1][1], b.z, b.w);
      }
    }
  }

#pragma unroll
  for (uint32_t m = 0; m < 2; ++m) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t at = token + m * 16 + half * 8;
      if (at >= p.tokens) continue;
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        const uint32_t column = j * 8 + 2 * t;
        if (column >= width) continue;
        const float left = sums[m][j][half * 2], right = sums[m][j][half * 2 + 1];
        if (p.splits == 1) {
          const uint32_t both = pack(left * p.factor, right * p.factor);
          const uint32_t to = p.slice[part].column + column;
          *reinterpret_cast<uint32_t*>(p.out + at * p.out_stride + to) = both;
          *reinterpret_cast<uint32_t*>(p.kept + at * p.kept_stride + to) = both;
        } else {
          const uint64_t place = static_cast<uint64_t>(blockIdx.y * kSlices + part) * p.tokens + at;
          *reinterpret_cast<float2*>(p.partial + place * kSlice + column) = make_float2(left, right);
        }
      }
    }
  }
}

// to_input: 128 tokens, 64 columns. Rows of a of 144 bytes: eight bytes each of every second row lie in different banks.
constexpr int kToInputTokens = 128;
constexpr int kToInputColumns = 64;
constexpr int kToInputRowBytes = 144;
using Gradients = Swizzled<kSlice>;
constexpr int kToInputGradientBytes = kToInputTokens * Gradients::kRowBytes;
constexpr int kToInputSliceBytes = kToInputGradientBytes + kSlice * kToInputRowBytes;

__device__ __forceinline__ void to_input_copy(const Params& p, uint32_t to, const Slice& slice) {
  const uint32_t row = threadIdx.x / 8, word = threadIdx.x % 8;
  {
    const uint32_t token = blockIdx.y * kToInputTokens + row;
    const __nv_bfloat16* from = p.d + token * p.d_stride + slice.column + word * 8;
    const uint32_t at = to + Gradients::offset(row, word);
#pragma unroll
    for (uint32_t pass = 0; pass < kToInputTokens / 32; ++pass) {
      copy16(at + pass * 32 * Gradients::kRowBytes, from + pass * 32 * p.d_stride,
             token + pass * 32 < p.tokens && word * 8 < slice.width);
    }
  }
  const uint32_t column = blockIdx.x * kToInputColumns + word * 8;
  const __nv_bfloat16* from = p.a + (slice.column + row) * p.a_stride + column;
#pragma unroll
  for (uint32_t pass = 0; pass < kSlice / 32; ++pass) {
    copy16(to + kToInputGradientBytes + (row + pass * 32) * kToInputRowBytes + word * 16, from + pass * 32 * p.a_stride,
           row + pass * 32 < slice.width && column < p.width);
  }
  copies_commit();
}

// Adds what a slice adds, before the factor.
__device__ __forceinline__ void to_input_slice(const Params& p, uint32_t memory, const Slice& slice,
                                               float (&sums)[2][2][8]) {
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t row = threadIdx.x / 32 % 4 * 32, column = threadIdx.x / 128 * 32;
  const uint32_t lane_offset = Gradients::lane_offset(threadIdx.x);
  float products[2][4][4] = {};
#pragma unroll
  for (uint32_t step = 0; step < kSlice / 16; ++step) {
    if (step * 16 < slice.width) {
      uint32_t d[2][4];
      load_matrices(d[0], memory + Gradients::at(lane_offset, row, step));
      load_matrices(d[1], memory + Gradients::at(lane_offset, row + 16, step));
      const uint32_t a = memory + kToInputGradientBytes + (step * 16 + 2 * t) * kToInputRowBytes + (column + 4 * g) * 2;
      const uint2 r0 = shared8(a), r1 = shared8(a + kToInputRowBytes);
      const uint2 r8 = shared8(a + 8 * kToInputRowBytes), r9 = shared8(a + 9 * kToInputRowBytes);
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t order = j % 2 ? 0x7632 : 0x5410;
        const uint32_t b0 = __byte_perm(j < 2 ? r0.x : r0.y, j < 2 ? r1.x : r1.y, order);
        const uint32_t b1 = __byte_perm(j < 2 ? r8.x : r8.y, j < 2 ? r9.x : r9.y, order);
        product(products[0][j], d[0], b0, b1);
        product(products[1][j], d[1], b0, b1);
      }
    }
  }
#pragma unroll
  for (uint32_t m = 0; m < 2; ++m) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t token = blockIdx.y * kToInputTokens + row + m * 16 + half * 8 + g;
      const uint4 kept = kept_of(p, token, blockIdx.x * kToInputColumns + column + 8 * t, slice.module);
      const uint32_t word[4] = {kept.x, kept.y, kept.z, kept.w};
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) {
        if (word[i / 2] & (i % 2 ? 0x80000000u : 0x8000u)) sums[m][half][i] += products[m][i % 4][half * 2 + i / 4];
      }
    }
  }
}

template <int kSlices>
__device__ __forceinline__ void adapter_to_input(const Params& p) {
  const uint32_t memory = shared_address(shared_memory);
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int part = 0; part < kSlices; ++part) to_input_copy(p, memory + part * kToInputSliceBytes, p.slice[part]);
  const uint32_t token = blockIdx.y * kToInputTokens + threadIdx.x / 32 % 4 * 32 + g;
  const uint32_t column = blockIdx.x * kToInputColumns + threadIdx.x / 128 * 32 + 8 * t;
  __nv_bfloat16* place = p.dx + token * p.dx_stride + column;
  Bf16x8 dx[2][2];
  const auto load = [&] {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      dx[i / 2][i % 2] = load8<true>(place + i * 8 * p.dx_stride, token + i * 8 < p.tokens && column < p.width);
    }
  };
  // Early where there are registers for it.
  if constexpr (kSlices == 1) load();
  float sums[2][2][8] = {};
  copies_wait<0>();
  __syncthreads();
#pragma unroll 1
  for (int part = 0; part < kSlices; ++part) to_input_slice(p, memory + part * kToInputSliceBytes, p.slice[part], sums);
  if constexpr (kSlices > 1) load();
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    if (token + i * 8 >= p.tokens || column >= p.width) continue;
    Bf16x8& to = dx[i / 2][i % 2];
    const float(&sum)[8] = sums[i / 2][i % 2];
#pragma unroll
    for (uint32_t word = 0; word < 4; ++word) {
      const float2 old = unpack(to.words[word]);
      to.words[word] = pack(old.x + p.factor * sum[word * 2], old.y + p.factor * sum[word * 2 + 1]);
    }
    store16(place + i * 8 * p.dx_stride, to);
  }
}

// to_a: tiles of 32 tokens. Rows of x of 272 bytes: eight bytes each of every second row lie in different banks.
constexpr int kToATokens = 32;
constexpr int kToAColumns = 128;
constexpr int kToARowBytes = 272;
constexpr int kToAGradientBytes = kToATokens * Gradients::kRowBytes;
constexpr int kToAInputBytes = 9216;  // 32 rows, up to the next tile's alignment
static_assert(kToAInputBytes >= kToATokens * kToARowBytes && kToAInputBytes % 1024 == 0, "");

// What a thread copies of every tile: 16 bytes each of some rows of x, and of two rows of its slice's gradients.
template <int kSlices>
struct ToACopies {
  static constexpr int kRows = 8 * kSlices;  // of a pass over all threads
  static constexpr int kPasses = (kToATokens + kRows - 1) / kRows;
  static constexpr int kStageBytes = kSlices * kToAGradientBytes + kToAInputBytes;

  const __nv_bfloat16* x;
  const __nv_bfloat16* d;
  uint32_t to_d;
  bool has_x;
  bool has_d;

  __device__ __forceinline__ ToACopies(const Params& p) {
    const uint32_t column = blockIdx.x * kToAColumns + threadIdx.x % 16 * 8;
    x = p.x + threadIdx.x / 16 * p.x_stride + column;
    has_x = column < p.width;
    const uint32_t part = threadIdx.x / 128, row = threadIdx.x % 128 / 8, word = threadIdx.x % 8;
    d = p.d + row * p.d_stride + p.slice[part].column + word * 8;
    has_d = word * 8 < p.slice[part].width;
    to_d = part * kToAGradientBytes + Gradients::offset(row, word);
  }

  __device__ __forceinline__ void begin(const Params& p, uint32_t to, uint32_t step) const {
    const uint32_t token = step * kToATokens;
    const uint32_t row = threadIdx.x / 16;
    const uint32_t to_x = to + kSlices * kToAGradientBytes + row * kToARowBytes + threadIdx.x % 16 * 16;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if ((i + 1) * kRows <= kToATokens || i * kRows + row < kToATokens) {
        copy16(to_x + i * kRows * kToARowBytes, x + (token + i * kRows) * p.x_stride,
               has_x && token + i * kRows + row < p.tokens);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      copy16(to + to_d + i * 16 * Gradients::kRowBytes, d + (token + i * 16) * p.d_stride,
             has_d && token + i * 16 + threadIdx.x % 128 / 8 < p.tokens);
    }
    copies_commit();
  }
};

template <int kSlices>
__device__ __forceinline__ void adapter_to_a(const Params& p) {
  using Copies = ToACopies<kSlices>;
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t part = threadIdx.x / 128, column = threadIdx.x / 32 % 4 * 32;
  const uint32_t width = p.slice[part].width, module = p.slice[part].module;
  const uint32_t memory = shared_address(shared_memory);
  const uint32_t lane_offset = Gradients::lane_offset_of_columns(threadIdx.x);
  const uint32_t first = blockIdx.y * p.steps;
  const uint32_t total = (p.tokens + kToATokens - 1) / kToATokens;
  const uint32_t count = min(p.steps, total - first);
  // Two lanes share eight columns. Each makes the masks of two of their four tokens for both.
  const bool second = g % 2 == 1;
  const uint32_t shared_columns = blockIdx.x * kToAColumns + column + g / 2 * 8;

  const Copies copies(p);
  begin_stages(copies, p, memory, first, count);
  float sums[4][4][4] = {};
  for (uint32_t step = 0; step < count; ++step) {
    next_stage(copies, p, memory, first, count, step);
    const uint32_t tile = memory + step % kStages * Copies::kStageBytes;
#pragma unroll
    for (uint32_t k = 0; k < kToATokens; k += 16) {
      const uint32_t token = (first + step) * kToATokens + k + 2 * t + second * 8;
      uint2 kept[4];
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const uint4 both = kept_of(p, token + i, shared_columns, module);
        const uint2 mine = second ? make_uint2(both.z, both.w) : make_uint2(both.x, both.y);
        const uint2 other = second ? make_uint2(both.x, both.y) : make_uint2(both.z, both.w);
        const uint2 given = make_uint2(__shfl_xor_sync(kAllLanes, other.x, 4), __shfl_xor_sync(kAllLanes, other.y, 4));
        kept[i] = second ? given : mine;
        kept[2 + i] = second ? mine : given;
      }
      uint2 x[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t at = k + 2 * t + i / 2 * 8 + i % 2;
        const uint2 raw = shared8(tile + kSlices * kToAGradientBytes + at * kToARowBytes + (column + 4 * g) * 2);
        x[i] = make_uint2(dropped(raw.x, kept[i].x), dropped(raw.y, kept[i].y));
      }
      uint32_t b[4][2];
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t order = j % 2 ? 0x7632 : 0x5410;
        b[j][0] = __byte_perm(j < 2 ? x[0].x : x[0].y, j < 2 ? x[1].x : x[1].y, order);
        b[j][1] = __byte_perm(j < 2 ? x[2].x : x[2].y, j < 2 ? x[3].x : x[3].y, order);
      }
#pragma unroll
      for (uint32_t m = 0; m < 4; ++m) {
        if (m * 16 < width) {
          uint32_t d[4];
          load_transposed(d, tile + part * kToAGradientBytes + Gradients::at(lane_offset, k, m));
#pragma unroll
          for (uint32_t j = 0; j < 4; ++j) product(sums[m][j], d, b[j][0], b[j][1]);
        }
      }
    }
  }

  const uint32_t to = blockIdx.x * kToAColumns + column + 8 * t;
  if (to >= p.width) return;
#pragma unroll
  for (uint32_t m = 0; m < 4; ++m) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t r = m * 16 + half * 8 + g;
      if (r >= p.slice[part].rank) continue;
      const float(&sum)[4][4] = sums[m];
      if (p.splits == 1) {
        float* place = p.slice[part].da + static_cast<uint64_t>(r) * p.width + to;
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) place[i] += p.factor * sum[i % 4][half * 2 + i / 4];
      } else {
        const uint64_t place = static_cast<uint64_t>(blockIdx.y * kSlices + part) * kSlice + r;
        float4* four = reinterpret_cast<float4*>(p.partial + place * p.width + to);
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
          const uint32_t at = half * 2 + i;
          four[i] = make_float4(sum[0][at], sum[1][at], sum[2][at], sum[3][at]);
        }
      }
    }
  }
}

}  // namespace

#define ADAPTER_KERNELS(S)                                                                                        \
  extern "C" __global__ void __launch_bounds__(128 * S) adapter_input_##S(const __grid_constant__ Params p) {     \
    adapter_input<S>(p);                                                                                          \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(256, S == 1 ? 3 : 2)                                               \
      adapter_to_input_##S(const __grid_constant__ Params p) {                                                    \
    adapter_to_input<S>(p);                                                                                       \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(128 * S) adapter_to_a_##S(const __grid_constant__ Params p) {      \
    adapter_to_a<S>(p);                                                                                           \
  }

ADAPTER_KERNELS(1)
ADAPTER_KERNELS(2)
ADAPTER_KERNELS(3)

// Grid (ceil(tokens / 16), slices), block 256: a thread, four columns of a token.
extern "C" __global__ void __launch_bounds__(256) adapter_input_sum(const __grid_constant__ Params p) {
  const uint32_t token = blockIdx.x * 16 + threadIdx.x / 16, column = threadIdx.x % 16 * 4;
  const Slice& slice = p.slice[blockIdx.y];
  if (token >= p.tokens || column >= slice.width) return;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (uint32_t split = 0; split < p.splits; ++split) {
    const uint64_t place = static_cast<uint64_t>(split * p.slices + blockIdx.y) * p.tokens + token;
    const float4 part = *reinterpret_cast<const float4*>(p.partial + place * kSlice + column);
    sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
  }
  const uint2 rounded = make_uint2(pack(sum.x * p.factor, sum.y * p.factor), pack(sum.z * p.factor, sum.w * p.factor));
  *reinterpret_cast<uint2*>(p.out + token * p.out_stride + slice.column + column) = rounded;
  *reinterpret_cast<uint2*>(p.kept + token * p.kept_stride + slice.column + column) = rounded;
}

// Grid (ceil(width / 256), 64, slices), block 256: a thread, one element.
extern "C" __global__ void __launch_bounds__(256) adapter_to_a_sum(const __grid_constant__ Params p) {
  const uint32_t column = blockIdx.x * 256 + threadIdx.x, r = blockIdx.y;
  const Slice& slice = p.slice[blockIdx.z];
  if (column >= p.width || r >= slice.rank) return;
  float sum = 0.0f;
  for (uint32_t split = 0; split < p.splits; ++split) {
    sum += p.partial[(static_cast<uint64_t>(split * p.slices + blockIdx.z) * kSlice + r) * p.width + column];
  }
  slice.da[static_cast<uint64_t>(r) * p.width + column] += p.factor * sum;
}
