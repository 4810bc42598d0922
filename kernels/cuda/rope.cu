// Rotation angles of a step, and the fused pass between the qkv projection and attention: per-head RMSNorm of q and k,
// half-split RoPE with Hugging Face's three roundings, keys and values into their pages.
#include "numeric.cuh"

// The table [positions, half] of cos and sin, made once: angle = f32(position) * frequency, rounded to f32 before cos and sin,
// which are taken in f64, rounded to f32, then to bf16. Grid: x over positions x half.
extern "C" __global__ void rope_table(const float* frequencies, bf16* cosines, bf16* sines, int half, size_t count) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    double sine, cosine;
    sincos(double(__fmul_rn(float(i / half), frequencies[i % half])), &sine, &cosine);
    cosines[i] = narrow(float(cosine));
    sines[i] = narrow(float(sine));
}

// Rows of the table at positions [tokens, 3], each frequency at the position on its axis. Grid: x over tokens x half.
extern "C" __global__ void rope_gather(const unsigned* positions, const unsigned* axes, const bf16* cosines, const bf16* sines,
                                       bf16* cos_out, bf16* sin_out, int half, int rows, int count) {
    release_next();
    wait_for_previous();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int token = i / half, frequency = i % half;
    // The host checks positions before a step, but not before a replay.
    const size_t from = size_t(min(positions[token * 3 + axes[frequency]], unsigned(rows - 1))) * half + frequency;
    cos_out[i] = cosines[from];
    sin_out[i] = sines[from];
}

// Pairs (i, i + head_dim / 2) of one head that a lane holds: head_dim up to 32 x 2 x PAIRS.
constexpr int PAIRS = 4;

// qkv [tokens, (heads + 2 kv_heads) head_dim] -> q_out [tokens, heads head_dim]; keys and values to page row `slots[token]`
// (block x block_tokens + row) of pools [.., kv_heads, head_dim]; a slot of -1 is a padded token, whose key is not kept.
// Any even head_dim up to 256: one warp a head. Grid: x = token, y over heads; block = 32 x warps.
extern "C" __global__ void qkv_norm_rope_cache_write_any(const bf16* qkv, const bf16* q_norm, const bf16* k_norm,
                                                     const bf16* cosines, const bf16* sines, const int* slots, bf16* q_out,
                                                     bf16* keys, bf16* values, int heads, int kv_heads, int head_dim,
                                                     float eps) {
    release_next();
    const int token = blockIdx.x, lane = threadIdx.x % 32;
    const int head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
    if (head >= heads + 2 * kv_heads) return;
    wait_for_previous();
    const int half = head_dim / 2;
    const bf16* source = qkv + (size_t(token) * (heads + 2 * kv_heads) + head) * head_dim;
    const int slot = slots[token];
    const int kv_head = head < heads + kv_heads ? head - heads : head - heads - kv_heads;
    const size_t place = (size_t(slot) * kv_heads + kv_head) * head_dim;
    if (head >= heads && slot < 0) return;
    if (head >= heads + kv_heads) {
        for (int i = lane; i < head_dim; i += 32) values[place + i] = source[i];
        return;
    }
    const bool is_query = head < heads;
    const bf16* weight = is_query ? q_norm : k_norm;
    bf16* target = is_query ? q_out + (size_t(token) * heads + head) * head_dim : keys + place;
    float low[PAIRS], high[PAIRS], sum = 0.0f;
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        const int i = k * 32 + lane;
        low[k] = high[k] = 0.0f;
        if (i < half) {
            low[k] = widen(source[i]);
            high[k] = widen(source[i + half]);
            sum += low[k] * low[k] + high[k] * high[k];
        }
    }
    const float scale = rsqrtf(warp_sum(sum) / head_dim + eps);
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        const int i = k * 32 + lane;
        if (i < half) {
            const float x = rounded(widen(weight[i]) * rounded(low[k] * scale));
            const float y = rounded(widen(weight[i + half]) * rounded(high[k] * scale));
            const float c = widen(cosines[size_t(token) * half + i]), s = widen(sines[size_t(token) * half + i]);
            target[i] = narrow(rounded(x * c) - rounded(y * s));
            target[i + half] = narrow(rounded(y * c) + rounded(x * s));
        }
    }
}

// The same for heads of 16 LANES elements, 16 bytes at a time: LANES lanes a head, each with eight neighbouring pairs.
// Grid: x = token; block = LANES x (heads + 2 kv_heads), rounded up to whole warps. Bytes: 4 (heads + 2 kv_heads) head_dim a token.
template <int LANES>
__device__ void norm_rope_write(const bf16* qkv, const bf16* q_norm, const bf16* k_norm, const bf16* cosines, const bf16* sines,
                                const int* slots, bf16* q_out, bf16* keys, bf16* values, int heads, int kv_heads, float eps) {
    constexpr int HALF = VECTOR * LANES, DIM = 2 * HALF;
    release_next();
    const int token = blockIdx.x, at = threadIdx.x % LANES * VECTOR, all = heads + 2 * kv_heads;
    const int head = threadIdx.x / LANES;
    const bool is_query = head < heads, is_value = head >= heads + kv_heads;
    const bf16* source = qkv + (size_t(token) * all + min(head, all - 1)) * DIM;
    // Weights and slots are no kernel's output; all that is loaded after waiting is loaded at once.
    const bf16* weight = is_query ? q_norm : k_norm;
    const Vector weight_low = load(weight + at), weight_high = load(weight + HALF + at);
    const int slot = slots[token];
    wait_for_previous();
    const Vector low = load(source + at), high = load(source + HALF + at);
    const Vector cosine = load(cosines + size_t(token) * HALF + at), sine = load(sines + size_t(token) * HALF + at);
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) sum += widen(low.at[e]) * widen(low.at[e]) + widen(high.at[e]) * widen(high.at[e]);
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (head >= all || (!is_query && slot < 0)) return;
    const size_t place = (size_t(slot) * kv_heads + (is_value ? head - heads - kv_heads : head - heads)) * DIM;
    if (is_value) {
        store(values + place + at, low);
        store(values + place + HALF + at, high);
        return;
    }
    bf16* target = is_query ? q_out + (size_t(token) * heads + head) * DIM : keys + place;
    const float scale = rsqrtf(sum / DIM + eps);
    Vector out_low, out_high;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
        const float x = rounded(widen(weight_low.at[e]) * rounded(widen(low.at[e]) * scale));
        const float y = rounded(widen(weight_high.at[e]) * rounded(widen(high.at[e]) * scale));
        const float c = widen(cosine.at[e]), s = widen(sine.at[e]);
        out_low.at[e] = narrow(rounded(x * c) - rounded(y * s));
        out_high.at[e] = narrow(rounded(y * c) + rounded(x * s));
    }
    store(target + at, out_low);
    store(target + HALF + at, out_high);
}

#define ENTRY(NAME, LANES)                                                                                                      \
    extern "C" __global__ void NAME(const bf16* qkv, const bf16* q_norm, const bf16* k_norm, const bf16* cosines,             \
                                    const bf16* sines, const int* slots, bf16* q_out, bf16* keys, bf16* values, int heads,    \
                                    int kv_heads, float eps) {                                                                \
        norm_rope_write<LANES>(qkv, q_norm, k_norm, cosines, sines, slots, q_out, keys, values, heads, kv_heads, eps);        \
    }

ENTRY(qkv_norm_rope_cache_write_d64, 4)
ENTRY(qkv_norm_rope_cache_write_d128, 8)
ENTRY(qkv_norm_rope_cache_write_d256, 16)
