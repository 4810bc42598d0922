// SwiGLU, GELU and add. Threads take eight elements each where the length allows, else one.
#include "numeric.cuh"

// Fast exponential and division: some 2^-21 of the value, far below bf16's 2^-9.
__device__ __forceinline__ float silu_gate(float gate, float up) {
    return rounded(__fdividef(gate, 1.0f + __expf(-gate))) * up;
}

// gate_up [rows, 2 width] (gate first) -> out [rows, width]; `count` = rows x width. Grid: x over count, 16 elements a thread if
// width is a multiple of eight, else one. Bytes: 6 count; floor = bytes / bandwidth.
extern "C" __global__ void swiglu(const bf16* gate_up, bf16* out, int width, size_t count) {
    constexpr int AT_ONCE = 2;
    release_next();
    wait_for_previous();
    if (width % VECTOR == 0) {
        const int vectors = width / VECTOR;
        Vector gate[AT_ONCE], up[AT_ONCE];
        size_t at[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            at[k] = (size_t(blockIdx.x) * AT_ONCE + k) * blockDim.x + threadIdx.x;
            if (at[k] * VECTOR >= count) break;
            const unsigned row = unsigned(at[k]) / vectors;
            const bf16* from = gate_up + (at[k] + size_t(row) * vectors) * VECTOR;
            gate[k] = load(from);
            up[k] = load(from + width);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (at[k] * VECTOR >= count) return;
            Vector y;
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) y.at[e] = narrow(silu_gate(widen(gate[k].at[e]), widen(up[k].at[e])));
            store(out + at[k] * VECTOR, y);
        }
    } else {
        const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
        if (i >= count) return;
        const size_t from = i + i / width * width;
        out[i] = narrow(silu_gate(widen(gate_up[from]), widen(gate_up[from + width])));
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
