// The kernels for a new scale that are compiled, and the function that launches the right one.
#include "next_scale.cuh"

namespace vargpt {

template <Format format, int width, bool cosine>
cudaError_t launch(const NextScale& call, int batch, cudaStream_t stream) {
  const auto kernel = next_scale<format, width, cosine>;
  constexpr int bytes = AttentionForwardShared<width>::bytes;
  // More than 48 KiB of shared memory must be asked for.
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<next_scale_grid(call, batch), kThreads, bytes, stream>>>(call);
  return cudaGetLastError();
}

template <Format format>
cudaError_t launch_width(const NextScale& call, int batch, int width, bool cosine, cudaStream_t stream) {
  if (width == 64 && cosine) return launch<format, 64, true>(call, batch, stream);
  if (width == 64) return launch<format, 64, false>(call, batch, stream);
  if (width == 128 && cosine) return launch<format, 128, true>(call, batch, stream);
  if (width == 128) return launch<format, 128, false>(call, batch, stream);
  return cudaErrorInvalidValue;
}

// Enqueues it for `batch` rows. Whoever calls has checked shapes, strides, alignment, and that the cache has room.
cudaError_t launch_next_scale(const NextScale& call, Format format, int batch, int width, bool cosine,
                              cudaStream_t stream) {
  return format == Format::bf16 ? launch_width<Format::bf16>(call, batch, width, cosine, stream)
                                : launch_width<Format::fp16>(call, batch, width, cosine, stream);
}

}  // namespace vargpt
