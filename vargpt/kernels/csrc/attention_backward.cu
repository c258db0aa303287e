// The backward kernels that are compiled, and the function that launches the right ones.
#include "attention_backward.cuh"

namespace vargpt {

// More than 48 KiB of shared memory must be asked for.
cudaError_t launch(void (*kernel)(AttentionBackward), const AttentionBackward& call, dim3 grid, int threads, int bytes,
                   cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, bytes, stream>>>(call);
  return cudaGetLastError();
}

template <Format format, int width, bool cosine>
cudaError_t launch_all(const AttentionBackward& call, cudaStream_t stream) {
  constexpr int bytes = AttentionBackwardShared<width>::bytes;
  cudaError_t error = launch(attention_backward_prepare<format, width, cosine>, call,
                             attention_backward_prepare_grid<width, cosine>(call), kThreads, 0, stream);
  if (error != cudaSuccess) return error;
  error = launch(attention_backward_keys<format, width, cosine>, call, attention_backward_keys_grid(call), kThreads,
                 bytes, stream);
  if (error != cudaSuccess) return error;
  error = launch(attention_backward_queries<format, width, cosine>, call, attention_backward_queries_grid(call),
                 kThreads, bytes, stream);
  if (error != cudaSuccess || !cosine) return error;
  return launch(attention_backward_head_scales<kHeadScaleThreads>, call, dim3(call.heads), kHeadScaleThreads, 0,
                stream);
}

template <Format format>
cudaError_t launch_width(const AttentionBackward& call, int width, bool cosine, cudaStream_t stream) {
  if (width == 64 && cosine) return launch_all<format, 64, true>(call, stream);
  if (width == 64) return launch_all<format, 64, false>(call, stream);
  if (width == 128 && cosine) return launch_all<format, 128, true>(call, stream);
  if (width == 128) return launch_all<format, 128, false>(call, stream);
  return cudaErrorInvalidValue;
}

// Enqueues the gradients of attention. Whoever calls has checked shapes, strides, alignment and limits.
cudaError_t launch_attention_backward(const AttentionBackward& call, Format format, int width, bool cosine,
                                      cudaStream_t stream) {
  return format == Format::bf16 ? launch_width<Format::bf16>(call, width, cosine, stream)
                                : launch_width<Format::fp16>(call, width, cosine, stream);
}

}  // namespace vargpt
