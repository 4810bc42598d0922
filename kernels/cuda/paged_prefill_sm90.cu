// Causal attention of chunks of query rows over pages, for Hopper: wgmma, keys and values gathered from pages by a producer warpgroup
// with 16-byte asynchronous copies into swizzled tiles, two consumer warpgroups of 64 packed rows that take turns at the tensor cores
// (one's softmax beside the other's products), and each overlapping its own softmax with its previous PV.
//
// Packing, arguments and the list of tiles are those of paged_prefill.cu, but for tiles of 128 packed rows.
// paged_prefill_sm90_d{64,128}: one more argument, the number of tiles; grid x = min(multiprocessors, tiles kv_heads), blocks work
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
constexpr float MARGIN = 8.0f;  // Powers of two that a score may lie above its row's base.
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
    int items;  // Tiles times kv heads, heads fastest.
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
    __device__ void read(const Problem& p, int item, int2 place) {
        group = p.group;
        causal = p.table != nullptr;
        head = item % p.kv_heads;
        sequence = place.x;
        first = place.y;
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

// The block's items, in turns: forth, then back, since the list is sorted by work. An item's place in the list is asked for one turn
// before its tile is read, so that nothing waits for two loads in a row.
struct Turns {
    int turn = 0, item;
    int2 place;
    __device__ __forceinline__ void ask(const Problem& p) {
        const int blocks = gridDim.x * gridDim.y, block = blockIdx.y * gridDim.x + blockIdx.x;
        item = turn * blocks + (turn % 2 == 0 ? block : blocks - 1 - block);
        if (item < p.items) place = reinterpret_cast<const int2*>(p.tiles)[item / p.kv_heads];
        ++turn;
    }
    // False, and no tile, after the last.
    __device__ __forceinline__ bool take(const Problem& p, Tile& tile) {
        if (item >= p.items) return false;
        tile.read(p, item, place);
        ask(p);
        return true;
    }
};

struct Ring {  // Barriers of the stages of keys or values.
    unsigned full, empty;
    __device__ unsigned full_at(unsigned n) const { return full + n % STAGES * 8; }
    __device__ unsigned empty_at(unsigned n) const { return empty + n % STAGES * 8; }
    static __device__ int parity(unsigned n) { return n / STAGES & 1; }
};

template <int D>
constexpr int tile_bytes() {
    return KEYS * D * 2;
}

// Copies a warp's 32 keys of a step, four rows of 128 bytes at once; `row` is the pool row of key `lane`, -1 for zeros (only if TAIL), `from`
// this lane's 16 bytes of pool row 0, `places` where they go in even and in odd fours of rows.
template <int D, bool TAIL>
__device__ __forceinline__ void copy_keys(const char* from, int stride, unsigned to, const unsigned (&places)[2], int row) {
#pragma unroll
    for (int four = 0; four < 8; ++four) {
        const int own = __shfl_sync(0xffffffffu, row, four * 4 + threadIdx.x % 32 / 8);
        const char* at = from + static_cast<long long>(TAIL ? max(own, 0) : own) * stride;
#pragma unroll
        for (int block = 0; block < D / 64; ++block)
            copy_16(to + places[four % 2] + four / 2 * SWIZZLE_GROUP + block * KEYS * SWIZZLE_ROW, at + block * SWIZZLE_ROW, !TAIL || own >= 0);
    }
}

// Only the first step of a tile, the one with the last keys, has keys past the end.
template <int D>
__device__ void produce(const Problem& p, unsigned key_tiles, unsigned value_tiles, Ring key_ring, Ring value_ring) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned places[2] = {swizzled(0, KEYS, warp * 32 + lane / 8, lane % 8), swizzled(0, KEYS, warp * 32 + 4 + lane / 8, lane % 8)};
    // Pool row of key `lane` of this warp's 32 keys of step n of a tile, -1 past the end.
    auto look_up = [&](const Tile& tile, int n) {
        const int most = tile.most(), steps = (most + KEYS - 1) / KEYS, key = (steps - 1 - n) * KEYS + warp * 32 + lane;
        if (n >= steps || key >= most) return -1;
        if (p.table == nullptr) return tile.start + key;
        const int page = p.table[size_t(tile.sequence) * p.stride + (key >> p.page_shift)];
        return (page << p.page_shift) + (key & ((1 << p.page_shift) - 1));
    };
    Turns turns;
    turns.ask(p);
    Tile coming;
    bool more = turns.take(p, coming);
    int row = more ? look_up(coming, 0) : -1, next = more ? look_up(coming, 1) : -1;
    unsigned done = 0;  // Steps of earlier tiles.
#pragma unroll 1
    while (more) {
        const Tile tile = coming;
        more = turns.take(p, coming);
        const int steps = tile.steps();
        const char* keys = reinterpret_cast<const char*>(p.keys + tile.head * D + lane % 8 * 8);
        const char* values = reinterpret_cast<const char*>(p.values + tile.head * D + lane % 8 * 8);
        auto fill = [&](const char* from, int stride, unsigned tiles, const Ring& ring, int n, int row) {
            barrier_wait(ring.empty_at(done + n), Ring::parity(done + n) ^ 1);
            const unsigned to = tiles + (done + n) % STAGES * tile_bytes<D>();
            if (n == 0) {
                copy_keys<D, true>(from, 2 * stride, to, places, row);
            } else {
                copy_keys<D, false>(from, 2 * stride, to, places, row);
            }
            barrier_arrive_after_copies(ring.full_at(done + n));
        };
        if (steps > 0) fill(keys, p.key_stride, key_tiles, key_ring, 0, row);
#pragma unroll 1
        for (int n = 0; n + 1 < steps; ++n) {
            const int later = look_up(tile, n + 2);
            fill(keys, p.key_stride, key_tiles, key_ring, n + 1, next);
            fill(values, p.value_stride, value_tiles, value_ring, n, row);
            row = next;
            next = later;
        }
        const int last = row;
        row = more ? look_up(coming, 0) : -1;
        next = more ? look_up(coming, 1) : -1;
        if (steps > 0) fill(values, p.value_stride, value_tiles, value_ring, steps - 1, last);
        done += steps;
    }
    copy_wait<0>();
}

// Online softmax of a warpgroup's scores; rows lane / 4 and + 8 of each warp. The base of the powers is a row's highest score at some step: it moves
// only where a score lies more than MARGIN powers of two above it, so that the output's sums are rarely scaled; sums stay below 2^MARGIN keys.
struct Softmax {
    float highest[2] = {-INFINITY, -INFINITY};
    float total[2] = {};
    float shrink[2];
    bool moved;  // Of any row of the warp.
    __device__ __forceinline__ void hide(float (&score)[64], int first_key, const int (&limits)[2]) const {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            const int key = first_key + (i / 4) * 8 + (threadIdx.x % 4) * 2 + i % 2;
            if (key >= limits[(i / 2) % 2]) score[i] = -INFINITY;
        }
    }
    __device__ __forceinline__ void step(float (&score)[64], float scale) {
        bool moves[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float now = highest[half];
#pragma unroll
            for (int i = 0; i < 16; ++i) now = fmaxf(now, fmaxf(score[4 * i + 2 * half], score[4 * i + 2 * half + 1]));
            now = quad_max(now);
            moves[half] = (now - highest[half]) * scale > MARGIN;  // False of two infinities.
            if (!moves[half]) now = highest[half];
            const float base = now == -INFINITY ? 0.0f : now * scale;
            shrink[half] = moves[half] ? power_of_two(highest[half] * scale - base) : 1.0f;
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
        moved = __any_sync(0xffffffffu, moves[0] || moves[1]);
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

// HELD: the queries lie in registers for the scores' product, which pays at 64 elements a head (segments: 8 to 11 % on an H100).
template <int D, bool HELD>
__device__ void consume(const Problem& p, unsigned query_tiles, unsigned key_tiles, unsigned value_tiles, Ring key_ring, Ring value_ring) {
    constexpr int UNITS = D / 8, QUERY_BYTES = ROWS * D * 2;
    const int self = __shfl_sync(0xffffffffu, threadIdx.x / GROUP_THREADS - 1, 0), lane = threadIdx.x % 32, warp = threadIdx.x % GROUP_THREADS / 32;
    const int row = self * 64 + warp * 16 + lane / 4;
    const float scale = p.scale * LOG2_E;
    if (self == 1) named_arrive(TURN, 2 * GROUP_THREADS);
    float score[64], sum[D / 2];
    unsigned probability[32], query_tile = query_tiles;
    const unsigned first_query = operand_low(query_tiles + self * 64 * SWIZZLE_ROW, 16);
    const unsigned first_key = operand_low(key_tiles, 16), first_value = operand_low(value_tiles, KEYS * SWIZZLE_ROW);
    unsigned query = first_query;
    unsigned own_query[HELD ? D / 16 : 1][4];
    auto scores = [&](unsigned n) {
        const unsigned keys = first_key + n % STAGES * (tile_bytes<D>() / 16);
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            const int block = k / 4 * SWIZZLE_ROW / 16, inside = k % 4 * 2;
            if constexpr (HELD) {
                wgmma_rows<false>(score, own_query[k], operand(keys + block * KEYS + inside), k > 0);
            } else {
                wgmma_128(score, operand(query + block * ROWS + inside), operand(keys + block * KEYS + inside), k > 0);
            }
        }
        wgmma_commit();
    };
    auto weigh = [&](unsigned n) {
        const unsigned values = first_value + n % STAGES * (tile_bytes<D>() / 16);
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k) wgmma_rows(sum, &probability[4 * k], operand(values + k * 16 * SWIZZLE_ROW / 16), true);
        wgmma_commit();
    };
    auto await = [&](unsigned barrier, int parity) {
        barrier_wait(barrier, parity);
        publish();
    };
    auto release = [&](unsigned barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };
    Turns turns;
    turns.ask(p);
    Tile coming;
    bool more = turns.take(p, coming);
    if (more) ask_for_queries<D>(p, coming, self, query_tile);
    unsigned done = 0;
#pragma unroll 1
    for (unsigned turn = 1; more; ++turn) {
        const Tile tile = coming;
        more = turns.take(p, coming);
        const unsigned other = query_tiles + turn % 2 * QUERY_BYTES;
        const int steps = tile.steps(), least = tile.limit(0), limits[2] = {tile.limit(row), tile.limit(row + 8)};
        Softmax softmax;
#pragma unroll
        for (int i = 0; i < D / 2; ++i) sum[i] = 0.0f;
        copy_wait<0>();
        publish();
        named_sync(INSIDE + self, GROUP_THREADS);  // Also: the last tile's output has left the other place of queries.
        if constexpr (HELD) {
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
                ldmatrix(own_query[k], swizzled(query_tile, ROWS, self * 64 + warp * 16 + lane % 16, 2 * k + lane / 16));
        }
        if (steps > 0) {
            await(key_ring.full_at(done), Ring::parity(done));
            wgmma_fence();
            scores(done);
            if (more) ask_for_queries<D>(p, coming, self, other);
            wgmma_wait<0>();
            hold(score);
            release(key_ring.empty_at(done));
            if (steps * KEYS > least) softmax.hide(score, (steps - 1) * KEYS, limits);
            softmax.step(score, scale);
            pack_all(score, probability);
#pragma unroll 1
            for (int n = 1; n < steps; ++n) {
                const unsigned now = done + n, before = now - 1;
                await(key_ring.full_at(now), Ring::parity(now));
                named_sync(TURN + self, 2 * GROUP_THREADS);
                wgmma_fence();
                scores(now);
                await(value_ring.full_at(before), Ring::parity(before));
                weigh(before);
                named_arrive(TURN + 1 - self, 2 * GROUP_THREADS);
                wgmma_wait<1>();
                hold(score);
                release(key_ring.empty_at(now));
                if ((steps - n) * KEYS > least) softmax.hide(score, (steps - 1 - n) * KEYS, limits);
                softmax.step(score, scale);
                hold(score);
                // A branch, so that the compiler leaves the wait for the sums behind the powers.
                if (softmax.moved) {
                    wgmma_wait<0>();
                    hold(sum);
#pragma unroll
                    for (int i = 0; i < D / 2; ++i) sum[i] *= softmax.shrink[(i / 2) % 2];
                }
                wgmma_wait<0>();
                hold(sum);
                release(value_ring.empty_at(before));
                pack_all(score, probability);
            }
            const unsigned last = done + steps - 1;
            await(value_ring.full_at(last), Ring::parity(last));
            wgmma_fence();
            weigh(last);
            wgmma_wait<0>();
            hold(sum);
            release(value_ring.empty_at(last));
        } else if (more) {
            ask_for_queries<D>(p, coming, self, other);
        }
        done += steps;
        // Through the place of the queries, for whole 16-byte stores: every warp its own rows, which both products have read.
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
        query_tile = other;
        query = first_query + turn % 2 * (QUERY_BYTES / 16);
    }
}

template <int D, bool HELD = false>
__device__ void prefill(const Problem& p) {
    extern __shared__ unsigned char raw[];
    const unsigned key_tiles = (shared_address(raw) + 1023) & ~1023u, value_tiles = key_tiles + STAGES * tile_bytes<D>();
    const unsigned query_tiles = value_tiles + STAGES * tile_bytes<D>();
    const unsigned barriers = query_tiles + 2 * ROWS * D * 2;
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
        consume<D, HELD>(p, query_tiles, key_tiles, value_tiles, key_ring, value_ring);
    }
}
#else
template <int D, bool HELD = false>
__device__ void prefill(const Problem&) {
    __trap();  // Never launched on other cards: paged_prefill.cu is theirs.
}
#endif

#define ENTRY(NAME, D)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                      \
        NAME(const bf16* q, const bf16* keys, const bf16* values, const int* table, const int* context, const int* query_start,   \
             const int* tiles, bf16* out, int stride, int kv_heads, int group, int page_shift, float scale, int count) {          \
        const int row = kv_heads * D;                                                                                             \
        prefill<D>(Problem{q, keys, values, table, context, query_start, tiles, out, stride, kv_heads, group, page_shift, scale,   \
                           count * kv_heads, row * group, row, row, row * group});                                          \
    }

ENTRY(paged_prefill_sm90_d64, 64)
ENTRY(paged_prefill_sm90_d128, 128)

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    segment_attention_sm90_d64(const bf16* rotated, const bf16* qkv, const int* start, const int* tiles, bf16* out, int heads, float scale,
                               int count) {
    const int width = heads * 64;
    prefill<64, true>(Problem{rotated, rotated + width, qkv + 2 * width, nullptr, nullptr, start, tiles, out, 0, heads, 1, 0, scale, count * heads,
                        2 * width, 2 * width, 3 * width, width});
}
