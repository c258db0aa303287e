// The two kernels for a new token on a CPU. FORMAT and WIDTH say which of their instantiations.
#include "decode.cuh"

using namespace vargpt;

struct Shape {
  dim3 grid;
  int threads, shared_bytes;
};

extern "C" void decode_splits(int batch, int key_heads, int past, int multiprocessors, Splits* splits) {
  *splits = split_keys_of_cache<WIDTH>(batch, key_heads, past, multiprocessors);
}

extern "C" void decode_attend_shape(const Decode* call, int batch, Shape* shape) {
  *shape = {decode_attend_grid(*call, batch), 32, DecodeShared<WIDTH>::bytes};
}

extern "C" void decode_combine_shape(const Decode* call, int batch, Shape* shape) {
  *shape = {decode_combine_grid(*call, batch), 32, 0};
}

extern "C" int decode_attend_on_cpu(const Decode* call, int batch, uint64_t seed) {
  return cuda_on_cpu::launch(decode_attend<Format::FORMAT, WIDTH>, *call, decode_attend_grid(*call, batch), dim3(32),
                             DecodeShared<WIDTH>::bytes, seed);
}

extern "C" int decode_combine_on_cpu(const Decode* call, int batch, uint64_t seed) {
  return cuda_on_cpu::launch(decode_combine<Format::FORMAT, WIDTH>, *call, decode_combine_grid(*call, batch), dim3(32),
                             0, seed);
}
