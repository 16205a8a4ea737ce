// Texture and surface objects, whose handles are numbers: texels fetched through the texture units, by coordinates that
// count texels; and texels written where a surface shares a texture's array.
//
// A texel here is a vector of up to four channels: uint4 for 16 bytes as they are, or float4, into which the texture
// units turn four channels of half precision as they fetch.
#ifndef CUPAGED_TEXTURE_CUH   // the host build has included its twin by now
#define CUPAGED_TEXTURE_CUH

// One fetch where `wanted`, else zeros: what tex1Dfetch and tex2D become, predicated and volatile as the loads of
// global_memory.cuh are.
#define CUPAGED_FETCH(instruction, coordinates, register, ...)                                                 \
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %4, 0;\n@wanted " instruction                      \
               " {%0, %1, %2, %3}, [%5, {" coordinates "}];\n}"                                                \
               : "+" register(texel.x), "+" register(texel.y), "+" register(texel.z), "+" register(texel.w)    \
               : "r"(static_cast<unsigned int>(wanted)), "l"(texture), __VA_ARGS__)

// From linear memory.
__device__ __forceinline__ void fetch_1d(uint4& texel, bool wanted, unsigned long long texture, int x) {
  CUPAGED_FETCH("tex.1d.v4.u32.s32", "%6", "r", "r"(x));
}
__device__ __forceinline__ void fetch_1d(float4& texel, bool wanted, unsigned long long texture, int x) {
  CUPAGED_FETCH("tex.1d.v4.f32.s32", "%6", "f", "r"(x));
}

// From pitch-linear memory or an array. Coordinates become float on the way, which is exact below 2^24; a point lies in
// the texel that its coordinates round down to.
__device__ __forceinline__ void fetch_2d(uint4& texel, bool wanted, unsigned long long texture, int x, int y) {
  CUPAGED_FETCH("tex.2d.v4.u32.f32", "%6, %7", "r", "f"(static_cast<float>(x)), "f"(static_cast<float>(y)));
}
__device__ __forceinline__ void fetch_2d(float4& texel, bool wanted, unsigned long long texture, int x, int y) {
  CUPAGED_FETCH("tex.2d.v4.f32.f32", "%6, %7", "f", "f"(static_cast<float>(x)), "f"(static_cast<float>(y)));
}
#undef CUPAGED_FETCH

// To an array. A surface counts bytes along x, not texels.
template <typename Texel>
__device__ __forceinline__ void write_2d(unsigned long long surface, int x, int y, Texel texel) {
  surf2Dwrite(texel, surface, x * static_cast<int>(sizeof(Texel)), y);
}

#endif
