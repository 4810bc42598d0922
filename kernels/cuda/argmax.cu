// Greedy draw: index of the largest logit of each row, the lowest of equal ones; 0xffffffff if any is not finite.
#include "numeric.cuh"

// Larger values first, then lower indices: one 64-bit key whose maximum is the answer.
__device__ __forceinline__ unsigned long long key(float x, unsigned index) {
    const unsigned bits = __float_as_uint(x + 0.0f);  // -0 becomes +0: they compare equal.
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (static_cast<unsigned long long>(ordered) << 32) | (0xffffffffu - index);
}

// logits [rows, width] -> winners [rows]. Grid: x = row; block = 1024.
extern "C" __global__ void argmax_rows(const bf16* logits, unsigned* winners, int width) {
    __shared__ unsigned long long best_of[32];
    __shared__ int bad;
    release_next();
    if (threadIdx.x == 0) bad = 0;
    __syncthreads();
    wait_for_previous();
    const bf16* row = logits + size_t(blockIdx.x) * width;
    unsigned long long best = 0;
    bool finite = true;
    auto see = [&](bf16 element, int i) {
        const float x = widen(element);
        finite = finite && isfinite(x);
        const unsigned long long own = key(x, i);
        best = own > best ? own : best;
    };
    if (width % VECTOR == 0) {
        for (int i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            const Vector v = load(row + i);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) see(v.at[e], i + e);
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) see(row[i], i);
    }
    if (!finite) bad = 1;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const unsigned long long other = __shfl_xor_sync(0xffffffffu, best, distance);
        best = other > best ? other : best;
    }
    if (threadIdx.x % 32 == 0) best_of[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < int(blockDim.x / 32); ++w) best = best_of[w] > best ? best_of[w] : best;
        winners[blockIdx.x] = bad ? 0xffffffffu : 0xffffffffu - unsigned(best & 0xffffffffu);
    }
}
