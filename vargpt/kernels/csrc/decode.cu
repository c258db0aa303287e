// The kernels for a new token that are compiled, and the functions that divide the work and launch the right ones.
#include "decode.cuh"
#include "launch.cuh"

namespace vargpt {

template <Format format, int width>
const char* launch(const Decode& call, int batch, void* stream) {
  if (call.splits > 0) {  // the cache holds something
    const char* error = launch_kernel(decode_attend<format, width>, call, decode_attend_grid(call, batch), 32,
                                      DecodeShared<width>::bytes, stream);
    if (error) return error;
  }
  return launch_kernel(decode_combine<format, width>, call, decode_combine_grid(call, batch), 32, 0, stream);
}

// How to divide the cached keys. The workspace that the call needs is batch x heads x count x (width + 2) floats.
Splits decode_splits(int batch, int key_heads, int past, int width) {
  return width == 64 ? split_keys_of_cache<64>(batch, key_heads, past, multiprocessors())
                     : split_keys_of_cache<128>(batch, key_heads, past, multiprocessors());
}

template <Format format>
const char* launch_width(const Decode& call, int batch, int width, void* stream) {
  return (width == 64 ? launch<format, 64> : launch<format, 128>)(call, batch, stream);
}

// Enqueues it for `batch` rows; returns null, or what is wrong. Whoever calls has checked everything, the width too,
// which is 64 or 128.
const char* launch_decode(const Decode& call, Format format, int batch, int width, void* stream) {
  return (format == Format::bf16 ? launch_width<Format::bf16> : launch_width<Format::fp16>)(call, batch, width, stream);
}

}  // namespace vargpt
