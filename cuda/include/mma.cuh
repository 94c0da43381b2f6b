// Products on tensor cores by warps, for sm_80 and later: mma.m16n8k16 in bf16 with f32 sums, ldmatrix, cp.async, and the
// order of tiles in shared memory.
//
// Fragments of a product d += a b, lane l with r = l / 4 and c = 2 (l % 4); a pair is two bf16 in a word
//   a (16 x 16)  words 0 to 3: pairs (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8)
//   b (16 x 8)   words 0 and 1: rows c, c + 1 and c + 8, c + 9 of column r
//   d (16 x 8)   f32 0 to 3: (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1)
// So two neighbouring d, rounded, are an a: as_operand.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

#include "bf16x8.cuh"

namespace granite::mma {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Sixteen bytes from global to shared memory without a register; zeros, and nothing is read, where `counts` is false.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool counts) {
  const int bytes = counts ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// One access whatever the compiler knows of the words.
__device__ __forceinline__ void store16(void* to, const Bf16x8& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.words[0]), "r"(x.words[1]), "r"(x.words[2]),
               "r"(x.words[3])
               : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroups of this thread's groups are under way.
template <int kGroups>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four matrices of 8 x 8 whose rows lie at the addresses of lanes 0-7, 8-15, 16-23, 24-31, as words of a fragment.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// d += a b.
__device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sums of 16 columns as the left operand of a product over these columns.
__device__ __forceinline__ void as_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack(left[0], left[1]);
  a[1] = pack(left[2], left[3]);
  a[2] = pack(right[0], right[1]);
  a[3] = pack(right[2], right[3]);
}

// Makes the compiler forget what it knows of a value, so that it computes again what follows from it.
__device__ __forceinline__ void forget(uint32_t& value) { asm volatile("" : "+r"(value)); }

// threadIdx.x, of which the compiler does not know that it is: what follows from it is computed again at every use and
// takes no registers in between.
__device__ __forceinline__ uint32_t fresh_thread() {
  uint32_t thread = threadIdx.x;
  forget(thread);
  return thread;
}

// A tile of rows of kColumns bf16 in shared memory. Word w (16 bytes) of row r lies at place w ^ (r % 8) of the row: eight
// rows of a matrix, and eight words of a row, lie in different banks. Tiles begin at a multiple of 8 rows' bytes.
template <int kColumns>
struct Swizzled {
  static constexpr uint32_t kRowBytes = kColumns * 2;
  static constexpr uint32_t kRowWords = kColumns / 8;

  static __device__ __forceinline__ uint32_t offset(uint32_t row, uint32_t word) {
    return row * kRowBytes + ((word ^ (row % 8)) * 16);
  }

  // What this lane points at for 16 rows and the columns 16 step to 16 step + 15, from row 0 and step 0. The two words of
  // a b are neighbours in every case: others the compiler would have to move there.
  //   lane_offset   load_matrices: the a of these rows
  //                 load_transposed: words 0, 1 and 2, 3 are the b of the first and the last eight columns
  //   lane_offset_of_columns   load_matrices: words 0, 1 and 2, 3 are the b whose columns are the first and the last eight
  //                 rows
  static __device__ __forceinline__ uint32_t lane_offset(uint32_t thread) {
    return offset(thread % 16, thread % 32 / 16);
  }
  static __device__ __forceinline__ uint32_t lane_offset_of_columns(uint32_t thread) {
    return offset(thread % 8 + thread % 32 / 16 * 8, thread / 8 % 2);
  }

  // The same from row `row`, a multiple of 8, and step `step`. A step is two words: its bits do not meet the other terms'.
  static __device__ __forceinline__ uint32_t at(uint32_t lane_offset, uint32_t row, uint32_t step) {
    return (lane_offset ^ step * 32) + row * kRowBytes;
  }

  // Begins to copy kRows rows; those from `rows` on become zeros.
  template <int kRows, int kThreads>
  static __device__ __forceinline__ void copy(uint32_t to, const __nv_bfloat16* from, uint64_t stride, int rows) {
    constexpr int kPassRows = kThreads / kRowWords;
    static_assert(kPassRows % 8 == 0 && kRows % kPassRows == 0, "a pass keeps a thread's place in its row");
    const uint32_t thread = fresh_thread();
    const int row = thread / kRowWords, word = thread % kRowWords;
    const uint32_t first = to + offset(row, word);
    from += row * stride + word * 8;
#pragma unroll
    for (int pass = 0; pass < kRows / kPassRows; ++pass) {
      copy16(first + pass * kPassRows * kRowBytes, from, row + pass * kPassRows < rows);
      from += kPassRows * stride;
    }
  }
};

}  // namespace granite::mma
