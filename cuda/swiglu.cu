// SwiGLU and its gradient on rows [gate | up].
//
//   forward    y = round(silu(gate) * up)                              silu(g) = g * s, s = sigmoid(g) = 1 / (1 + e^-g)
//   backward   dgate = round(dy * up * s * (1 + gate * (1 - s)))       over gate
//              dup   = round(dy * silu(gate))                          over up
//              y     = round(silu(gate) * up)                          where it is asked for
//
// Operands
//   gate_up  [rows, 2 * inter] bf16, gate in the first half of a row, up in the second
//   dy, y    [rows, inter] bf16; y may be dy itself. Last strides 1, row strides in elements, any address.
//   All arithmetic is in f32, each result is rounded once, to nearest even (the twin's forward rounds silu(gate) too).
//   exp and the reciprocal are the fast ones: their relative error, below 2^-16 for every gate, does not show in bf16.
//
// Launch   grid ceil(rows * ceil(inter / 8) / 256), block 256, no shared memory
//   A thread owns eight elements of a row. Kernels *_any move them one by one, the others as 16-byte accesses, for which
//   all addresses, row strides and inter must be multiples of 8 elements.
//
// Cost     bytes an element of y: 6 forward, 10 backward, 12 with y, each read or written once. Bound by memory: the two
//   special functions and about 15 instructions an element take a third of what an H100 issues meanwhile.
//
// Twin     swiglu_reference and swiglu_backward_reference in src/kernels/swiglu.rs.
#include "bf16x8.cuh"

namespace {

using granite::Bf16x8;

struct SwigluParams {
  const __nv_bfloat16* dy;  // backward only
  __nv_bfloat16* gate_up;
  __nv_bfloat16* y;  // may be null, backward
  uint64_t dy_stride;
  uint64_t gate_up_stride;
  uint64_t y_stride;
  uint32_t groups;          // of eight elements, in all rows
  uint32_t groups_of_row;
  uint32_t inter;
  uint32_t reserved;
};
static_assert(sizeof(SwigluParams) == 64, "src/kernels/swiglu.rs asserts the same size");

constexpr uint32_t kThreads = 256;

__device__ __forceinline__ float sigmoid(float x) {
  // Not __fdividef, which makes 0 of 1 / y for y above 2^126.
  float reciprocal;
  asm("rcp.approx.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + __expf(-x)));
  return reciprocal;
}

// Where the eight elements of a thread lie.
struct Place {
  uint64_t row;
  uint32_t column;
  uint32_t valid;
};

__device__ __forceinline__ bool find(const SwigluParams& p, Place& place) {
  const uint32_t group = blockIdx.x * kThreads + threadIdx.x;
  if (group >= p.groups) return false;
  const uint32_t row = group / p.groups_of_row;
  place.row = row;
  place.column = (group - row * p.groups_of_row) * 8;
  place.valid = granite::valid8(place.column, p.inter);
  return true;
}

template <bool kVectorised>
__device__ __forceinline__ void swiglu(const SwigluParams& p) {
  Place at;
  if (!find(p, at)) return;
  const __nv_bfloat16* from = p.gate_up + at.row * p.gate_up_stride + at.column;
  const Bf16x8 gate = granite::load8<kVectorised>(from, at.valid);
  const Bf16x8 up = granite::load8<kVectorised>(from + p.inter, at.valid);
  Bf16x8 y;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 g = granite::unpack(gate.words[i]);
    const float2 u = granite::unpack(up.words[i]);
    y.words[i] = granite::pack(g.x * sigmoid(g.x) * u.x, g.y * sigmoid(g.y) * u.y);
  }
  granite::store8<kVectorised>(p.y + at.row * p.y_stride + at.column, y, at.valid);
}

struct Gradient {
  float gate;
  float up;
  float y;
};

__device__ __forceinline__ Gradient gradient(float dy, float gate, float up) {
  const float s = sigmoid(gate);
  const float silu = gate * s;
  return {dy * up * (s * fmaf(gate, 1.0f - s, 1.0f)), dy * silu, silu * up};
}

template <bool kVectorised>
__device__ __forceinline__ void swiglu_backward(const SwigluParams& p) {
  Place at;
  if (!find(p, at)) return;
  __nv_bfloat16* gate_up = p.gate_up + at.row * p.gate_up_stride + at.column;
  const Bf16x8 dy = granite::load8<kVectorised>(p.dy + at.row * p.dy_stride + at.column, at.valid);
  const Bf16x8 gate = granite::load8<kVectorised>(gate_up, at.valid);
  const Bf16x8 up = granite::load8<kVectorised>(gate_up + p.inter, at.valid);
  Bf16x8 dgate, dup, y;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 d = granite::unpack(dy.words[i]);
    const float2 g = granite::unpack(gate.words[i]);
    const float2 u = granite::unpack(up.words[i]);
    const Gradient low = gradient(d.x, g.x, u.x);
    const Gradient high = gradient(d.y, g.y, u.y);
    dgate.words[i] = granite::pack(low.gate, high.gate);
    dup.words[i] = granite::pack(low.up, high.up);
    y.words[i] = granite::pack(low.y, high.y);
  }
  granite::store8<kVectorised>(gate_up, dgate, at.valid);
  granite::store8<kVectorised>(gate_up + p.inter, dup, at.valid);
  if (p.y != nullptr) granite::store8<kVectorised>(p.y + at.row * p.y_stride + at.column, y, at.valid);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) swiglu_8(const __grid_constant__ SwigluParams p) {
  swiglu<true>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) swiglu_any(const __grid_constant__ SwigluParams p) {
  swiglu<false>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) swiglu_backward_8(const __grid_constant__ SwigluParams p) {
  swiglu_backward<true>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads) swiglu_backward_any(const __grid_constant__ SwigluParams p) {
  swiglu_backward<false>(p);
}
