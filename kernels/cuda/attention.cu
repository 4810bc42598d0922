// Attention for any head size up to 256: the fallback where no specialised kernel fits, and their reference on the device.
// One block of 128 threads a (row, query head); online softmax over tiles of 128 keys, probabilities rounded before PV.
#include "numeric.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int MAX_DIM = 256;

struct Shared {
    float query[MAX_DIM];
    float score[THREADS];
    float reduce[WARPS];
};

// `key(t)` and `value(t)` give pointers to token t's row, or load through them; key elements come rounded.
template <typename Key, typename Value>
__device__ void attend(Shared& shared, Key key, Value value, int visible, int head_dim, float scale, bf16* out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float highest = -INFINITY, total = 0.0f, sum[MAX_DIM / THREADS] = {};
    for (int first = 0; first < visible; first += THREADS) {
        const int count = min(THREADS, visible - first);
        for (int t = warp; t < count; t += WARPS) {
            float dot = 0.0f;
            for (int d = lane; d < head_dim; d += 32) dot += shared.query[d] * key(first + t, d);
            dot = warp_sum(dot);
            if (lane == 0) shared.score[t] = dot * scale;
        }
        __syncthreads();
        const float own = threadIdx.x < count ? shared.score[threadIdx.x] : -INFINITY;
        const float part = warp_max(own);
        if (lane == 0) shared.reduce[warp] = part;
        __syncthreads();
        float now = highest;
        for (int w = 0; w < WARPS; ++w) now = fmaxf(now, shared.reduce[w]);
        const float probability = threadIdx.x < count ? expf(own - now) : 0.0f;
        __syncthreads();
        shared.score[threadIdx.x] = probability;
        const float share = warp_sum(probability);
        if (lane == 0) shared.reduce[warp] = share;
        __syncthreads();
        const float shrink = expf(highest - now);
        highest = now;
        total *= shrink;
        for (int w = 0; w < WARPS; ++w) total += shared.reduce[w];
#pragma unroll
        for (int k = 0; k < MAX_DIM / THREADS; ++k) {
            const int d = k * THREADS + threadIdx.x;
            if (d < head_dim) {
                float add = sum[k] * shrink;
                for (int t = 0; t < count; ++t) add += rounded(shared.score[t]) * value(first + t, d);
                sum[k] = add;
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < MAX_DIM / THREADS; ++k) {
        const int d = k * THREADS + threadIdx.x;
        // A padded row sees nothing: zeros.
        if (d < head_dim) out[d] = narrow(visible > 0 ? sum[k] / total : 0.0f);
    }
}

// q, out [T, heads head_dim]; pools [blocks, block_tokens, kv_heads, head_dim]; table [sequences, *stride], whose width
// is in memory, so that a captured graph serves any; context [sequences]; query_start [sequences + 1]. With `skip_single`, sequences of one row are left alone: another kernel has them.
// Grid: x = row, y = head.
extern "C" __global__ void paged_attention_any(const bf16* q, const bf16* keys, const bf16* values, const int* table,
                                               const int* context, const int* query_start, bf16* out, const int* stride,
                                               int sequences, int heads, int kv_heads, int head_dim, int block_tokens,
                                               int skip_single, float scale) {
    __shared__ Shared shared;
    const int row = blockIdx.x, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int low = 0, high = sequences;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (query_start[middle] <= row) low = middle; else high = middle;
    }
    if (skip_single && query_start[low + 1] - query_start[low] == 1) return;
    const int visible = max(0, context[low] - (query_start[low + 1] - 1 - row));
    const bf16* query = q + (size_t(row) * heads + head) * head_dim;
    for (int d = threadIdx.x; d < head_dim; d += THREADS) shared.query[d] = widen(query[d]);
    __syncthreads();
    const int* blocks = table + size_t(low) * *stride;
    auto at = [&](int t, int d) {
        const size_t page_row = size_t(blocks[t / block_tokens]) * block_tokens + t % block_tokens;
        return (page_row * kv_heads + kv_head) * head_dim + d;
    };
    attend(
        shared, [&](int t, int d) { return widen(keys[at(t, d)]); }, [&](int t, int d) { return widen(values[at(t, d)]); },
        visible, head_dim, scale, out + (size_t(row) * heads + head) * head_dim);
}

// Half-split rotation in f32, rounded once, of element d of a head at `head`.
__device__ __forceinline__ float rotated(const bf16* head, const float* cosines, const float* sines, int d, int half) {
    const int i = d < half ? d : d - half;
    const float x = widen(head[i]), y = widen(head[i + half]);
    return rounded(d < half ? x * cosines[i] - y * sines[i] : y * cosines[i] + x * sines[i]);
}

// qkv [N, 3, heads, head_dim]; cos, sin f32 [N, head_dim / 2]; start [segments + 1]; out [N, heads head_dim]. Grid: x = row,
// y = head.
extern "C" __global__ void segment_attention_any(const bf16* qkv, const float* cosines, const float* sines, const int* start,
                                                 bf16* out, int segments, int heads, int head_dim, float scale) {
    __shared__ Shared shared;
    const int row = blockIdx.x, head = blockIdx.y, half = head_dim / 2;
    int low = 0, high = segments;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (start[middle] <= row) low = middle; else high = middle;
    }
    const int first = start[low];
    auto part = [&](int r, int which) { return qkv + ((size_t(r) * 3 + which) * heads + head) * head_dim; };
    for (int d = threadIdx.x; d < head_dim; d += THREADS) {
        shared.query[d] = rotated(part(row, 0), cosines + size_t(row) * half, sines + size_t(row) * half, d, half);
    }
    __syncthreads();
    attend(
        shared,
        [&](int t, int d) {
            const int r = first + t;
            return rotated(part(r, 1), cosines + size_t(r) * half, sines + size_t(r) * half, d, half);
        },
        [&](int t, int d) { return widen(part(first + t, 2)[d]); }, start[low + 1] - first, head_dim, scale,
        out + (size_t(row) * heads + head) * head_dim);
}
