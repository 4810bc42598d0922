// Linear layers of few rows for Hopper: y = round(x w^T (+ bias)) for 1..16 rows, one pass over the weights by the copy engine.
//
// A tile is 64 weight rows (gated: 64 of gate and 64 of up). A cluster of 1, 2, 4 or 8 blocks shares a tile, each taking a range of its
// inputs; their sums meet through distributed shared memory in the order of the ranges. A block is one warpgroup: thread 0 asks for
// tiles of 64 inputs (weights and the rows of x beside them, both swizzled, zeros outside) that land in a ring, and all multiply: wgmma
// with the weights as its M side, x as its N side of 8 or 16 columns. Weights do not depend on the kernel before, so the ring is filled
// before waiting for it (programmatic dependent launch); x follows after.
// A row's result depends on the cluster's size, but not on how many rows there are.
//
// Grid: x = ceil(outputs / 64) x cluster, clusters of neighbours; block: 128; dynamic shared memory: 112,768 bytes, so that two blocks
// share a multiprocessor. Arguments: tensor maps of x [m, k] (boxes of COLUMNS rows x 64 inputs) and w [n, k] (64 x 64), both bf16 in
// swizzled rows of 128 bytes; bias [n] or null, y [m, n]; k and pointers multiples of 8 and 16 bytes.
// Gated: w is gate rows then up rows, y [m, n / 2] = round(round(silu(gate)) up), gate and up rounded first, no bias.
// Entries: stream_linear_c{8,16}, stream_swiglu_c{8,16}: COLUMNS, which m must not exceed.
//
// Bytes: 2 n k (weights, once) + 2 m k (x, once from memory) + 2 m n; through the L2 x once more for each tile: 16 columns beside 64
// weight rows are 25 %, beside 128 rows 12.5 % (skinny_linear.cu: beside 16 rows 100 %, which is where its 16 rows stop).
// In flight: up to 2 x 108 KB a multiprocessor, of 23 KB that 700 ns at 4.3 TB/s need; the rest bridges the gap between two launches.
// Shared memory: a step's weights written once, read once by wgmma at 128 bytes a cycle, a tenth of the cycles that its bytes take.
// Floor = bytes / bandwidth. Measured on an H100 (copy 3.02 TB/s), 12 layers of Qwen3-4B in one graph: 0.94 of copy for 1 row, 0.93 for 8,
// 0.90 for 16 (skinny_linear.cu 0.94, 0.90, 0.78; cuBLAS 0.79 to 0.77), VL-2B 0.87, 0.85, 0.79 (0.87, 0.83, 0.71; 0.70); the head 1.03.
// Measured and not kept, all within 3 % in the chain and slower with a decode step's small kernels between: more weights asked into the
// L2 while waiting, releasing the next kernel late, three blocks a multiprocessor, boxes promoted to 256 bytes, plain tiles of 128 rows.
#include "cluster.cuh"

constexpr int THREADS = 128;
#ifdef WARPGROUP_CODE
constexpr int ROWS = 64;  // Weight rows of a product.
constexpr int SPAN = 64;  // Inputs of a step: one swizzled row.
constexpr int RING_BYTES = 110 << 10;
constexpr int BARRIER_BYTES = 128;
constexpr int BLOCK_BYTES = ROWS * SWIZZLE_ROW;

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

template <int COLUMNS, bool GATED>
__device__ void stream(const TensorMap& inputs, const TensorMap& weights, const bf16* bias, bf16* y, int m, int n, int k) {
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int BLOCKS = GATED ? 2 : 1;  // Of 64 weight rows in a tile: gate and up.
    constexpr int STAGE_BYTES = BLOCKS * BLOCK_BYTES + COLUMNS * SWIZZLE_ROW;
    constexpr int STAGES = RING_BYTES / STAGE_BYTES;
    constexpr int PITCH = COLUMNS + 2;  // Of a row of sums: neighbouring rows in different banks.
    static_assert(STAGES * 8 + 8 <= BARRIER_BYTES && BLOCKS * ROWS * PITCH * 4 <= RING_BYTES, "barriers beyond the ring, sums in it");
    const int rank = int(cluster_rank()), ranks = cluster_size(), shift = __ffs(ranks) - 1, tile = blockIdx.x >> shift;
    const int outputs = GATED ? n / 2 : n, own_shift = 6 - shift, own = ROWS >> shift;
    const int spans = (k + SPAN - 1) / SPAN, share = (spans + ranks - 1) >> shift;
    const int first = rank * share, steps = min(share, spans - first);  // Not positive: nothing is left for this rank.
    const unsigned ring = shared_address(shared), full = ring + RING_BYTES, summed = full + STAGES * 8;
    const unsigned long long once = policy_once();

    auto ask_weights = [&](int step, int stage) {
        barrier_expect(full + stage * 8, STAGE_BYTES);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
            fetch_box_once(ring + stage * STAGE_BYTES + b * BLOCK_BYTES, weights, (first + step) * SPAN, b * outputs + tile * ROWS,
                           full + stage * 8, once);
    };
    auto ask_inputs = [&](int step, int stage) {
        fetch_box(ring + stage * STAGE_BYTES + BLOCKS * BLOCK_BYTES, &inputs, (first + step) * SPAN, 0, full + stage * 8);
    };
    if (threadIdx.x == 0) {
        for (int s = 0; s <= STAGES; ++s) barrier_init(full + s * 8, 1);
        barrier_expect(summed, BLOCKS * ROWS * COLUMNS * 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (int s = 0; s < min(steps, STAGES); ++s) ask_weights(s, s);
        asm volatile("prefetch.tensormap [%0];" ::"l"(&inputs) : "memory");  // Its fetch must not wait for the kernel before.
    }
    __syncthreads();
    release_next();
    wait_for_previous();
    if (threadIdx.x == 0)
        for (int s = 0; s < min(steps, STAGES); ++s) ask_inputs(s, s);

    float sum[BLOCKS][COLUMNS / 2] = {};
    int stage = 0, parity = 0, before = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        barrier_wait(full + stage * 8, parity);
        const unsigned at = ring + stage * STAGE_BYTES;
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < SPAN / 16; ++s)
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b)
                wgmma_few(sum[b], operand(operand_low(at + b * BLOCK_BYTES + s * 32, 16)),
                          operand(operand_low(at + BLOCKS * BLOCK_BYTES + s * 32, 16)));
        wgmma_commit();
        wgmma_wait<1>();  // The step before has been read by this warp, and after the barrier by all.
        __syncthreads();
        const int next = step - 1 + STAGES;
        if (threadIdx.x == 0 && step > 0 && next < steps) {
            ask_weights(next, before);
            ask_inputs(next, before);
        }
        before = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    cluster_meet();  // Nothing is under way in any ring of the cluster: sums may lie there.

    // Block v finishes rows v * own and on of every 64; its ring takes [rank][BLOCKS][own][PITCH].
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int c = 0; c < COLUMNS / 2; c += 2) {
            const int row = warp * 16 + lane / 4 + c / 2 % 2 * 8, column = c / 4 * 8 + lane % 4 * 2, to = row >> own_shift;
            const int place = (((rank * BLOCKS + b) << own_shift) + (row & (own - 1))) * PITCH + column;
            if (ranks == 1) {
                *reinterpret_cast<float2*>(shared + place * 4) = make_float2(sum[b][c], sum[b][c + 1]);
            } else {
                send(address_in(ring + place * 4, to), sum[b][c], sum[b][c + 1], address_in(summed, to));
            }
        }
    if (ranks == 1) {
        __syncthreads();
    } else {
        barrier_wait(summed, 0);
    }
    const float* sums = reinterpret_cast<const float*>(shared);
    auto whole = [&](int block, int row, int column) {
        const float* at = sums + ((block << own_shift) + row) * PITCH + column;
        float total = 0.0f;
#pragma unroll 2
        for (int v = 0; v < ranks; ++v) total += at[v * (BLOCKS << own_shift) * PITCH];
        return total;
    };
    for (int i = threadIdx.x; i < own * m; i += THREADS) {
        const int row = i & (own - 1), column = i >> own_shift, output = tile * ROWS + rank * own + row;
        if (output >= outputs) continue;
        float value = whole(0, row, column);
        if (GATED) {
            const float gate = rounded(value), up = rounded(whole(1, row, column));
            value = rounded(gate / (1.0f + expf(-gate))) * up;
        } else if (bias != nullptr) {
            value += widen(bias[output]);
        }
        y[size_t(column) * outputs + output] = narrow(value);
    }
}
#define BODY(COLUMNS, GATED) stream<COLUMNS, GATED>(inputs, weights, bias, y, m, n, k)
#else
#define BODY(COLUMNS, GATED)  // Only Hopper's own code has it: the caller takes skinny_linear.cu elsewhere.
#endif

#define ENTRY(NAME, COLUMNS, GATED)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                     \
        NAME(const __grid_constant__ TensorMap inputs, const __grid_constant__ TensorMap weights, const bf16* bias, bf16* y,     \
             int m, int n, int k) {                                                                                              \
        BODY(COLUMNS, GATED);                                                                                                    \
    }

ENTRY(stream_linear_c8, 8, false)
ENTRY(stream_linear_c16, 16, false)
ENTRY(stream_swiglu_c8, 8, true)
ENTRY(stream_swiglu_c16, 16, true)
