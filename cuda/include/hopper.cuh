// Hopper's own instructions (PTX ISA 9.0): barriers in shared memory, loads and sums by TMA, and products of warpgroups.
// For sm_90a only.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

namespace granite::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- barriers in shared memory: phases alternate, a wait names the parity of the phase whose end it awaits ----

__device__ __forceinline__ void barrier_init(uint64_t& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to TMA.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives and adds bytes that loads by TMA will bring before the phase can end.
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// ---- numbered barriers of a block ----

__device__ __forceinline__ void named_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- TMA ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What the L2 cache should think of data: kept long, or let go first.
enum class Cache { kKeep, kLetGo };

template <Cache kCache>
__device__ __forceinline__ uint64_t cache_policy() {
  uint64_t policy;
  if (kCache == Cache::kKeep)
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// One box of a tensor of three dimensions; what lies beyond the tensor comes as zeros.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, uint64_t& barrier, int column, int head,
                                         int token) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(to)),
      "l"(map), "r"(shared_address(&barrier)), "r"(column), "r"(head), "r"(token)
      : "memory");
}

// The same for data that the L2 cache may let go first.
__device__ __forceinline__ void load_passing_box(void* to, const CUtensorMap* map, uint64_t& barrier, int column,
                                                 int head, int token) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(&barrier)), "r"(column), "r"(head), "r"(token), "l"(cache_policy<Cache::kLetGo>())
      : "memory");
}

// Contiguous bytes, a multiple of 16.
__device__ __forceinline__ void load_bytes(void* to, const void* from, uint32_t bytes, uint64_t& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

// Contiguous bytes from shared memory to global memory, or added there as f32; the L2 cache should keep them.
__device__ __forceinline__ void store_kept_bytes(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes), "l"(cache_policy<Cache::kKeep>())
               : "memory");
}

__device__ __forceinline__ void add_kept_f32(float* to, const void* from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [%0], [%1], %2, %3;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes), "l"(cache_policy<Cache::kKeep>())
               : "memory");
}

__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but kPending groups of this thread's stores have read shared memory.
template <int kPending>
__device__ __forceinline__ void stores_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until all but kPending groups of this thread's stores have written.
template <int kPending>
__device__ __forceinline__ void stores_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// What threads wrote to shared memory becomes visible to TMA and to products.
__device__ __forceinline__ void fence_shared_for_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Makes what other blocks wrote, once acquired, visible to TMA.
__device__ __forceinline__ void fence_global_for_async() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Four matrices of 8 x 8 bf16 from fragments; lane l names the 16-byte row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3])
               : "memory");
}

// ---- registers between warpgroups ----

template <int kRegisters>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products of a warpgroup ----
//
// Operands in shared memory are panels of rows of 64 bf16, 128 bytes, in TMA's 128-byte swizzle, aligned to 1024 bytes;
// eight rows are an atom of 1024 bytes. "By rows": the summed dimension runs along the rows. "By columns": it runs across
// them, from row to row, and the other one along the rows; panels follow each other `panel_bytes` apart.

constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
constexpr uint32_t kAtomBytes = 1024;

__device__ __forceinline__ uint64_t by_rows(const void* panel) {
  return kSwizzle128 | uint64_t{kAtomBytes >> 4} << 32 | uint64_t{1} << 16 | (shared_address(panel) & 0x3ffff) >> 4;
}

__device__ __forceinline__ uint64_t by_columns(const void* panel, uint32_t panel_bytes) {
  return kSwizzle128 | uint64_t{kAtomBytes >> 4} << 32 | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         (shared_address(panel) & 0x3ffff) >> 4;
}

// From one step of 16 along the summed dimension to the next.
constexpr uint64_t kStepByRows = 32 >> 4;
constexpr uint64_t kStepByColumns = 16 * 128 >> 4;

// Before a warpgroup's first product that reads registers which it wrote.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of registers across a wait.
template <int kColumns>
__device__ __forceinline__ void settle(float (&d)[kColumns][4]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[j][e])::"memory");
  }
}

template <int kSteps>
__device__ __forceinline__ void settle(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[j][e])::"memory");
  }
}

#define GRANITE_D1(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define GRANITE_D4(j) GRANITE_D1(j), GRANITE_D1(j + 1), GRANITE_D1(j + 2), GRANITE_D1(j + 3)
#define GRANITE_D8 GRANITE_D4(0), GRANITE_D4(4)
#define GRANITE_D16 GRANITE_D8, GRANITE_D4(8), GRANITE_D4(12)
#define GRANITE_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define GRANITE_R32                                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define GRANITE_R64                                                                                                 \
  GRANITE_R32                                                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d [64, 8 kColumns] += a [64, 16] * b [16, 8 kColumns] with both in shared memory; `keep` 0 starts from zero.
template <bool kAByColumns, bool kBByColumns>
__device__ __forceinline__ void product(float (&d)[16][4], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" GRANITE_R64 "}, %64, %65, keep, 1, 1, %67, %68;\n}\n"
      : GRANITE_D16
      : "l"(a), "l"(b), "r"(keep), "n"(int{kAByColumns}), "n"(int{kBByColumns}));
}

template <bool kAByColumns, bool kBByColumns>
__device__ __forceinline__ void product(float (&d)[8][4], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" GRANITE_R32 "}, %32, %33, keep, 1, 1, %35, %36;\n}\n"
      : GRANITE_D8
      : "l"(a), "l"(b), "r"(keep), "n"(int{kAByColumns}), "n"(int{kBByColumns}));
}

template <bool kAByColumns, bool kBByColumns>
__device__ __forceinline__ void product(float (&d)[4][4], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" GRANITE_R16 "}, %16, %17, keep, 1, 1, %19, %20;\n}\n"
      : GRANITE_D4(0)
      : "l"(a), "l"(b), "r"(keep), "n"(int{kAByColumns}), "n"(int{kBByColumns}));
}

// The same with a in registers, as a fragment of a warp's 16 rows.
template <bool kBByColumns>
__device__ __forceinline__ void product(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, int keep) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" GRANITE_R64
      "}, {%64, %65, %66, %67}, %68, keep, 1, 1, %70;\n}\n"
      : GRANITE_D16
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(int{kBByColumns}));
}

template <bool kBByColumns>
__device__ __forceinline__ void product(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int keep) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" GRANITE_R32
      "}, {%32, %33, %34, %35}, %36, keep, 1, 1, %38;\n}\n"
      : GRANITE_D8
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(int{kBByColumns}));
}

#undef GRANITE_D1
#undef GRANITE_D4
#undef GRANITE_D8
#undef GRANITE_D16
#undef GRANITE_R16
#undef GRANITE_R32
#undef GRANITE_R64

// Four registers a step of 16 columns: accumulators rounded to bf16 as the a of a further product.
template <int kColumns>
__device__ __forceinline__ void as_operand(uint32_t (&a)[kColumns / 2][4], const float (&d)[kColumns][4]) {
#pragma unroll
  for (int step = 0; step < kColumns / 2; ++step) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float* pair = &d[2 * step + e / 2][2 * (e % 2)];
      const __nv_bfloat162 rounded = __floats2bfloat162_rn(pair[0], pair[1]);
      a[step][e] = static_cast<uint32_t>(__bfloat16_as_ushort(rounded.x)) |
                   static_cast<uint32_t>(__bfloat16_as_ushort(rounded.y)) << 16;
    }
  }
}

}  // namespace granite::hopper
