// Causal attention of chunks of query rows over pages, for Hopper: wgmma, keys and values gathered from pages by a producer warpgroup
// with 16-byte asynchronous copies into swizzled tiles, two consumer warpgroups of 64 packed rows that take turns at the tensor cores
// (one's softmax beside the other's products), and each overlapping its own softmax with its previous PV.
//
// Packing, arguments and the list of tiles are those of paged_prefill.cu, but for tiles of 128 packed rows.
// paged_prefill_sm90_d{64,128}: grid x = kv heads, y = tiles; dynamic shared memory 640 D 2 + 2,048 bytes (165,888 at D 128).
// paged_prefill_sm90_all_d{64,128}: one more argument, the number of tiles; grid x = min(multiprocessors, tiles kv_heads), blocks work
// through the list in turns, back and forth, loading the next tile's queries and keys during the last one's end; dynamic shared memory 768 D
// 2 + 2,048 bytes (198,656 at D 128). Block: 384.
// segment_attention_sm90_d64: segment_attention_d64's arguments (tiles of 128 rows) and the number of tiles; grid x = min(multiprocessors, tiles
// heads); dynamic shared memory 100,352 bytes.
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
    int items;   // Tiles times kv heads, heads fastest.
    bool turns;  // Whether blocks take several.
    // Elements between rows. Without a table, key t of a sequence is row query_start + t, and every query sees them all.
    int query_stride, key_stride, value_stride, out_stride;
};

#ifdef WARPGROUP_CODE
constexpr int CONSUMER_WARPS = 8;
// Named barriers: turn of either consumer, and one inside each.
constexpr int TURN = 1;
constexpr int INSIDE = 3;

// What a block works on.
struct Tile {
    int sequence, first, start, rows, length, head, group;
    bool causal;
    __device__ void read(const Problem& p, int item) {
        group = p.group;
        causal = p.table != nullptr;
        head = item % p.kv_heads;
        sequence = p.tiles[2 * (item / p.kv_heads)];
        first = p.tiles[2 * (item / p.kv_heads) + 1];
        const int inside = max(sequence, 0);
        start = p.query_start[inside];
        rows = sequence < 0 ? 0 : p.query_start[inside + 1] - start;
        length = !causal ? rows : sequence < 0 ? 0 : p.context[inside];
    }
    __device__ int count() const { return min(rows * group - first, ROWS); }
    __device__ int most() const { return count() > 0 ? limit(count() - 1) : 0; }
    __device__ int steps() const { return (most() + KEYS - 1) / KEYS; }
    __device__ int limit(int r) const {  // Keys that packed row r sees; 0 past the end.
        if (first + r >= rows * group) return 0;
        return causal ? max(0, length - rows + (first + r) / group + 1) : length;
    }
    __device__ size_t place(int r, int stride, int dim) const {  // Offset of packed row r.
        const int row = (first + r) / group;
        return size_t(start + row) * stride + (head * group + first + r - row * group) * dim;
    }
};

// The block's item of a turn: forth, then back, since the list is sorted by work; `items` at the end.
__device__ __forceinline__ int item_of(const Problem& p, int turn) {
    const int blocks = gridDim.x * gridDim.y, block = blockIdx.y * gridDim.x + blockIdx.x;
    if (!p.turns) return turn == 0 ? block : p.items;
    return min(p.items, turn * blocks + (turn % 2 == 0 ? block : blocks - 1 - block));
}

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
__device__ void produce(const Problem& p, unsigned key_tiles, unsigned value_tiles, Ring key_ring, Ring value_ring) {
    constexpr int UNITS = D / 8, KEYS_AT_ONCE = 32 / UNITS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int done = 0;  // Steps of earlier tiles.
#pragma unroll 1
    for (int turn = 0;; ++turn) {
        const int item = item_of(p, turn);
        if (item >= p.items) break;
        Tile tile;
        tile.read(p, item);
        const int most = tile.most(), steps = tile.steps();
        const int* pages = p.table + size_t(max(tile.sequence, 0)) * p.stride;
        // Pool row of key `lane` of this warp's 32 keys of a step, -1 past the end.
        auto look_up = [&](int n) {
            const int key = (steps - 1 - n) * KEYS + warp * 32 + lane;
            if (n >= steps || key >= most) return -1;
            if (p.table == nullptr) return tile.start + key;
            return (pages[key >> p.page_shift] << p.page_shift) + (key & ((1 << p.page_shift) - 1));
        };
        auto fill = [&](const bf16* pool, int stride, unsigned tiles, const Ring& ring, int n, int row) {
            barrier_wait(ring.empty_at(n), Ring::parity(n) ^ 1);
            const unsigned to = tiles + (n % STAGES) * tile_bytes<D>();
#pragma unroll 4
            for (int j = 0; j < 32 / KEYS_AT_ONCE; ++j) {
                const int key = j * KEYS_AT_ONCE + lane / UNITS, unit = lane % UNITS;
                const int from = __shfl_sync(0xffffffffu, row, key);
                const size_t offset = size_t(max(from, 0)) * stride + tile.head * D + unit * 8;
                copy_16(swizzled(to, KEYS, warp * 32 + key, unit), pool + offset, from >= 0);
            }
            barrier_arrive_after_copies(ring.full_at(n));
        };
        int row = look_up(0), next = look_up(1);
        if (steps > 0) fill(p.keys, p.key_stride, key_tiles, key_ring, done, row);
#pragma unroll 1
        for (int n = 0; n < steps; ++n) {
            const int later = look_up(n + 2);
            if (n + 1 < steps) fill(p.keys, p.key_stride, key_tiles, key_ring, done + n + 1, next);
            fill(p.values, p.value_stride, value_tiles, value_ring, done + n, row);
            row = next;
            next = later;
        }
        done += steps;
    }
    copy_wait<0>();
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
__device__ __forceinline__ void ask_for_queries(const Problem& p, const Tile& tile, int self, unsigned query_tile) {
    constexpr int UNITS = D / 8;
    for (int i = threadIdx.x % GROUP_THREADS; i < 64 * UNITS; i += GROUP_THREADS) {
        const int r = self * 64 + i / UNITS;
        const bool valid = tile.first + r < tile.rows * tile.group;
        copy_16(swizzled(query_tile, ROWS, r, i % UNITS), p.q + (valid ? tile.place(r, p.query_stride, D) : 0) + i % UNITS * 8, valid);
    }
    copy_commit();
}

template <int D>
__device__ void consume(const Problem& p, unsigned query_tiles, unsigned key_tiles, unsigned value_tiles, Ring key_ring, Ring value_ring) {
    constexpr int UNITS = D / 8;
    const int self = threadIdx.x / GROUP_THREADS - 1, lane = threadIdx.x % 32, warp = threadIdx.x % GROUP_THREADS / 32;
    const int row = self * 64 + warp * 16 + lane / 4;
    const float scale = p.scale * LOG2_E;
    if (self == 1) named_arrive(TURN, 2 * GROUP_THREADS);
    float score[64], sum[D / 2];
    unsigned probability[32];
    unsigned query_tile = query_tiles;
    auto scores = [&](int n) {
        const unsigned keys = key_tiles + (n % STAGES) * tile_bytes<D>();
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            const unsigned inside = (k % 4) * 32, block = k / 4;
            wgmma_128(score, operand(query_tile + block * ROWS * SWIZZLE_ROW + self * 64 * SWIZZLE_ROW + inside, 16),
                      operand(keys + block * KEYS * SWIZZLE_ROW + inside, 16), k > 0);
        }
        wgmma_commit();
    };
    auto weigh = [&](int n) {
        const unsigned values = value_tiles + (n % STAGES) * tile_bytes<D>();
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k)
            wgmma_rows(sum, &probability[4 * k], operand(values + k * 16 * SWIZZLE_ROW, KEYS * SWIZZLE_ROW), true);
        wgmma_commit();
    };
    auto await = [&](unsigned barrier, int parity) {
        barrier_wait(barrier, parity);
        publish();
    };
    auto release = [&](unsigned barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };
    int item = item_of(p, 0), done = 0;
    Tile coming;
    if (item < p.items) {
        coming.read(p, item);
        ask_for_queries<D>(p, coming, self, query_tile);
    }
#pragma unroll 1
    for (int turn = 1; item < p.items; ++turn) {
        const Tile tile = coming;
        copy_wait<0>();
        publish();
        named_sync(INSIDE + self, GROUP_THREADS);  // Also: the last tile's output has left the other place of queries.
        item = item_of(p, turn);
        if (item < p.items) {
            coming.read(p, item);
            ask_for_queries<D>(p, coming, self, query_tiles + (turn % 2) * (ROWS * D * 2));
        }
        const int steps = tile.steps(), least = tile.limit(0), limits[2] = {tile.limit(row), tile.limit(row + 8)};
        Softmax softmax;
#pragma unroll
        for (int i = 0; i < D / 2; ++i) sum[i] = 0.0f;
        if (steps > 0) {
            await(key_ring.full_at(done), Ring::parity(done));
            wgmma_fence();
            scores(done);
            wgmma_wait<0>();
            release(key_ring.empty_at(done));
            if (steps * KEYS > least) softmax.hide(score, (steps - 1) * KEYS, limits);
            softmax.step(score, scale);
            pack_all(score, probability);
#pragma unroll 1
            for (int n = 1; n < steps; ++n) {
                const int now = done + n, before = now - 1;
                await(key_ring.full_at(now), Ring::parity(now));
                named_sync(TURN + self, 2 * GROUP_THREADS);
                wgmma_fence();
                scores(now);
                await(value_ring.full_at(before), Ring::parity(before));
                weigh(before);
                named_arrive(TURN + 1 - self, 2 * GROUP_THREADS);
                wgmma_wait<1>();
                release(key_ring.empty_at(now));
                if ((steps - n) * KEYS > least) softmax.hide(score, (steps - 1 - n) * KEYS, limits);
                softmax.step(score, scale);
                wgmma_wait<0>();
                release(value_ring.empty_at(before));
#pragma unroll
                for (int i = 0; i < D / 2; ++i) sum[i] *= softmax.shrink[(i / 2) % 2];
                pack_all(score, probability);
            }
            const int last = done + steps - 1;
            await(value_ring.full_at(last), Ring::parity(last));
            wgmma_fence();
            weigh(last);
            wgmma_wait<0>();
            release(value_ring.empty_at(last));
        }
        done += steps;
        // Through the place of the queries, for whole 16-byte stores.
        named_sync(INSIDE + self, GROUP_THREADS);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float whole = quad_sum(softmax.total[half]), inverse = whole > 0.0f ? 1.0f / whole : 0.0f;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const unsigned to = swizzled(query_tile, ROWS, row + 8 * half, n) + (lane % 4) * 4;
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(to),
                             "r"(pack(sum[4 * n + 2 * half] * inverse, sum[4 * n + 2 * half + 1] * inverse))
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
            *reinterpret_cast<uint4*>(p.out + tile.place(r, p.out_stride, D) + i % UNITS * 8) = v;
        }
        query_tile = query_tiles + (turn % 2) * (ROWS * D * 2);
    }
}

template <int D>
__device__ void prefill(const Problem& p) {
    extern __shared__ unsigned char raw[];
    const unsigned key_tiles = (shared_address(raw) + 1023) & ~1023u, value_tiles = key_tiles + STAGES * tile_bytes<D>();
    const unsigned query_tiles = value_tiles + STAGES * tile_bytes<D>();
    const unsigned barriers = query_tiles + (p.turns ? 2 : 1) * ROWS * D * 2;
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
    if (threadIdx.x < GROUP_THREADS) {
        give_registers<40>();
        produce<D>(p, key_tiles, value_tiles, key_ring, value_ring);
    } else {
        take_registers<232>();
        consume<D>(p, query_tiles, key_tiles, value_tiles, key_ring, value_ring);
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
        const int row = kv_heads * D;                                                                                             \
        prefill<D>(Problem{q, keys, values, table, context, query_start, tiles, out, stride, kv_heads, group, page_shift, scale,   \
                           int(gridDim.x * gridDim.y), false, row * group, row, row, row * group});                               \
    }
#define ENTRY_ALL(NAME, D)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                      \
        NAME(const bf16* q, const bf16* keys, const bf16* values, const int* table, const int* context, const int* query_start,   \
             const int* tiles, bf16* out, int stride, int kv_heads, int group, int page_shift, float scale, int count) {          \
        const int row = kv_heads * D;                                                                                             \
        prefill<D>(Problem{q, keys, values, table, context, query_start, tiles, out, stride, kv_heads, group, page_shift, scale,   \
                           count * kv_heads, true, row * group, row, row, row * group});                                          \
    }

ENTRY(paged_prefill_sm90_d64, 64)
ENTRY(paged_prefill_sm90_d128, 128)
ENTRY_ALL(paged_prefill_sm90_all_d64, 64)
ENTRY_ALL(paged_prefill_sm90_all_d128, 128)

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    segment_attention_sm90_d64(const bf16* rotated, const bf16* qkv, const int* start, const int* tiles, bf16* out, int heads, float scale,
                               int count) {
    const int width = heads * 64;
    prefill<64>(Problem{rotated, rotated + width, qkv + 2 * width, nullptr, nullptr, start, tiles, out, 0, heads, 1, 0, scale, count * heads, true,
                        2 * width, 2 * width, 3 * width, width});
}
