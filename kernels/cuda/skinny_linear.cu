// Linear layers of few rows: y = round(x w^T (+ bias)) for 1..16 rows, one pass over the weights.
//
// The weight rows are the M side of mma m16n8k16, the rows of x its N side. A thread's 16-byte load is eight neighbouring inputs of one
// weight row; the order of the inputs within a product is free as long as x has the same, so those eight are the fragments of two
// products, and x comes by the same 16-byte loads. Weights go through a ring in shared memory that is private to each thread (it reads
// what it wrote), so nothing waits for another thread: the ring is only a deep queue of loads. The first loads do not depend on the
// kernel before, so they are issued before waiting for it (programmatic dependent launch): weights stream across launches.
// A block is 8 warps that split the inputs (64 at a time, round robin); their sums meet in shared memory in warp order. A row's result
// does not depend on how many rows there are, nor on the variant (_r1 or _r2).
//
// Grid: x = min(tiles, blocks resident at once: 2 a multiprocessor), where tiles = ceil(n / (16 R)), for the gated form
// ceil(n / 32); block: 256. Dynamic shared memory: 98,304 + 8,192 min(R B, 2) bytes (R row blocks, B =
// batches of 8 rows).
// Arguments: x [m, k], w [n, k], bias [n] or null, y [m, n]; k a multiple of 8. Gated: w is gate rows then up rows, y [m, n / 2] =
// round(round(silu(gate)) up), gate and up rounded first, no bias.
// Entries: skinny_linear_r{1,2}_b{1,2}, skinny_swiglu_b{1,2}: b1 for m <= 8, b2 for m <= 16; r2 halves the reads of x where n is large.
//
// Bytes: 2 n k (weights, once) + 2 m k (x, once from memory; tiles times from the L2) + 2 m n. Operations 2 m n k, padded to 16 n k B.
// Floor = bytes / bandwidth: 99.6 MB of gate and up at Qwen3-4B take 23 us at 4.26 TB/s.
#include "mma.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int SPAN = 64;  // Inputs of a step: one 128-byte line of each weight row.
#ifndef SKINNY_STAGES
#define SKINNY_STAGES 6
#endif
// Steps that x is asked for ahead of its use, together: a loaded L2 answers later than a step takes, and loads that come one by one
// share a scoreboard, so that waiting for the oldest would wait for the youngest.
#ifndef SKINNY_DEPTH
#define SKINNY_DEPTH 2
#endif

// Weights are read once: they must not push what is reused out of the L2.
__device__ __forceinline__ unsigned long long read_once() {
    unsigned long long policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void copy_16_once(unsigned to, const void* from, bool valid, unsigned long long policy) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(bytes), "l"(policy)
                 : "memory");
}
__device__ __forceinline__ uint4 read_shared(unsigned from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}

// R blocks of 16 weight rows, BATCH blocks of 8 rows of x.
template <int R, int BATCH, bool GATED>
__device__ void skinny(const bf16* x, const bf16* w, const bf16* bias, bf16* y, int m, int n, int k) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int STAGES = SKINNY_STAGES / R;
    constexpr int LOADS = 4 * R;
    constexpr int COLUMNS = 8 * BATCH;
    constexpr int PARITIES = R * BATCH < 4 ? 2 : 1;  // Of the sums: two of the largest would not leave room for two blocks.
    static_assert(!GATED || R == 2, "a gate block and an up block");
    float* sums = reinterpret_cast<float*>(shared + STAGES * LOADS * THREADS * 16);  // [PARITIES][WARPS][16 R][COLUMNS]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int outputs = GATED ? n / 2 : n;
    const int tile_rows = GATED ? 16 : 16 * R;
    const int tiles = (outputs + tile_rows - 1) / tile_rows;
    const int own = int(blockIdx.x) < tiles ? (tiles - 1 - int(blockIdx.x)) / int(gridDim.x) + 1 : 0;
    const int steps = ((k + SPAN - 1) / SPAN + WARPS - 1) / WARPS;
    const int items = own * steps;
    const unsigned ring = shared_address(shared) + threadIdx.x * 16;
    const unsigned long long policy = read_once();

    // Row of block r of a tile, before the lane's row is added; and where the rows of that block end.
    auto first_row = [&](int tile, int r) { return GATED ? r * outputs + tile * 16 : tile * tile_rows + r * 16; };
    int ahead_tile = blockIdx.x, ahead_step = 0, ahead_stage = 0;
    auto request = [&]() {
        const int column = (ahead_step * WARPS + warp) * SPAN + (lane % 4) * 8;
        const unsigned to = ring + ahead_stage * (LOADS * THREADS * 16);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int end = GATED ? (r + 1) * outputs : n;
#pragma unroll
            for (int j = 0; j < 4; ++j) {  // Rows lane / 4 and + 8, inputs 0..31 and 32..63.
                const int row = first_row(ahead_tile, r) + lane / 4 + (j / 2) * 8, at = column + (j % 2) * 32;
                const bool inside = row < end && at < k;
                copy_16_once(to + (4 * r + j) * (THREADS * 16), w + (inside ? size_t(row) * k + at : 0), inside, policy);
            }
        }
        ahead_stage = ahead_stage + 1 == STAGES ? 0 : ahead_stage + 1;
        if (++ahead_step == steps) {
            ahead_step = 0;
            ahead_tile += gridDim.x;
        }
    };
    int asked = 0;
#pragma unroll 1
    for (; asked < STAGES - 1; ++asked) {
        if (asked < items) request();
        copy_commit();
    }
    release_next();
    wait_for_previous();

    int next_step = 0;
    auto fetch = [&](uint4 (&to)[BATCH][2]) {
        const int column = (next_step * WARPS + warp) * SPAN + (lane % 4) * 8;
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const int row = b * 8 + lane / 4, at = column + s * 32;
                to[b][s] = row < m && at < k ? *reinterpret_cast<const uint4*>(x + size_t(row) * k + at) : make_uint4(0, 0, 0, 0);
            }
        next_step = next_step + 1 == steps ? 0 : next_step + 1;
    };
    constexpr int DEPTH = SKINNY_DEPTH / (BATCH * R) > 0 ? SKINNY_DEPTH / (BATCH * R) : 1;  // As many as registers hold.
    uint4 inputs[DEPTH][BATCH][2], coming[DEPTH][BATCH][2];
#pragma unroll
    for (int u = 0; u < DEPTH; ++u) fetch(coming[u]);
    float sum[R][BATCH][4] = {};
    int step = 0, tile = blockIdx.x, stage = 0, parity = 0;
    auto consume = [&](int item, const uint4 (&input)[BATCH][2]) {
        copy_wait<STAGES - 2>();
        const unsigned from = ring + stage * (LOADS * THREADS * 16);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const uint4 low = read_shared(from + (4 * r + s) * (THREADS * 16));
                const uint4 high = read_shared(from + (4 * r + 2 + s) * (THREADS * 16));
#pragma unroll
                for (int b = 0; b < BATCH; ++b) {
                    mma(sum[r][b], low.x, high.x, low.y, high.y, input[b][s].x, input[b][s].y);
                    mma(sum[r][b], low.z, high.z, low.w, high.w, input[b][s].z, input[b][s].w);
                }
            }
        if (item + STAGES - 1 < items) request();
        copy_commit();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (++step < steps) return;
        step = 0;
        float* mine = sums + (parity * WARPS + warp) * 16 * R * COLUMNS;
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int b = 0; b < BATCH; ++b)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    mine[(r * 16 + lane / 4 + (c / 2) * 8) * COLUMNS + b * 8 + (lane % 4) * 2 + c % 2] = sum[r][b][c];
                    sum[r][b][c] = 0.0f;
                }
        __syncthreads();
        auto whole = [&](int row, int column) {
            float total = 0.0f;
#pragma unroll
            for (int v = 0; v < WARPS; ++v) total += sums[((parity * WARPS + v) * 16 * R + row) * COLUMNS + column];
            return total;
        };
        for (int i = threadIdx.x; i < tile_rows * m; i += THREADS) {
            const int row = i % tile_rows, column = i / tile_rows, output = tile * tile_rows + row;
            if (output >= outputs) continue;
            float value = whole(row, column);
            if (GATED) {
                const float gate = rounded(value), up = rounded(whole(row + 16, column));
                value = rounded(gate / (1.0f + expf(-gate))) * up;
            } else if (bias != nullptr) {
                value += widen(bias[output]);
            }
            y[size_t(column) * outputs + output] = narrow(value);
        }
        parity = PARITIES - 1 - parity;
        if (PARITIES == 1) __syncthreads();
        tile += gridDim.x;
    };
#pragma unroll 1
    for (int item = 0; item < items; item += DEPTH) {
#pragma unroll
        for (int u = 0; u < DEPTH; ++u)
#pragma unroll
            for (int b = 0; b < BATCH; ++b) inputs[u][b][0] = coming[u][b][0], inputs[u][b][1] = coming[u][b][1];
#pragma unroll
        for (int u = 0; u < DEPTH; ++u) fetch(coming[u]);
#pragma unroll
        for (int u = 0; u < DEPTH; ++u) {
            if (item + u < items) consume(item + u, inputs[u]);
        }
    }
}

#define ENTRY(NAME, R, BATCH, GATED)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                              \
        NAME(const bf16* x, const bf16* w, const bf16* bias, bf16* y, int m, int n, int k) {                              \
        skinny<R, BATCH, GATED>(x, w, bias, y, m, n, k);                                                                  \
    }

ENTRY(skinny_linear_r1_b1, 1, 1, false)
ENTRY(skinny_linear_r1_b2, 1, 2, false)
ENTRY(skinny_linear_r2_b1, 2, 1, false)
ENTRY(skinny_linear_r2_b2, 2, 2, false)
ENTRY(skinny_swiglu_b1, 2, 1, true)
ENTRY(skinny_swiglu_b2, 2, 2, true)
