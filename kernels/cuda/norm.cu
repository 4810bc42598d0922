// RMSNorm and LayerNorm, each also behind a residual add. One block a row (x), whole warps, at most 1024 threads. A thread keeps up to
// KEPT vectors of the row in registers; rows that are no multiple of eight elements or longer than KEPT x 8 x 1024 take the
// `_any` kernels, which read the row twice.
#include "numeric.cuh"

constexpr int KEPT = 2;

// One vector for each round of the block over a row.
struct Row {
    Vector at[KEPT];
};

// What a thread has of `from`, a row of `width` elements.
__device__ __forceinline__ void load_row(Row& row, const bf16* from, int width) {
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
        const int i = (k * blockDim.x + threadIdx.x) * VECTOR;
        if (i < width) row.at[k] = load(from + i);
    }
}

// kept = x, or with ADD round(residual + x), which goes to `h` too. Returns the sum of a thread's elements, or of their SQUAREs.
template <bool ADD, bool SQUARE>
__device__ __forceinline__ float keep_row(Row& kept, const bf16* residual, const bf16* x, bf16* h, int width) {
    Row left;
    if (ADD) load_row(left, residual, width);
    load_row(kept, x, width);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
        const int i = (k * blockDim.x + threadIdx.x) * VECTOR;
        if (i < width) {
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                if (ADD) kept.at[k].at[e] = narrow(widen(left.at[k].at[e]) + widen(kept.at[k].at[e]));
                const float value = widen(kept.at[k].at[e]);
                sum += SQUARE ? value * value : value;
            }
            if (ADD) store(h + i, kept.at[k]);
        }
    }
    return sum;
}

// Weights are no kernel's output: they are loaded before waiting, so that nothing but the row is on the way.
template <bool ADD>
__device__ __forceinline__ void rms(const bf16* residual, const bf16* x, const bf16* w, bf16* h, bf16* out, int width, float eps) {
    __shared__ float scratch[32];
    release_next();
    Row weights, kept;
    load_row(weights, w, width);
    wait_for_previous();
    const size_t row = size_t(blockIdx.x) * width;
    const float sum = keep_row<ADD, true>(kept, residual + row, x + row, h + row, width);
    const float scale = rsqrtf(block_sum(sum, scratch) / width + eps);
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
        const int i = (k * blockDim.x + threadIdx.x) * VECTOR;
        if (i < width) {
            Vector y;
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) y.at[e] = narrow(widen(weights.at[k].at[e]) * rounded(widen(kept.at[k].at[e]) * scale));
            store(out + row + i, y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024) rms_norm(const bf16* x, const bf16* w, bf16* out, int width, float eps) {
    rms<false>(nullptr, x, w, nullptr, out, width, eps);
}

// h = round(residual + x); out = rms_norm(h).
extern "C" __global__ void __launch_bounds__(1024) add_rms_norm(const bf16* residual, const bf16* x, const bf16* w, bf16* h, bf16* out, int width, float eps) {
    rms<true>(residual, x, w, h, out, width, eps);
}

// As add_rms_norm for any width; without a residual (null) `h` is not written.
extern "C" __global__ void rms_norm_any(const bf16* residual, const bf16* x, const bf16* w, bf16* h, bf16* out, int width,
                                        float eps) {
    __shared__ float scratch[32];
    const size_t row = size_t(blockIdx.x) * width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float value = widen(x[row + i]);
        if (residual != nullptr) {
            value = rounded(widen(residual[row + i]) + value);
            h[row + i] = narrow(value);
        }
        sum += value * value;
    }
    const float scale = rsqrtf(block_sum(sum, scratch) / width + eps);
    // Each thread reads back only what it wrote itself.
    const bf16* source = residual != nullptr ? h : x;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        out[row + i] = narrow(widen(w[i]) * rounded(widen(source[row + i]) * scale));
    }
}

// out = round((x - mean) / sqrt(variance + eps) w + b).
template <bool ADD>
__device__ __forceinline__ void layer(const bf16* residual, const bf16* x, const bf16* w, const bf16* b, bf16* h, bf16* out, int width, float eps) {
    __shared__ float scratch[32];
    const size_t row = size_t(blockIdx.x) * width;
    Row kept;
    const float sum = keep_row<ADD, false>(kept, residual + row, x + row, h + row, width);
    const float mean = block_sum(sum, scratch) / width;
    float square = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
        if ((k * blockDim.x + threadIdx.x) * VECTOR < width) {
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                const float d = widen(kept.at[k].at[e]) - mean;
                square += d * d;
            }
        }
    }
    const float scale = rsqrtf(block_sum(square, scratch) / width + eps);
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
        const int i = (k * blockDim.x + threadIdx.x) * VECTOR;
        if (i < width) {
            const Vector weight = load(w + i), bias = load(b + i);
            Vector y;
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                y.at[e] = narrow((widen(kept.at[k].at[e]) - mean) * scale * widen(weight.at[e]) + widen(bias.at[e]));
            }
            store(out + row + i, y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024) layer_norm(const bf16* x, const bf16* w, const bf16* b, bf16* out, int width, float eps) {
    layer<false>(nullptr, x, w, b, nullptr, out, width, eps);
}

// h = round(residual + x); out = layer_norm(h).
extern "C" __global__ void __launch_bounds__(1024) add_layer_norm(const bf16* residual, const bf16* x, const bf16* w, const bf16* b, bf16* h, bf16* out, int width,
                                          float eps) {
    layer<true>(residual, x, w, b, h, out, width, eps);
}

// As add_layer_norm for any width; without a residual (null) `h` is not written.
extern "C" __global__ void layer_norm_any(const bf16* residual, const bf16* x, const bf16* w, const bf16* b, bf16* h, bf16* out,
                                          int width, float eps) {
    __shared__ float scratch[32];
    const size_t row = size_t(blockIdx.x) * width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float value = widen(x[row + i]);
        if (residual != nullptr) {
            value = rounded(widen(residual[row + i]) + value);
            h[row + i] = narrow(value);
        }
        sum += value;
    }
    const float mean = block_sum(sum, scratch) / width;
    // Each thread reads back only what it wrote itself.
    const bf16* source = residual != nullptr ? h : x;
    float square = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float d = widen(source[row + i]) - mean;
        square += d * d;
    }
    const float scale = rsqrtf(block_sum(square, scratch) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        out[row + i] = narrow((widen(source[row + i]) - mean) * scale * widen(w[i]) + widen(b[i]));
    }
}
