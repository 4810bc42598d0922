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
// One warp a head. Grid: x = token, y over heads; block = 32 x warps.
extern "C" __global__ void qkv_norm_rope_cache_write(const bf16* qkv, const bf16* q_norm, const bf16* k_norm,
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
