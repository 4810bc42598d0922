// SwiGLU of a linear layer for many rows, for Hopper: y = round(round(silu(gate)) up) with gate and up = round(x w^T), in one pass, so that
// gate and up never reach memory.
//
// A block makes 128 rows x 128 outputs: its tile of w is 128 gate rows and the 128 up rows of the same outputs, so that a thread's sums
// hold both. Two consumer warpgroups of 64 rows each (wgmma m64n256k16), one producer thread that keeps STAGES steps of 64 inputs in
// flight by tensor copies. Two blocks are a cluster: they share the tile of w, each fetches one half of it for both, which takes a third
// off the reads from the L2 (rows of a step: 256 instead of 384). Persistent; tiles of eight cluster rows
// (2,048 rows of x) go first over rows, then over outputs, so that what runs side by side shares both x and w in the L2.
//
// Grid: x = blocks resident at once, even; block: 384; dynamic shared memory: 230,528 bytes. Arguments: tensor maps of x [m, k] (box
// 128 x 64), w [2 n, k] (gate rows then up rows, 128 x 64), y [m, n] (64 x 64), all with 128-byte swizzle; n a multiple of 128, k of 8.
//
// Operations: 4 m n k; floor = operations / tensor-core rate. Bytes saved against a linear layer and a pass behind it: 8 m n.
#include "cluster.cuh"

constexpr int ROWS = 128;     // Of x, a block.
constexpr int OUTPUTS = 128;  // Of y, a block.
constexpr int DEPTH = 64;     // Inputs of a step: one swizzled row.
constexpr int STAGES = 4;
constexpr int GROUP_THREADS = 128;
constexpr int THREADS = 3 * GROUP_THREADS;
#ifndef GATED_GROUP_PAIRS
#define GATED_GROUP_PAIRS 8
#endif
#ifndef GATED_LAG
#define GATED_LAG 2
#endif
// Steps that the second consumer begins behind the first, so that one's epilogue runs beside the other's products.
constexpr int LAG = GATED_LAG;
constexpr int GROUP_PAIRS = GATED_GROUP_PAIRS;  // Cluster rows that are walked before the next outputs.

#ifdef WARPGROUP_CODE
constexpr int X_BYTES = ROWS * DEPTH * 2;
constexpr int HALF_BYTES = OUTPUTS * DEPTH * 2;
constexpr int STAGE_BYTES = X_BYTES + 2 * HALF_BYTES;
constexpr int Y_BYTES = 64 * OUTPUTS * 2;  // Of one consumer.
constexpr int INSIDE = 1;                  // Named barriers, one inside each consumer.

struct Tiles {
    int pairs, columns, total;
    __device__ Tiles(int m, int n) : pairs((m + 2 * ROWS - 1) / (2 * ROWS)), columns(n / OUTPUTS), total(pairs * columns) {}
    // First row of x of this cluster's first block, and first output.
    __device__ void place(int tile, int& row, int& output) const {
        const int group = tile / (GROUP_PAIRS * columns), first = group * GROUP_PAIRS, wide = min(GROUP_PAIRS, pairs - first);
        const int inside = tile - first * columns;
        row = (first + inside % wide) * 2 * ROWS;
        output = inside / wide * OUTPUTS;
    }
};

__device__ __forceinline__ float swiglu(float gate, float up) {
    gate = rounded(gate);
    return rounded(__fdividef(gate, 1.0f + __expf(-gate))) * rounded(up);
}

__device__ __forceinline__ void gated_linear(const TensorMap& x, const TensorMap& w, const TensorMap& y, int m, int n, int k) {
    extern __shared__ unsigned char raw[];
    const unsigned stages = (shared_address(raw) + 1023) & ~1023u, y_tiles = stages + STAGES * STAGE_BYTES;
    const unsigned full = y_tiles + 2 * Y_BYTES, empty = full + 8 * STAGES;
    const unsigned rank = cluster_rank();
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 4);  // Two consumers in each of two blocks.
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    release_next();
    wait_for_previous();
    const Tiles tiles(m, n);
    const int steps = (k + DEPTH - 1) / DEPTH, first = blockIdx.x / 2, stride = gridDim.x / 2;
    if (threadIdx.x < GROUP_THREADS) {
        give_registers<40>();
        if (threadIdx.x == 0) {
            int stage = 0, parity = 1;
            for (int tile = first; tile < tiles.total; tile += stride) {
                int row, output;
                tiles.place(tile, row, output);
                row += rank * ROWS;
                output += rank * n;  // The first block fetches gate rows, the second up rows.
                for (int step = 0; step < steps; ++step) {
                    const unsigned to = stages + stage * STAGE_BYTES, barrier = full + 8 * stage;
                    barrier_wait(empty + 8 * stage, parity);
                    barrier_expect(barrier, STAGE_BYTES);
                    fetch_box(to, &x, step * DEPTH, row, barrier);
                    fetch_box_for(to + X_BYTES + rank * HALF_BYTES, &w, step * DEPTH, output, barrier, 3);
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
            }
        }
    } else {
        take_registers<232>();
        const int self = threadIdx.x / GROUP_THREADS - 1, thread = threadIdx.x % GROUP_THREADS, lane = thread % 32, warp = thread / 32;
        const unsigned y_tile = y_tiles + self * Y_BYTES;
        // Threads 0 and 32 tell either block of the cluster that a stage was read.
        auto release = [&](int stage) {
            if (thread == 0 || thread == 32) barrier_arrive_at(empty + 8 * stage, thread / 32);
        };
        float sum[128];
        int stage = 0, parity = 0;
        if (self == 1 && first < tiles.total) barrier_wait(full + 8 * min(LAG, steps - 1), 0);
        for (int tile = first; tile < tiles.total; tile += stride) {
            int row, output;
            tiles.place(tile, row, output);
            row += rank * ROWS + self * 64;
            for (int step = 0; step < steps; ++step) {
                barrier_wait(full + 8 * stage, parity);
                const unsigned a = stages + stage * STAGE_BYTES + self * 64 * SWIZZLE_ROW, b = stages + stage * STAGE_BYTES + X_BYTES;
                wgmma_fence();
#pragma unroll
                for (int part = 0; part < DEPTH / 16; ++part)
                    wgmma_256(sum, operand(operand_low(a + part * 32, 16)), operand(operand_low(b + part * 32, 16)), step > 0 || part > 0);
                wgmma_commit();
                wgmma_wait<1>();
                if (step > 0) release(stage == 0 ? STAGES - 1 : stage - 1);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            wgmma_wait<0>();
            release(stage == 0 ? STAGES - 1 : stage - 1);

            if (thread == 0) send_wait();
            named_sync(INSIDE + self, GROUP_THREADS);
            // Matrices of a store: rows 0..7 and 8..15 of eight outputs, then of the next eight.
            const int line = warp * 16 + lane % 16;
#pragma unroll
            for (int pair = 0; pair < OUTPUTS / 16; ++pair) {
                unsigned packed[4];
#pragma unroll
                for (int part = 0; part < 4; ++part) {
                    const int at = pair * 8 + part * 2;
                    packed[part] = pack(swiglu(sum[at], sum[64 + at]), swiglu(sum[at + 1], sum[64 + at + 1]));
                }
                store_matrices(swizzled(y_tile, 64, line, 2 * pair + lane / 16), packed[0], packed[1], packed[2], packed[3]);
            }
            publish();
            named_sync(INSIDE + self, GROUP_THREADS);
            if (thread == 0) {
                send_box(&y, output, row, y_tile);
                send_box(&y, output + 64, row, y_tile + 64 * SWIZZLE_ROW);
                send_commit();
            }
        }
        if (thread == 0) send_wait();
    }
    cluster_sync();  // Neither block may leave while the other writes to its shared memory.
}
#define CLUSTER __cluster_dims__(2, 1, 1)
#else
#define CLUSTER
__device__ __forceinline__ void gated_linear(const TensorMap&, const TensorMap&, const TensorMap&, int, int, int) {
    __trap();  // Never launched on other cards.
}
#endif

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
    gated_linear_sm90(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap y, int m,
                      int n, int k) {
    gated_linear(x, w, y, m, n, k);
}
