// The host's twin of kernels_cu/include/texture.cuh. A handle is the address of a HostTexture, which Python fills in; an
// array is plain rows here, as nobody can see how the GPU lays one out. Fetches are not traffic of the load/store unit and
// are not recorded as such.
#ifndef CUPAGED_TEXTURE_CUH
#define CUPAGED_TEXTURE_CUH

#include <cuda_fp16.h>

#include "cuda_host.h"

namespace cupaged {

// One texture object, or the surface over the same memory; the mirror of HostTexture in cupaged/ops/textures.py.
struct HostTexture {
  unsigned char* memory;
  int64_t pitch_bytes;       // from one row to the next
  int32_t width, height;     // in texels
  int32_t texel_bytes;
  int32_t halves;            // 1: four channels of half precision, which a fetch turns into float
};

template <typename Texel>
Texel fetch(unsigned long long handle, int x, int y, Site site) {
  const auto& texture = *reinterpret_cast<const HostTexture*>(handle);
  constexpr bool floats = std::is_same_v<Texel, float4>;
  if (texture.halves != 0 ? !floats : texture.texel_bytes != sizeof(Texel))
    fail(site, "a texture is fetched from as another type than its texels have");
  Texel texel = {};
  if (x < 0 || y < 0 || x >= texture.width || y >= texture.height) return texel;
  const unsigned char* from = texture.memory + y * texture.pitch_bytes + int64_t{x} * texture.texel_bytes;
  if constexpr (floats) {
    if (texture.halves != 0) {
      __half half[4];
      std::memcpy(half, from, sizeof(half));
      return {__half2float(half[0]), __half2float(half[1]), __half2float(half[2]), __half2float(half[3])};
    }
  }
  std::memcpy(&texel, from, sizeof(Texel));
  return texel;
}

}  // namespace cupaged

template <typename Texel>
void fetch_1d(Texel& texel, bool wanted, unsigned long long texture, int x, CUPAGED_CALLER) {
  if (wanted) texel = cupaged::fetch<Texel>(texture, x, 0, {file, line});
}

template <typename Texel>
void fetch_2d(Texel& texel, bool wanted, unsigned long long texture, int x, int y, CUPAGED_CALLER) {
  if (wanted) texel = cupaged::fetch<Texel>(texture, x, y, {file, line});
}

template <typename Texel>
void write_2d(unsigned long long surface, int x, int y, Texel texel, CUPAGED_CALLER) {
  const auto& array = *reinterpret_cast<const cupaged::HostTexture*>(surface);
  if (array.texel_bytes != sizeof(Texel)) cupaged::fail({file, line}, "a surface is written in another size than its texels have");
  if (x < 0 || y < 0 || x >= array.width || y >= array.height)
    cupaged::fail({file, line}, "a surface is written outside its array, which traps on the GPU");
  std::memcpy(array.memory + y * array.pitch_bytes + int64_t{x} * array.texel_bytes, &texel, sizeof(Texel));
}

#endif
