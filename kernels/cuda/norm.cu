// RMSNorm and LayerNorm, each also behind a residual add. One block a row (x), whole warps, at most 1024 threads. A thread keeps up to
// KEPT vectors of the row in registers; rows that are no multiple of eight elements or longer than KEPT x 8 x 1024 take the
// `_any` kernels, which read the row twice.
#include "numeric.cuh"

constexpr int KEPT = 4;

__device__ __forceinline__ void rms_finish(Vector (&kept)[KEPT], float sum, const bf16* w, bf16* out, int width, float eps,
                                           float* scratch) {
    const float scale = rsqrtf(block_sum(sum, scratch) / width + eps);
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
        const int i = (k * blockDim.x + threadIdx.x) * VECTOR;
        if (i < width) {
            const Vector weight = load(w + i);
            Vector y;
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) y.at[e] = narrow(widen(weight.at[e]) * rounded(widen(kept[k].at[e]) * scale));
            store(out + i, y);
        }
    }
}

extern "C" __global__ void rms_norm(const bf16* x, const bf16* w, bf16* out, int width, float eps) {
    __shared__ float scratch[32];
    release_next();
    wait_for_previous();
    const size_t row = size_t(blockIdx.x) * width;
    Vector kept[KEPT];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
        const int i = (k * blockDim.x + threadIdx.x) * VECTOR;
        if (i < width) {
            kept[k] = load(x + row + i);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) sum += widen(kept[k].at[e]) * widen(kept[k].at[e]);
        }
    }
    rms_finish(kept, sum, w, out + row, width, eps, scratch);
}

// h = round(residual + x); out = rms_norm(h).
extern "C" __global__ void add_rms_norm(const bf16* residual, const bf16* x, const bf16* w, bf16* h, bf16* out, int width,
                                        float eps) {
    __shared__ float scratch[32];
    release_next();
    wait_for_previous();
    const size_t row = size_t(blockIdx.x) * width;
    Vector kept[KEPT];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
        const int i = (k * blockDim.x + threadIdx.x) * VECTOR;
        if (i < width) {
            const Vector a = load(residual + row + i), b = load(x + row + i);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                kept[k].at[e] = narrow(widen(a.at[e]) + widen(b.at[e]));
                sum += widen(kept[k].at[e]) * widen(kept[k].at[e]);
            }
            store(h + row + i, kept[k]);
        }
    }
    rms_finish(kept, sum, w, out + row, width, eps, scratch);
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

// The kept row normalised: out = round((x - mean) / sqrt(variance + eps) w + b).
__device__ __forceinline__ void layer_finish(const Vector (&kept)[KEPT], float sum, const bf16* w, const bf16* b, bf16* out, int width,
                                             float eps, float* scratch) {
    const float mean = block_sum(sum, scratch) / width;
    float square = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
        if ((k * blockDim.x + threadIdx.x) * VECTOR < width) {
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                const float d = widen(kept[k].at[e]) - mean;
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
                y.at[e] = narrow((widen(kept[k].at[e]) - mean) * scale * widen(weight.at[e]) + widen(bias.at[e]));
            }
            store(out + i, y);
        }
    }
}

extern "C" __global__ void layer_norm(const bf16* x, const bf16* w, const bf16* b, bf16* out, int width, float eps) {
    __shared__ float scratch[32];
    const size_t row = size_t(blockIdx.x) * width;
    Vector kept[KEPT];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
        const int i = (k * blockDim.x + threadIdx.x) * VECTOR;
        if (i < width) {
            kept[k] = load(x + row + i);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) sum += widen(kept[k].at[e]);
        }
    }
    layer_finish(kept, sum, w, b, out + row, width, eps, scratch);
}

// h = round(residual + x); out = layer_norm(h).
extern "C" __global__ void add_layer_norm(const bf16* residual, const bf16* x, const bf16* w, const bf16* b, bf16* h, bf16* out,
                                          int width, float eps) {
    __shared__ float scratch[32];
    const size_t row = size_t(blockIdx.x) * width;
    Vector kept[KEPT];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
        const int i = (k * blockDim.x + threadIdx.x) * VECTOR;
        if (i < width) {
            const Vector left = load(residual + row + i), right = load(x + row + i);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                kept[k].at[e] = narrow(widen(left.at[e]) + widen(right.at[e]));
                sum += widen(kept[k].at[e]);
            }
            store(h + row + i, kept[k]);
        }
    }
    layer_finish(kept, sum, w, b, out + row, width, eps, scratch);
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
