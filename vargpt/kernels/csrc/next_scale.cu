// The kernels for a new scale that are compiled, and the function that launches the right one.
#include "launch.cuh"
#include "next_scale.cuh"

namespace vargpt {

template <Format format, int width, bool cosine>
const char* launch(const NextScale& call, int batch, void* stream) {
  return launch_kernel(next_scale<format, width, cosine>, call, next_scale_grid(call, batch), kThreads,
                       AttentionForwardShared<width>::bytes, stream);
}

template <Format format>
const char* launch_width(const NextScale& call, int batch, int width, bool cosine, void* stream) {
  if (width == 64) return (cosine ? launch<format, 64, true> : launch<format, 64, false>)(call, batch, stream);
  return (cosine ? launch<format, 128, true> : launch<format, 128, false>)(call, batch, stream);
}

// Enqueues it for `batch` rows; returns null, or what is wrong. Whoever calls has checked everything, the width too,
// which is 64 or 128.
const char* launch_next_scale(const NextScale& call, Format format, int batch, int width, bool cosine, void* stream) {
  return (format == Format::bf16 ? launch_width<Format::bf16> : launch_width<Format::fp16>)(call, batch, width, cosine,
                                                                                            stream);
}

}  // namespace vargpt
