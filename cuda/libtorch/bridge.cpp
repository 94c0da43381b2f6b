// What granite needs of libtorch and tch does not bind: fused attention, deterministic backwards, and the allocator's
// figures.
//
// Every function returns null, or what went wrong: text that the caller frees with granite_free. Tensors come as the
// pointers that tch holds. Those given back are new and belong to the caller. Only libtorch's CPU half is linked: its
// CUDA half registers itself when it is loaded.
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/empty_like.h>

#include <cstring>
#include <exception>

namespace {

using at::Tensor;

template <typename Body>
char* guarded(Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("libtorch threw something that is no exception");
  }
}

Tensor* owned(Tensor tensor) { return new Tensor(std::move(tensor)); }

// Asks libtorch for the same bits every time, or does not, as long as it lives. With warn_only attention would only warn.
class Deterministic {
 public:
  explicit Deterministic(bool same_bits) {
    at::globalContext().setDeterministicAlgorithms(same_bits, /*warn_only=*/false);
  }
  ~Deterministic() { at::globalContext().setDeterministicAlgorithms(before_, warn_only_); }
  Deterministic(const Deterministic&) = delete;
  Deterministic& operator=(const Deterministic&) = delete;

 private:
  bool before_ = at::globalContext().deterministicAlgorithms();
  bool warn_only_ = at::globalContext().deterministicAlgorithmsWarnOnly();
};

at::DeviceAllocator* allocator() { return at::getDeviceAllocator(c10::DeviceType::CUDA); }

// [batch * length, heads, dim] as [batch, heads, length, dim], without a copy.
Tensor by_batch(const Tensor& x, int64_t batch) {
  return x.unflatten(0, {batch, x.size(0) / batch}).transpose(1, 2);
}

// The inverse.
Tensor flat(const Tensor& x) { return x.transpose(1, 2).reshape({-1, x.size(1), x.size(3)}); }

}  // namespace

extern "C" {

void granite_free(char* text) { free(text); }

// figures: allocated now, allocated at most, reserved now, reserved at most; bytes.
char* granite_memory(int8_t device, int64_t* figures) {
  return guarded([&] {
    const auto stats = allocator()->getDeviceStats(device);
    figures[0] = stats.allocated_bytes[0].current;
    figures[1] = stats.allocated_bytes[0].peak;
    figures[2] = stats.reserved_bytes[0].current;
    figures[3] = stats.reserved_bytes[0].peak;
  });
}

char* granite_reset_peak(int8_t device) {
  return guarded([&] { allocator()->resetPeakStats(device); });
}

char* granite_empty_cache() {
  return guarded([&] { allocator()->emptyCache(); });
}

// Host memory of the dtype and shape of `like` that a GPU reads and writes directly.
char* granite_pinned(const Tensor* like, Tensor** pinned) {
  return guarded([&] { *pinned = owned(at::empty_like(*like, like->options().pinned_memory(true))); });
}

char* granite_is_pinned(const Tensor* x, bool* pinned) {
  return guarded([&] { *pinned = x->is_pinned(); });
}

// cuDNN, sequences of one length. q [tokens, heads, dim]; k, v [tokens, kv_heads, dim]; kept: o, lse, seed, offset.
char* granite_cudnn_attention(const Tensor* q, const Tensor* k, const Tensor* v, int64_t batch, double scale,
                              Tensor** kept) {
  return guarded([&] {
    auto [o, lse, cum_q, cum_k, max_q, max_k, seed, offset, debug] = at::_scaled_dot_product_cudnn_attention(
        by_batch(*q, batch), by_batch(*k, batch), by_batch(*v, batch), std::nullopt, /*compute_log_sumexp=*/true,
        /*dropout_p=*/0.0, /*is_causal=*/true, /*return_debug_mask=*/false, scale);
    kept[0] = owned(flat(o));
    kept[1] = owned(lse);
    kept[2] = owned(seed);
    kept[3] = owned(offset);
  });
}

char* granite_cudnn_attention_backward(const Tensor* d_o, const Tensor* q, const Tensor* k, const Tensor* v,
                                       const Tensor* const* kept, int64_t batch, double scale, bool same_bits,
                                       Tensor** gradients) {
  return guarded([&] {
    const Deterministic deterministic(same_bits);
    const int64_t length = q->size(0) / batch;
    auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(
        by_batch(*d_o, batch), by_batch(*q, batch), by_batch(*k, batch), by_batch(*v, batch),
        by_batch(*kept[0], batch), *kept[1], *kept[2], *kept[3], /*attn_bias=*/Tensor(), /*cum_seq_q=*/Tensor(),
        /*cum_seq_k=*/Tensor(), length, length, /*dropout_p=*/0.0, /*is_causal=*/true, scale);
    gradients[0] = owned(flat(dq));
    gradients[1] = owned(flat(dk));
    gradients[2] = owned(flat(dv));
  });
}

// FlashAttention-2, packed: cu_seqlens [seqs + 1] i32 on the GPU. kept: o, lse, state, unused.
char* granite_flash_attention(const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* cu_seqlens,
                              int64_t longest, double scale, Tensor** kept) {
  return guarded([&] {
    auto [o, lse, state, unused, debug] =
        at::_flash_attention_forward(*q, *k, *v, *cu_seqlens, *cu_seqlens, longest, longest, /*dropout_p=*/0.0,
                                     /*is_causal=*/true, /*return_debug_mask=*/false, scale);
    kept[0] = owned(o);
    kept[1] = owned(lse);
    kept[2] = owned(state);
    kept[3] = owned(unused);
  });
}

char* granite_flash_attention_backward(const Tensor* d_o, const Tensor* q, const Tensor* k, const Tensor* v,
                                       const Tensor* const* kept, const Tensor* cu_seqlens, int64_t longest,
                                       double scale, bool same_bits, Tensor** gradients) {
  return guarded([&] {
    const Deterministic deterministic(same_bits);
    auto [dq, dk, dv] = at::_flash_attention_backward(*d_o, *q, *k, *v, *kept[0], *kept[1], *cu_seqlens, *cu_seqlens,
                                                      longest, longest, /*dropout_p=*/0.0, /*is_causal=*/true,
                                                      *kept[2], *kept[3], scale);
    gradients[0] = owned(dq);
    gradients[1] = owned(dk);
    gradients[2] = owned(dv);
  });
}

}  // extern "C"
