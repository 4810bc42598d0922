// Causal attention of chunks of query rows over pages, for Hopper: wgmma, keys and values gathered from pages by a producer warpgroup
// with 16-byte asynchronous copies into swizzled tiles, two consumer warpgroups of 64 packed rows that take turns at the tensor cores
// (one's softmax beside the other's products), and each overlapping its own softmax with its previous PV.
//
// Packing, arguments and the list of tiles are those of paged_prefill.cu, but for tiles of 128 packed rows.
// Grid: x = kv heads, y = tiles; block: 384; dynamic shared memory: 640 D 2 + 2,048 bytes (165,888 at D 128).
//
// Operations: 4 D per visible (query head, key) pair; floor = operations / tensor-core rate (about 990 TFLOP/s peak, 600 to 700 sustained).
#include "warpgroup.cuh"

constexpr int ROWS = 128;  // Packed query rows of a block.
constexpr int KEYS = 128;  // Keys of a step.
constexpr int STAGES = 2;
constexpr int GROUP_THREADS = 128;
constexpr int THREADS = 3 * GROUP_THREADS;

struct Problem {
    const bf16* q;
    const bf16* keys;
    const bf16* values;
    const int* table;
    const int* context;
    const int* query_start;
    const int* tiles;
    bf16* out;
    int stride, kv_heads, group, page_shift;
    float scale;
};

#ifdef WARPGROUP_CODE
constexpr int CONSUMER_WARPS = 8;
// Named barriers: turn of either consumer, and one inside each.
constexpr int TURN = 1;
constexpr int INSIDE = 3;

// What a block works on.
struct Tile {
    int sequence, first, start, rows, length, head, group, kv_heads;
    __device__ int limit(int r) const {  // Keys that packed row r sees; 0 past the end.
        return first + r < rows * group ? max(0, length - rows + (first + r) / group + 1) : 0;
    }
    __device__ size_t place(int r) const {  // Head (counted over all rows) of packed row r.
        const int row = (first + r) / group;
        return (size_t(start + row) * kv_heads + head) * group + (first + r - row * group);
    }
};

struct Ring {  // Barriers of the stages of keys or values.
    unsigned full, empty;
    __device__ unsigned full_at(int n) const { return full + (n % STAGES) * 8; }
    __device__ unsigned empty_at(int n) const { return empty + (n % STAGES) * 8; }
    static __device__ int parity(int n) { return (n / STAGES) & 1; }
};

template <int D>
constexpr int tile_bytes() {
    return KEYS * D * 2;
}

template <int D>
__device__ void produce(const Problem& p, const Tile& tile, int most, int steps, unsigned key_tiles, unsigned value_tiles, Ring key_ring,
                        Ring value_ring) {
    constexpr int UNITS = D / 8, KEYS_AT_ONCE = 32 / UNITS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int* pages = p.table + size_t(tile.sequence) * p.stride;
    // Pool row of key `lane` of this warp's 32 keys of a step, -1 past the end.
    auto look_up = [&](int n) {
        const int key = (steps - 1 - n) * KEYS + warp * 32 + lane;
        if (n >= steps || key >= most) return -1;
        return (pages[key >> p.page_shift] << p.page_shift) + (key & ((1 << p.page_shift) - 1));
    };
    unsigned owed = 0;  // Barrier of the last copies, not yet signalled.
    auto settle = [&]() {
        if (owed != 0) {
            publish();
            barrier_arrive(owed);
        }
    };
    auto fill = [&](const bf16* pool, unsigned tiles, const Ring& ring, int n, int row) {
        if (!barrier_passed(ring.empty_at(n), Ring::parity(n) ^ 1)) {
            copy_wait<0>();  // Consumers may need the last copies to go on.
            settle();
            owed = 0;
            barrier_wait(ring.empty_at(n), Ring::parity(n) ^ 1);
        }
        const unsigned to = tiles + (n % STAGES) * tile_bytes<D>();
#pragma unroll 4
        for (int j = 0; j < 32 / KEYS_AT_ONCE; ++j) {
            const int key = j * KEYS_AT_ONCE + lane / UNITS, unit = lane % UNITS;
            const int from = __shfl_sync(0xffffffffu, row, key);
            copy_16(swizzled(to, KEYS, warp * 32 + key, unit), pool + (size_t(max(from, 0)) * p.kv_heads + tile.head) * D + unit * 8, from >= 0);
        }
        copy_commit();
        copy_wait<1>();
        settle();
        owed = ring.full_at(n);
    };
    int row = look_up(0), next = look_up(1);
    fill(p.keys, key_tiles, key_ring, 0, row);
#pragma unroll 1
    for (int n = 0; n < steps; ++n) {
        const int later = look_up(n + 2);
        if (n + 1 < steps) fill(p.keys, key_tiles, key_ring, n + 1, next);
        fill(p.values, value_tiles, value_ring, n, row);
        row = next;
        next = later;
    }
    copy_wait<0>();
    settle();
}

// Online softmax of a warpgroup's scores; rows lane / 4 and + 8 of each warp.
struct Softmax {
    float highest[2] = {-INFINITY, -INFINITY};
    float total[2] = {};
    float shrink[2];
    __device__ __forceinline__ void hide(float (&score)[64], int first_key, const int (&limits)[2]) const {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            const int key = first_key + (i / 4) * 8 + (threadIdx.x % 4) * 2 + i % 2;
            if (key >= limits[(i / 2) % 2]) score[i] = -INFINITY;
        }
    }
    __device__ __forceinline__ void step(float (&score)[64], float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float now = highest[half];
#pragma unroll
            for (int i = 0; i < 16; ++i) now = fmaxf(now, fmaxf(score[4 * i + 2 * half], score[4 * i + 2 * half + 1]));
            now = quad_max(now);
            const float base = now == -INFINITY ? 0.0f : now * scale;
            shrink[half] = power_of_two(highest[half] * scale - base);
            highest[half] = now;
            float add = 0.0f;
#pragma unroll
            for (int i = 0; i < 16; ++i)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float& s = score[4 * i + 2 * half + c];
                    s = power_of_two(fmaf(s, scale, -base));
                    add += s;
                }
            total[half] = total[half] * shrink[half] + add;
        }
    }
};

__device__ __forceinline__ void pack_all(const float (&score)[64], unsigned (&probability)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) probability[i] = pack(score[2 * i], score[2 * i + 1]);
}

template <int D>
__device__ void consume(const Problem& p, const Tile& tile, int steps, int least, unsigned query_tile, unsigned key_tiles, unsigned value_tiles,
                        Ring key_ring, Ring value_ring) {
    constexpr int UNITS = D / 8;
    const int self = threadIdx.x / GROUP_THREADS - 1, lane = threadIdx.x % 32, warp = threadIdx.x % GROUP_THREADS / 32;
    for (int i = threadIdx.x % GROUP_THREADS; i < 64 * UNITS; i += GROUP_THREADS) {
        const int r = self * 64 + i / UNITS;
        const bool valid = tile.first + r < tile.rows * tile.group;
        copy_16(swizzled(query_tile, ROWS, r, i % UNITS), p.q + (valid ? tile.place(r) : 0) * D + i % UNITS * 8, valid);
    }
    copy_commit();
    copy_wait<0>();
    publish();
    named_sync(INSIDE + self, GROUP_THREADS);
    if (self == 1) named_arrive(TURN, 2 * GROUP_THREADS);

    const int row = self * 64 + warp * 16 + lane / 4;
    const int limits[2] = {tile.limit(row), tile.limit(row + 8)};
    const float scale = p.scale * LOG2_E;
    float score[64], sum[D / 2];
    unsigned probability[32];
    Softmax softmax;
    auto scores = [&](int n) {
        const unsigned keys = key_tiles + (n % STAGES) * tile_bytes<D>();
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            const unsigned inside = (k % 4) * 32, block = k / 4;
            wgmma_128(score, operand(query_tile + block * ROWS * SWIZZLE_ROW + self * 64 * SWIZZLE_ROW + inside, 16),
                      operand(keys + block * KEYS * SWIZZLE_ROW + inside, 16), k > 0);
        }
    };
    auto weigh = [&](int n, bool add) {
        const unsigned values = value_tiles + (n % STAGES) * tile_bytes<D>();
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k)
            wgmma_rows(sum, &probability[4 * k], operand(values + k * 16 * SWIZZLE_ROW, KEYS * SWIZZLE_ROW), add || k > 0);
    };
    auto release = [&](unsigned barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };
    if (steps > 0) {
        barrier_wait(key_ring.full_at(0), 0);
        wgmma_fence();
        scores(0);
        wgmma_commit();
        wgmma_wait<0>();
        release(key_ring.empty_at(0));
        if (steps * KEYS > least) softmax.hide(score, (steps - 1) * KEYS, limits);
        softmax.step(score, scale);
        pack_all(score, probability);
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sum[i] = 0.0f;
#pragma unroll 1
    for (int n = 1; n < steps; ++n) {
        barrier_wait(key_ring.full_at(n), Ring::parity(n));
        named_sync(TURN + self, 2 * GROUP_THREADS);
        wgmma_fence();
        scores(n);
        wgmma_commit();
        barrier_wait(value_ring.full_at(n - 1), Ring::parity(n - 1));
        weigh(n - 1, true);
        wgmma_commit();
        named_arrive(TURN + 1 - self, 2 * GROUP_THREADS);
        wgmma_wait<1>();
        release(key_ring.empty_at(n));
        if ((steps - n) * KEYS > least) softmax.hide(score, (steps - 1 - n) * KEYS, limits);
        softmax.step(score, scale);
        wgmma_wait<0>();
        release(value_ring.empty_at(n - 1));
#pragma unroll
        for (int i = 0; i < D / 2; ++i) sum[i] *= softmax.shrink[(i / 2) % 2];
        pack_all(score, probability);
    }
    if (steps > 0) {
        barrier_wait(value_ring.full_at(steps - 1), Ring::parity(steps - 1));
        wgmma_fence();
        weigh(steps - 1, true);
        wgmma_commit();
        wgmma_wait<0>();
    }
    // Through the place of the queries, for whole 16-byte stores.
    named_sync(INSIDE + self, GROUP_THREADS);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float whole = quad_sum(softmax.total[half]), inverse = whole > 0.0f ? 1.0f / whole : 0.0f;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const unsigned to = swizzled(query_tile, ROWS, row + 8 * half, n) + (lane % 4) * 4;
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(pack(sum[4 * n + 2 * half] * inverse, sum[4 * n + 2 * half + 1] * inverse))
                         : "memory");
        }
    }
    __syncwarp();
    for (int i = lane; i < 16 * UNITS; i += 32) {
        const int r = self * 64 + warp * 16 + i / UNITS;
        if (tile.first + r >= tile.rows * tile.group) break;
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(swizzled(query_tile, ROWS, r, i % UNITS))
                     : "memory");
        *reinterpret_cast<uint4*>(p.out + tile.place(r) * D + i % UNITS * 8) = v;
    }
}

template <int D>
__device__ void prefill(const Problem& p) {
    extern __shared__ unsigned char raw[];
    const unsigned base = (shared_address(raw) + 1023) & ~1023u;
    const unsigned query_tile = base, key_tiles = query_tile + ROWS * D * 2, value_tiles = key_tiles + STAGES * tile_bytes<D>();
    const unsigned barriers = value_tiles + STAGES * tile_bytes<D>();
    const Ring key_ring{barriers, barriers + 8 * STAGES}, value_ring{barriers + 16 * STAGES, barriers + 24 * STAGES};
    if (threadIdx.x == 0) {
        for (int n = 0; n < STAGES; ++n) {
            barrier_init(key_ring.full_at(n), GROUP_THREADS);
            barrier_init(key_ring.empty_at(n), CONSUMER_WARPS);
            barrier_init(value_ring.full_at(n), GROUP_THREADS);
            barrier_init(value_ring.empty_at(n), CONSUMER_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    wait_for_previous();
    release_next();
    Tile tile;
    tile.sequence = p.tiles[2 * blockIdx.y];
    if (tile.sequence < 0) return;
    tile.first = p.tiles[2 * blockIdx.y + 1];
    tile.start = p.query_start[tile.sequence];
    tile.rows = p.query_start[tile.sequence + 1] - tile.start;
    tile.length = p.context[tile.sequence];
    tile.head = blockIdx.x;
    tile.group = p.group;
    tile.kv_heads = p.kv_heads;
    const int last = min(tile.rows * tile.group - tile.first, ROWS) - 1;
    const int most = last >= 0 ? tile.limit(last) : 0, least = tile.limit(0), steps = (most + KEYS - 1) / KEYS;
    if (threadIdx.x < GROUP_THREADS) {
        give_registers<40>();
        if (steps > 0) produce<D>(p, tile, most, steps, key_tiles, value_tiles, key_ring, value_ring);
    } else {
        take_registers<232>();
        consume<D>(p, tile, steps, least, query_tile, key_tiles, value_tiles, key_ring, value_ring);
    }
}
#else
template <int D>
__device__ void prefill(const Problem&) {
    __trap();  // Never launched on other cards: paged_prefill.cu is theirs.
}
#endif

#define ENTRY(NAME, D)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                      \
        NAME(const bf16* q, const bf16* keys, const bf16* values, const int* table, const int* context, const int* query_start,   \
             const int* tiles, bf16* out, int stride, int kv_heads, int group, int page_shift, float scale) {                     \
        prefill<D>(Problem{q, keys, values, table, context, query_start, tiles, out, stride, kv_heads, group, page_shift, scale}); \
    }

ENTRY(paged_prefill_sm90_d64, 64)
ENTRY(paged_prefill_sm90_d128, 128)
