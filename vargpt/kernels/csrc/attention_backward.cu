// The backward kernels that are compiled, and the function that launches the right ones.
#include "attention_backward_keys.cuh"
#include "attention_backward_prepare.cuh"
#include "attention_backward_queries.cuh"
#include "launch.cuh"

namespace vargpt {

template <Format format, int width, bool cosine>
const char* launch(const AttentionBackward& call, void* stream) {
  constexpr int bytes = AttentionBackwardShared<width>::bytes;
  const char* error = launch_kernel(attention_backward_prepare<format, width, cosine>, call,
                                    attention_backward_prepare_grid<width, cosine>(call), kThreads, 0, stream);
  if (error) return error;
  error = launch_kernel(attention_backward_keys<format, width, cosine>, call, attention_backward_keys_grid(call),
                        kThreads, bytes, stream);
  if (error) return error;
  error = launch_kernel(attention_backward_queries<format, width, cosine>, call, attention_backward_queries_grid(call),
                        kThreads, bytes, stream);
  if (error || !cosine) return error;
  return launch_kernel(attention_backward_head_scales<kHeadScaleThreads>, call, dim3(call.heads), kHeadScaleThreads, 0,
                       stream);
}

template <Format format>
const char* launch_width(const AttentionBackward& call, int width, bool cosine, void* stream) {
  if (width == 64) return (cosine ? launch<format, 64, true> : launch<format, 64, false>)(call, stream);
  return (cosine ? launch<format, 128, true> : launch<format, 128, false>)(call, stream);
}

// Enqueues the gradients of attention; returns null, or what is wrong. Whoever calls has checked everything, the width
// too, which is 64 or 128.
const char* launch_attention_backward(const AttentionBackward& call, Format format, int width, bool cosine,
                                      void* stream) {
  return (format == Format::bf16 ? launch_width<Format::bf16> : launch_width<Format::fp16>)(call, width, cosine,
                                                                                            stream);
}

}  // namespace vargpt
