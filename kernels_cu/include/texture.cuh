// Texture and surface objects, whose handles are numbers: texels fetched through the texture units, coordinates counted in
// texels, zeros outside; and texels written where a surface shares a texture's array.
//
// A texel here is a vector of up to four channels: uint4 for 16 bytes as they are, or float4, into which the texture
// units turn four channels of half precision as they fetch.
#ifndef CUPAGED_TEXTURE_CUH   // the host build has included its twin by now
#define CUPAGED_TEXTURE_CUH

// From linear memory.
template <typename Texel>
__device__ __forceinline__ Texel fetch_1d(unsigned long long texture, int x) {
  return tex1Dfetch<Texel>(texture, x);
}

// From pitch-linear memory or an array. Coordinates become float on the way, which is exact below 2^24; a point lies in
// the texel that its coordinates round down to.
template <typename Texel>
__device__ __forceinline__ Texel fetch_2d(unsigned long long texture, int x, int y) {
  return tex2D<Texel>(texture, static_cast<float>(x), static_cast<float>(y));
}

// To an array. A surface counts bytes along x, not texels.
template <typename Texel>
__device__ __forceinline__ void write_2d(unsigned long long surface, int x, int y, Texel texel) {
  surf2Dwrite(texel, surface, x * static_cast<int>(sizeof(Texel)), y);
}

#endif
