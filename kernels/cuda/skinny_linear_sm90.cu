// Linear layers of few rows for Hopper: y = round(x w^T (+ bias)) for 1..16 rows, one pass over the weights by the copy engine.
//
// A tile is 64 weight rows (gated: 64 of gate and 64 of up). A cluster of 1, 2, 4 or 8 blocks shares a tile, each taking a range of its
// inputs; their sums meet through distributed shared memory in the order of the ranges. A block is one warpgroup: it asks for tiles
// of 64 inputs (weights and the rows of x beside them, both swizzled, zeros outside) that land in a ring, and all multiply: wgmma
// with the weights as its M side, x as its N side of 8 or 16 columns. Weights do not depend on the kernel before, so the ring is filled
// before waiting for it (programmatic dependent launch); x follows after.
// A row's result depends on the cluster's size, but not on how many rows there are.
//
// Grid: x = ceil(outputs / 64) x cluster, clusters of neighbours; block: 128; dynamic shared memory: 112,768 bytes, so that two blocks
// share a multiprocessor. Arguments: tensor maps of x [m, k] (boxes of COLUMNS rows x 64 inputs) and w [n, k] (64 x 64), both bf16 in
// swizzled rows of 128 bytes; bias [n] or null, y [m, n]; k and pointers multiples of 8 and 16 bytes; bytes at `ahead` to ask into the
// L2 (both multiples of 16; 0 bytes: none), see ahead.rs.
// Gated: w is gate rows then up rows, y [m, n / 2] = round(round(silu(gate)) up), gate and up rounded first, no bias.
// Entries: stream_linear_c{8,16}, stream_swiglu_c{8,16}: COLUMNS, which m must not exceed.
//
// Bytes: 2 n k (weights, once) + 2 m k (x, once from memory) + 2 m n; through the L2 x once more for each tile: 16 columns beside 64
// weight rows are 25 %, beside 128 rows 12.5 % (skinny_linear.cu: beside 16 rows 100 %, which is where its 16 rows stop).
// In flight: up to 2 x 108 KB a multiprocessor, of 23 KB that 700 ns at 4.3 TB/s need; the rest bridges the gap between two launches.
// Shared memory: a step's weights written once, read once by wgmma at 128 bytes a cycle, a tenth of the cycles that its bytes take.
// Floor = bytes / bandwidth. What a linear takes beyond it lies between the end of the kernel before and its own end, where every
// instruction counts (a warp a scheduler, some five cycles each): addresses are worked out before waiting, sums meet by stores that
// their readers wait for and by no cluster barrier, the last loop waits for nothing but its tiles.
// Measured on H200s (tests/bench/results/kernels-h200-linear.json), 12 layers of VL-2B in one graph: 0.88 of copy for 1 row, 0.87 for 8,
// 0.82 for 16 (with a cluster barrier, addresses worked out where they are used and nothing asked ahead: 0.77, 0.76, 0.71).
// Measured and not kept: more than 3 to 4 MB asked ahead or the next weights instead of those behind them, asking by prefetch
// instructions, x by cp.async, tiles of 128 rows, three blocks a multiprocessor, boxes promoted to 256 bytes.
#include "cluster.cuh"

constexpr int THREADS = 128;
#ifdef WARPGROUP_CODE
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 64;  // Weight rows of a product.
constexpr int SPAN = 64;  // Inputs of a step: one swizzled row.
constexpr int RING_BYTES = 110 << 10;
constexpr int BARRIER_BYTES = 128;
constexpr int BLOCK_BYTES = ROWS * SWIZZLE_ROW;
constexpr int LINE = 128;

// c [64 x 8] or [64 x 16] += a b^T: both from shared memory, 16 columns of each.
__device__ __forceinline__ void wgmma_few(float (&c)[4], unsigned long long a, unsigned long long b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, add, 1, 1, 0, 0;\n}\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma_few(float (&c)[8], unsigned long long a, unsigned long long b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, add, 1, 1, 0, 0;\n}\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
        : "l"(a), "l"(b));
}

// As fetch_box, of what nobody reads again: it must not push what is reused out of the L2.
__device__ __forceinline__ void fetch_box_once(unsigned to, const TensorMap& map, int column, int row, unsigned barrier, unsigned long long policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
        : "memory");
}
__device__ __forceinline__ unsigned long long policy_once() {
    unsigned long long policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void ask_into_l2(const char* from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ int cluster_size() {
    int size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
// Every thread of the cluster has come here. Orders the set-up of barriers, but no other writes.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// `address` of this block's shared memory, in block `rank` of the cluster.
__device__ __forceinline__ unsigned address_in(unsigned address, int rank) {
    unsigned there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
// Two floats to another block's shared memory; its `barrier` counts them.
__device__ __forceinline__ void send(unsigned to, float a, float b, unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(a), "f"(b), "r"(barrier)
                 : "memory");
}

// What a thread writes: columns `column` and on of the weight row `row` of those that its block finishes.
struct Share {
    int row, column;
    bf16* y;  // The first of them; null if there is none.
    float bias;
};

// Adds the sums [RANKS][BLOCKS][ROWS / RANKS][PITCH] up in the order of the ranks, and writes them. Few instructions, all addresses known:
// the next kernel waits for this.
template <int COLUMNS, bool GATED, int PITCH, int RANKS>
__device__ __forceinline__ void finish(const float* sums, const Share& share, int m, int outputs) {
    constexpr int BLOCKS = GATED ? 2 : 1, OWN = ROWS / RANKS, EACH = COLUMNS * OWN < THREADS ? 1 : COLUMNS * OWN / THREADS;
    if (share.y == nullptr) return;
    const float* at = sums + share.row * PITCH + share.column;
    float total[BLOCKS][EACH] = {};
#pragma unroll
    for (int v = 0; v < RANKS; ++v)
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int e = 0; e < EACH; ++e) total[b][e] += at[(v * BLOCKS + b) * OWN * PITCH + e];
    bf16* y = share.y;
#pragma unroll
    for (int e = 0; e < EACH; ++e, y += outputs) {
        if (share.column + e >= m) break;
        float value = total[0][e] + share.bias;
        if (GATED) {
            const float gate = rounded(total[0][e]);
            value = rounded(gate / (1.0f + expf(-gate))) * rounded(total[BLOCKS - 1][e]);
        }
        *y = narrow(value);
    }
}

template <int COLUMNS, bool GATED>
__device__ void stream(const TensorMap& inputs, const TensorMap& weights, const bf16* bias, bf16* y, int m, int n, int k, const char* ahead,
                       int ahead_bytes) {
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int BLOCKS = GATED ? 2 : 1;  // Of 64 weight rows in a tile: gate and up.
    constexpr int STAGE_BYTES = BLOCKS * BLOCK_BYTES + COLUMNS * SWIZZLE_ROW;
    constexpr int STAGES = RING_BYTES / STAGE_BYTES;
    constexpr int PITCH = COLUMNS + 2;  // Of a row of sums: neighbouring rows in different banks.
    static_assert(STAGES * 8 + 16 <= BARRIER_BYTES && BLOCKS * ROWS * PITCH * 4 <= STAGE_BYTES, "barriers beyond the ring, sums in stage 0");
    const int rank = int(cluster_rank()), ranks = cluster_size(), shift = __ffs(ranks) - 1, tile = blockIdx.x >> shift;
    const int outputs = GATED ? n / 2 : n, own_shift = 6 - shift, own = ROWS >> shift;
    const int spans = (k + SPAN - 1) / SPAN, share = (spans + ranks - 1) >> shift;
    const int first = rank * share, steps = min(share, spans - first);  // Not positive: nothing is left for this rank.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned ring = shared_address(shared), full = ring + RING_BYTES, summed = full + STAGES * 8, free = summed + 8;
    const unsigned long long once = policy_once();

    auto ask_weights = [&](int b, int step, int stage) {
        if (b == 0) barrier_expect(full + stage * 8, STAGE_BYTES);
        fetch_box_once(ring + stage * STAGE_BYTES + b * BLOCK_BYTES, weights, (first + step) * SPAN, b * outputs + tile * ROWS, full + stage * 8,
                       once);
    };
    auto ask_inputs = [&](int step, int stage) {
        fetch_box(ring + stage * STAGE_BYTES + BLOCKS * BLOCK_BYTES, &inputs, (first + step) * SPAN, 0, full + stage * 8);
    };
    // A stage that has been read is asked for again: a thread for each box, since asking takes a while.
    auto refill = [&](int step, int stage) {
        if (threadIdx.x == 0) ask_weights(0, step, stage);
        if (GATED && threadIdx.x == 32) ask_weights(1, step, stage);
        if (threadIdx.x == 96) ask_inputs(step, stage);
    };
    if (threadIdx.x == 0) {
        for (int s = 0; s <= STAGES; ++s) barrier_init(full + s * 8, 1);
        barrier_init(free, ranks * WARPS);
        barrier_expect(summed, BLOCKS * (ROWS - own) * COLUMNS * 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (int s = 0; s < min(steps, STAGES); ++s)
            for (int b = 0; b < BLOCKS; ++b) ask_weights(b, s, s);
        asm volatile("prefetch.tensormap [%0];" ::"l"(&inputs) : "memory");  // Its fetch must not wait for the kernel before.
    }
    __syncthreads();
    if (ranks > 1) cluster_meet();
    release_next();

    // Where sums go: block v finishes rows v * own and on of every 64; its stage 0 takes [rank][BLOCKS][own][PITCH].
    unsigned local[2], there[2], counted[2];
    bool here[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + lane / 4 + half * 8, to = row >> own_shift;
        local[half] = ring + (((rank * BLOCKS) << own_shift) + (row & (own - 1))) * PITCH * 4 + lane % 4 * 8;
        there[half] = address_in(local[half], to), counted[half] = address_in(summed, to), here[half] = to == rank;
    }
    Share mine{int(threadIdx.x) & (own - 1), int(threadIdx.x >> own_shift) * max(1, COLUMNS * own / THREADS), nullptr, 0.0f};
    const int output = tile * ROWS + rank * own + mine.row;
    if (output < outputs && mine.column < m) {
        mine.y = y + size_t(mine.column) * outputs + output;
        if (bias != nullptr) mine.bias = widen(bias[output]);
    }

    const int all_lines = LINE * int(gridDim.x), lines = (ahead_bytes + all_lines - 1) / all_lines * LINE;
    const int ahead_from = int(blockIdx.x) * lines, ahead_own = min(lines, ahead_bytes - ahead_from);  // This block's share.

    wait_for_previous();
    if (threadIdx.x == 0)
        for (int s = 0; s < min(steps, STAGES); ++s) ask_inputs(s, s);

    // Two sums, so that a product need not wait for the one before it.
    float sum[BLOCKS][COLUMNS / 2] = {}, odd[BLOCKS][COLUMNS / 2] = {};
    const unsigned ring_operand = operand_low(ring, 16);
    int stage = 0, parity = 0, before = 0;
    auto multiply = [&] {
        barrier_wait(full + stage * 8, parity);
        const unsigned at = ring_operand + stage * (STAGE_BYTES / 16);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < SPAN / 16; ++s)
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b)
                wgmma_few(s % 2 == 0 ? sum[b] : odd[b], operand(at + (b * BLOCK_BYTES + s * 32) / 16),
                          operand(at + (BLOCKS * BLOCK_BYTES + s * 32) / 16));
        wgmma_commit();
        before = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
    };
    int step = 0;
#pragma unroll 1
    for (; step < steps - STAGES; ++step) {
        const int last = before;
        multiply();
        if (step == 0) continue;
        wgmma_wait<1>();  // The step before has been read by this warp, and after the barrier by all.
        __syncthreads();
        refill(step - 1 + STAGES, last);
    }
    if (step > 0) {
        wgmma_wait<0>();
        __syncthreads();
        refill(steps - 1, before);
    }
    // All has been asked for: nothing to wait for but its coming. Sums will lie in stage 0; blocks tell each other early that it is free.
    if (steps <= 0 && lane < ranks) barrier_arrive_at(free, lane);
#pragma unroll 1
    for (; step < steps; ++step) {
        multiply();
        if (before == 0) {
            wgmma_wait<0>();
            if (lane < ranks) barrier_arrive_at(free, lane);
        }
    }
    if (threadIdx.x == 0 && ahead_own > 0) ask_into_l2(ahead + ahead_from, ahead_own);
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) hold(sum[b]), hold(odd[b]);
    barrier_wait(free, 0);

#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int c = 0; c < COLUMNS / 2; c += 2) {
            const int half = c / 2 % 2;
            const unsigned place = (unsigned(b * PITCH * 4) << own_shift) + c / 4 * 32;
            const float left = sum[b][c] + odd[b][c], right = sum[b][c + 1] + odd[b][c + 1];
            if (here[half]) {
                *reinterpret_cast<float2*>(shared + (local[half] - ring) + place) = make_float2(left, right);
            } else {
                send(there[half] + place, left, right, counted[half]);
            }
        }
    __syncthreads();
    if (ranks > 1) barrier_wait(summed, 0);
    const float* sums = reinterpret_cast<const float*>(shared);
    switch (ranks) {
        case 1: return finish<COLUMNS, GATED, PITCH, 1>(sums, mine, m, outputs);
        case 2: return finish<COLUMNS, GATED, PITCH, 2>(sums, mine, m, outputs);
        case 4: return finish<COLUMNS, GATED, PITCH, 4>(sums, mine, m, outputs);
        default: return finish<COLUMNS, GATED, PITCH, 8>(sums, mine, m, outputs);
    }
}
#define BODY(COLUMNS, GATED) stream<COLUMNS, GATED>(inputs, weights, bias, y, m, n, k, ahead, ahead_bytes)
#else
#define BODY(COLUMNS, GATED)  // Only Hopper's own code has it: the caller takes skinny_linear.cu elsewhere.
#endif

#define ENTRY(NAME, COLUMNS, GATED)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                     \
        NAME(const __grid_constant__ TensorMap inputs, const __grid_constant__ TensorMap weights, const bf16* bias, bf16* y,     \
             int m, int n, int k, const char* ahead, int ahead_bytes) {                                                          \
        BODY(COLUMNS, GATED);                                                                                                    \
    }

ENTRY(stream_linear_c8, 8, false)
ENTRY(stream_linear_c16, 16, false)
ENTRY(stream_swiglu_c8, 8, true)
ENTRY(stream_swiglu_c16, 16, true)
