// SwiGLU, GELU and add. Threads take eight elements each where the length allows, else one.
#include "numeric.cuh"

__device__ __forceinline__ float silu_gate(float gate, float up) {
    return rounded(gate / (1.0f + expf(-gate))) * up;
}

// gate_up [rows, 2 width] (gate first) -> out [rows, width]. Grid: x over the row, y = row.
extern "C" __global__ void swiglu(const bf16* gate_up, bf16* out, int width) {
    release_next();
    wait_for_previous();
    const bf16* gate = gate_up + size_t(blockIdx.y) * 2 * width;
    const bf16* up = gate + width;
    bf16* to = out + size_t(blockIdx.y) * width;
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    if (width % VECTOR == 0) {
        const int i = thread * VECTOR;
        if (i >= width) return;
        const Vector g = load(gate + i), u = load(up + i);
        Vector y;
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) y.at[e] = narrow(silu_gate(widen(g.at[e]), widen(u.at[e])));
        store(to + i, y);
    } else {
        for (int i = thread; i < width; i += gridDim.x * blockDim.x) to[i] = narrow(silu_gate(widen(gate[i]), widen(up[i])));
    }
}

__device__ __forceinline__ float gelu(float x, bool erf_kind) {
    if (erf_kind) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    // (1 + tanh u) / 2 = 1 / (1 + exp(-2u)): nothing cancels, and two fast instructions are exact far beyond bf16.
    const float u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
    return __fdividef(x, 1.0f + __expf(-2.0f * u));
}

// Grid: x over all elements, eight a thread; the last thread takes what is left.
extern "C" __global__ void gelu(const bf16* x, bf16* out, size_t count, int erf_kind) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * VECTOR;
    if (i + VECTOR <= count) {
        const Vector v = load(x + i);
        Vector y;
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) y.at[e] = narrow(gelu(widen(v.at[e]), erf_kind != 0));
        store(out + i, y);
    } else {
        for (size_t k = i; k < count; ++k) out[k] = narrow(gelu(widen(x[k]), erf_kind != 0));
    }
}

extern "C" __global__ void add(const bf16* a, const bf16* b, bf16* out, size_t count) {
    release_next();
    wait_for_previous();
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * VECTOR;
    if (i + VECTOR <= count) {
        const Vector left = load(a + i), right = load(b + i);
        Vector y;
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) y.at[e] = narrow(widen(left.at[e]) + widen(right.at[e]));
        store(out + i, y);
    } else {
        for (size_t k = i; k < count; ++k) out[k] = narrow(widen(a[k]) + widen(b[k]));
    }
}
