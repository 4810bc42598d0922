// Numbers in device code: bf16 with explicit rounding, 16-byte vectors of eight elements, sums over a warp and a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

using bf16 = __nv_bfloat16;

// Elements of one 16-byte access.
constexpr int VECTOR = 8;

__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
// Round to nearest even.
__device__ __forceinline__ bf16 narrow(float x) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ float rounded(float x) { return widen(narrow(x)); }

// Eight neighbouring elements.
struct alignas(16) Vector {
    bf16 at[VECTOR];
};
static_assert(sizeof(Vector) == 16, "one 16-byte access");

__device__ __forceinline__ Vector load(const bf16* from) {
    Vector v;
    *reinterpret_cast<uint4*>(&v) = *reinterpret_cast<const uint4*>(from);
    return v;
}
__device__ __forceinline__ void store(bf16* to, const Vector& v) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&v);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
}

// Sum over all threads of the block, in every thread. The block is whole warps. `scratch` holds 32 floats; a barrier must lie
// between two uses of it, and the one at the start of this function is it.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

// Lets the next kernel of the stream start its prologue, and waits for the one before: programmatic dependent launch. Both do
// nothing where the launch did not ask for it. Nothing that an earlier kernel wrote may be read, and nothing that it reads
// may be written, before `wait_for_previous`.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void release_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
