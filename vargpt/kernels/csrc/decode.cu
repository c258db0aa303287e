// The kernels for a new token that are compiled, and the functions that divide the work and launch the right ones.
#include "decode.cuh"

namespace vargpt {

template <Format format, int width>
cudaError_t launch(const Decode& call, int batch, cudaStream_t stream) {
  if (call.splits > 0) {  // the cache holds something
    decode_attend<format, width>
        <<<decode_attend_grid(call, batch), 32, DecodeShared<width>::bytes, stream>>>(call);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  decode_combine<format, width><<<decode_combine_grid(call, batch), 32, 0, stream>>>(call);
  return cudaGetLastError();
}

template <Format format>
cudaError_t launch_width(const Decode& call, int batch, int width, cudaStream_t stream) {
  if (width == 64) return launch<format, 64>(call, batch, stream);
  if (width == 128) return launch<format, 128>(call, batch, stream);
  return cudaErrorInvalidValue;
}

// How to divide the cached keys. The workspace that the call needs is batch x heads x count x (width + 2) floats.
Splits decode_splits(int batch, int key_heads, int past, int width, int multiprocessors) {
  return width == 64 ? split_keys_of_cache<64>(batch, key_heads, past, multiprocessors)
                     : split_keys_of_cache<128>(batch, key_heads, past, multiprocessors);
}

// Enqueues it for `batch` rows. Whoever calls has checked shapes, strides, alignment, and that the cache has room.
cudaError_t launch_decode(const Decode& call, Format format, int batch, int width, cudaStream_t stream) {
  return format == Format::bf16 ? launch_width<Format::bf16>(call, batch, width, stream)
                                : launch_width<Format::fp16>(call, batch, width, stream);
}

}  // namespace vargpt
