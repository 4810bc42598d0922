// Decode attention over pages: one query row a sequence, split over the keys, query heads of one kv head packed as the M side of
// the tensor-core product.
//
// Work: sequence i with one query row has max(1, ceil(context[i] / 64)) tiles of 64 keys for each kv head (sequences with another
// number of rows have none: they are `paged_prefill`'s). All tiles are cut into gridDim.x equal runs, on the device, from `context`:
// the grid does not depend on the contexts, so a captured graph serves any of them, and blocks are equally loaded whatever the mix of
// lengths. Where gridDim.x is a multiple of kv_heads, every head has gridDim.x / kv_heads blocks of its own, in the order (sequence, tile), and
// neighbouring blocks walk the same pages at the same time, each its head: a page's heads are neighbours in memory. Otherwise one order,
// (sequence, head, tile), serves all blocks. A (sequence, head) that one block covers is written at once; one that several cover goes
// through `partial`, and the block that comes last (`arrived`) adds the parts in block order.
// A block is 4 warps; of each tile a warp takes 16 keys, through its own ring of STAGES chunks, with no barrier between warps
// before the end of a (sequence, head).
//
// Grid: x = blocks, as many as are resident at once (2 a multiprocessor); block: 128.
// Dynamic shared memory: paged_decode_shared_bytes = STAGES * 4 * 64 * D + 11,264 + 8 * (sequences + 1) bytes (D 128, 3 stages: 96 KiB
// + 11,264 + ...). D 64 takes twice the stages, so the same bytes.
// Arguments: q, out [T, kv_heads group D]; pools [blocks, block_tokens, kv_heads, D], block_tokens = 1 << page_shift; table
// [sequences, *stride], whose width is in memory, so that a captured graph serves any; context [sequences]; query_start
// [sequences + 1]; partial f32 [2 gridDim.x, group, D + 2]; arrived
// int32 [sequences kv_heads], zero before the first launch, left zero by each; scale on the scores. A context of 0 gives a zero row.
// Entries: _g8 for group <= 8, _g16 for group <= 16.
//
// Bytes: 4 D per key and kv head (K and V, bf16) read once; q, out, partials below 1 % from 512 keys a block. Operations: 4 D group per
// key and kv head, 16 rows padded: 64 D = 8,192 at D 128 against 512 bytes, far below the tensor cores' rate. Floor = bytes / bandwidth.
#include "mma.cuh"

#ifndef DECODE_STAGES
#define DECODE_STAGES 3
#endif
#ifndef DECODE_BY_HEAD_TILES
#define DECODE_BY_HEAD_TILES 16  // Tiles a block from which heads have blocks of their own, where the grid allows it.
#endif

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK = 16;            // Keys of a warp's step.
constexpr int TILE = WARPS * CHUNK;  // Keys of a block's step.
constexpr int ROWS = 16;             // Padded group.
constexpr int PIECE = 32;            // Columns of the output merged at once.
constexpr int PIECE_STRIDE = PIECE + 8;

struct Merge {
    float highest[WARPS][ROWS];
    float total[WARPS][ROWS];
    float row_highest[ROWS];
    float row_total[ROWS];
    float piece[WARPS][ROWS][PIECE_STRIDE];
    int scan[WARPS];
    int last;
};
static_assert(sizeof(Merge) <= 11264, "as the launch reckons");

struct Problem {
    const bf16* q;
    const bf16* keys;
    const bf16* values;
    const int* table;
    const int* context;
    const int* query_start;
    bf16* out;
    float* partial;
    int* arrived;
    const int* stride;
    int sequences, kv_heads, group, page_shift;
    float scale;
};

// Which tiles this block has, and where every sequence's begin. A lane of work is one head's tiles, or all heads' in turn.
struct Split {
    int total, blocks;  // Of the lane.
    int heads;          // Of the lane: kv_heads, or 1.
    int lane, lanes;    // The lane's first head, which is its number, and how many there are.
    __device__ static Split of(int per_head, int kv_heads, int blocks) {
        // The heads of a page are read together then, which pays where there is much to read.
        if (blocks % kv_heads == 0 && per_head * kv_heads >= DECODE_BY_HEAD_TILES * blocks)
            return {per_head, blocks / kv_heads, 1, int(blockIdx.x) % kv_heads, kv_heads};
        return {per_head * kv_heads, blocks, kv_heads, 0, 1};
    }
    __device__ int own() const { return blockIdx.x / lanes; }  // This block's number within the lane.
    __device__ int slot(int block) const { return block * lanes + lane; }
    __device__ int begin(int block) const {
        const int each = total / blocks, more = total % blocks;
        return block * each + min(block, more);
    }
    __device__ int block_of(int tile) const {
        const int each = total / blocks, more = total % blocks, wide = more * (each + 1);
        return tile < wide ? tile / (each + 1) : more + (tile - wide) / each;
    }
};

// A place in the order (sequence, head, tile).
struct Cursor {
    int sequence, head, tile, tiles;
    __device__ void seek(const int* prefix, int sequences, int heads, int flat) {
        int low = 0, high = sequences;  // Largest sequence that begins at or before `flat`: those without tiles are passed over.
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (prefix[middle] * heads <= flat) low = middle; else high = middle;
        }
        sequence = low;
        tiles = prefix[low + 1] - prefix[low];
        const int inside = flat - prefix[low] * heads;
        head = inside / tiles;
        tile = inside - head * tiles;
    }
    __device__ void advance(const int* prefix, int sequences, int heads) {
        if (++tile < tiles) return;
        tile = 0;
        if (++head < heads) return;
        head = 0;
        do {
            ++sequence;
            tiles = sequence < sequences ? prefix[sequence + 1] - prefix[sequence] : 1;
        } while (tiles == 0);
    }
};

// prefix[i] = tiles of a head of the sequences before i; contexts beside it.
__device__ int lay_out(const Problem& p, Merge& merge, int* prefix, int* contexts) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int before = 0;
    for (int first = 0; first < p.sequences; first += THREADS) {
        const int i = first + threadIdx.x;
        int tiles = 0;
        if (i < p.sequences) {
            const int context = p.context[i];
            contexts[i] = context;
            if (p.query_start[i + 1] - p.query_start[i] == 1) tiles = max(1, (context + TILE - 1) / TILE);
        }
        int sum = tiles;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int left = __shfl_up_sync(0xffffffffu, sum, distance);
            if (lane >= distance) sum += left;
        }
        if (lane == 31) merge.scan[warp] = sum;
        __syncthreads();
        int total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) sum += merge.scan[w];
            total += merge.scan[w];
        }
        if (i < p.sequences) prefix[i] = before + sum - tiles;
        before += total;
        __syncthreads();
    }
    if (threadIdx.x == 0) prefix[p.sequences] = before;
    __syncthreads();
    return before;
}

// Running softmax of a warp's share of the keys: rows i and i + 8 of the group.
template <int D>
struct State {
    float sum[D / 8][4];
    float highest[2];
    float total[2];  // This lane's columns only.
    __device__ void clear() {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
        highest[0] = highest[1] = -INFINITY;
        total[0] = total[1] = 0.0f;
    }
};

template <int D>
__device__ __forceinline__ unsigned place(unsigned chunk, int key, int column) {  // column in units of 16 bytes
    return chunk + key * (2 * D) + ((column ^ (key % 8)) * 16);
}

template <int D, bool WIDE>
__device__ __forceinline__ void step(State<D>& state, const unsigned (&query)[D / 16][4], unsigned keys, unsigned values, int visible,
                                     float scale) {
    const int lane = threadIdx.x % 32, eighth = lane / 8, line = lane % 8;
    float score[2][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        unsigned b[4];
        ldmatrix(b, place<D>(keys, (eighth / 2) * 8 + line, 2 * k + eighth % 2));
        mma(score[0], query[k][0], query[k][1], query[k][2], query[k][3], b[0], b[1]);
        mma(score[1], query[k][0], query[k][1], query[k][2], query[k][3], b[2], b[3]);
    }
    unsigned probability[4] = {};
    float shrink[2] = {1.0f, 1.0f};
#pragma unroll
    for (int half = 0; half < (WIDE ? 2 : 1); ++half) {
        float own[4];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int key = n * 8 + (lane % 4) * 2 + c;
                own[2 * n + c] = key < visible ? score[n][2 * half + c] * scale : -INFINITY;
            }
        const float now = fmaxf(state.highest[half], quad_max(fmaxf(fmaxf(own[0], own[1]), fmaxf(own[2], own[3]))));
        const float base = now == -INFINITY ? 0.0f : now;
        shrink[half] = power_of_two(state.highest[half] - base);
        state.highest[half] = now;
#pragma unroll
        for (int c = 0; c < 4; ++c) own[c] = power_of_two(own[c] - base);
        state.total[half] = state.total[half] * shrink[half] + ((own[0] + own[1]) + (own[2] + own[3]));
        probability[half] = pack(own[0], own[1]);
        probability[2 + half] = pack(own[2], own[3]);
    }
    if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            state.sum[n][0] *= shrink[0];
            state.sum[n][1] *= shrink[0];
            if (WIDE) {
                state.sum[n][2] *= shrink[1];
                state.sum[n][3] *= shrink[1];
            }
        }
    }
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
        unsigned b[4];
        ldmatrix_transposed(b, place<D>(values, (eighth % 2) * 8 + line, 2 * n + eighth / 2));
        mma(state.sum[2 * n], probability[0], probability[1], probability[2], probability[3], b[0], b[1]);
        mma(state.sum[2 * n + 1], probability[0], probability[1], probability[2], probability[3], b[2], b[3]);
    }
}

// Adds the parts of blocks first..=last, in that order. `begin` is the first tile of the (sequence, head).
template <int D>
__device__ void combine(const Problem& p, Merge& merge, const Split& split, int first, int last, int begin, bf16* out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = p.group * (D + 2);
    auto part = [&](int block) { return p.partial + size_t(2 * split.slot(block) + (split.begin(block) > begin ? 0 : 1)) * width; };
    for (int row = warp; row < p.group; row += WARPS) {
        float highest = -INFINITY, total = 0.0f;
        for (int block = first + lane; block <= last; block += 32) highest = fmaxf(highest, __ldcg(part(block) + p.group * D + 2 * row));
        highest = warp_max(highest);
        const float base = highest == -INFINITY ? 0.0f : highest;
        for (int block = first + lane; block <= last; block += 32) {
            const float* end = part(block) + p.group * D + 2 * row;
            total += __ldcg(end + 1) * power_of_two(__ldcg(end) - base);
        }
        total = warp_sum(total);
        if (lane == 0) {
            merge.row_highest[row] = base;
            merge.row_total[row] = total;
        }
    }
    __syncthreads();
    // Four neighbouring elements a thread; the blocks' factors for AT_ONCE blocks at a time go through shared memory.
    constexpr int AT_ONCE = sizeof(merge.piece) / sizeof(float) / ROWS, SETS = ROWS * D / 4 / THREADS;
    float* factors = &merge.piece[0][0][0];
    float4 sum[SETS] = {};
    for (int from = first; from <= last; from += AT_ONCE) {
        const int count = min(AT_ONCE, last + 1 - from);
        for (int i = threadIdx.x; i < count * p.group; i += THREADS) {
            const int row = i % p.group, block = i / p.group;
            factors[row * AT_ONCE + block] = power_of_two(__ldcg(part(from + block) + p.group * D + 2 * row) - merge.row_highest[row]);
        }
        __syncthreads();
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            const int at = (set * THREADS + threadIdx.x) * 4;
            if (at >= p.group * D) break;
            const float* factor = factors + at / D * AT_ONCE;
#pragma unroll 8
            for (int block = 0; block < count; ++block) {
                const float2* own = reinterpret_cast<const float2*>(part(from + block) + at);  // Parts are 8-byte aligned.
                const float2 low = __ldcg(own), high = __ldcg(own + 1);
                const float f = factor[block];
                sum[set].x += low.x * f;
                sum[set].y += low.y * f;
                sum[set].z += high.x * f;
                sum[set].w += high.y * f;
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int set = 0; set < SETS; ++set) {
        const int at = (set * THREADS + threadIdx.x) * 4;
        if (at >= p.group * D) break;
        const float total = merge.row_total[at / D], inverse = total > 0.0f ? 1.0f / total : 0.0f;
        *reinterpret_cast<uint2*>(out + at) = make_uint2(pack(sum[set].x * inverse, sum[set].y * inverse), pack(sum[set].z * inverse, sum[set].w * inverse));
    }
}

// End of a (sequence, head): the warps' shares become one, which goes out, or to `partial` if other blocks have shares too.
template <int D, bool WIDE>
__device__ void finish(const Problem& p, Merge& merge, State<D>& state, const Split& split, const int* prefix, const Cursor& at) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int half = 0; half < (WIDE ? 2 : 1); ++half) {
        const float total = quad_sum(state.total[half]);
        if (lane % 4 == 0) {
            merge.highest[warp][half * 8 + lane / 4] = state.highest[half];
            merge.total[warp][half * 8 + lane / 4] = total;
        }
    }
    __syncthreads();
    if (threadIdx.x < (WIDE ? 16 : 8)) {
        float highest = -INFINITY, total = 0.0f;
        for (int w = 0; w < WARPS; ++w) highest = fmaxf(highest, merge.highest[w][threadIdx.x]);
        const float base = highest == -INFINITY ? 0.0f : highest;
        for (int w = 0; w < WARPS; ++w) total += merge.total[w][threadIdx.x] * power_of_two(merge.highest[w][threadIdx.x] - base);
        merge.row_highest[threadIdx.x] = highest;
        merge.row_total[threadIdx.x] = total;
    }
    __syncthreads();
    float factor[2];
#pragma unroll
    for (int half = 0; half < (WIDE ? 2 : 1); ++half) {
        const float highest = merge.row_highest[half * 8 + lane / 4];
        factor[half] = power_of_two(state.highest[half] - (highest == -INFINITY ? 0.0f : highest));
    }
    const int begin = prefix[at.sequence] * split.heads + at.head * at.tiles, head = split.lane + at.head;
    const int first = split.block_of(begin), last = split.block_of(begin + at.tiles - 1);
    bf16* out = p.out + (size_t(p.query_start[at.sequence]) * p.kv_heads + head) * p.group * D;
    float* part = p.partial + size_t(2 * split.slot(split.own()) + (split.begin(split.own()) > begin ? 0 : 1)) * p.group * (D + 2);
#pragma unroll
    for (int piece = 0; piece < D / PIECE; ++piece) {
#pragma unroll
        for (int n = 0; n < PIECE / 8; ++n)
#pragma unroll
            for (int half = 0; half < (WIDE ? 2 : 1); ++half) {
                const float* own = &state.sum[piece * (PIECE / 8) + n][2 * half];
                *reinterpret_cast<float2*>(&merge.piece[warp][half * 8 + lane / 4][n * 8 + (lane % 4) * 2]) =
                    make_float2(own[0] * factor[half], own[1] * factor[half]);
            }
        __syncthreads();
        for (int i = threadIdx.x; i < p.group * PIECE; i += THREADS) {
            const int row = i / PIECE, column = i % PIECE, to = row * D + piece * PIECE + column;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += merge.piece[w][row][column];
            if (first == last) {
                out[to] = narrow(merge.row_total[row] > 0.0f ? sum / merge.row_total[row] : 0.0f);
            } else {
                part[to] = sum;
            }
        }
        __syncthreads();
    }
    if (first == last) return;
    if (threadIdx.x < p.group) {
        part[p.group * D + 2 * threadIdx.x] = merge.row_highest[threadIdx.x];
        part[p.group * D + 2 * threadIdx.x + 1] = merge.row_total[threadIdx.x];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* arrived = p.arrived + at.sequence * p.kv_heads + head;
        merge.last = atomicAdd(arrived, 1) == last - first;
        if (merge.last) *arrived = 0;
    }
    __syncthreads();
    if (!merge.last) return;
    __threadfence();
    combine<D>(p, merge, split, first, last, begin, out);
    __syncthreads();
}

template <int D, bool WIDE, int STAGES>
__device__ void decode(const Problem& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int CHUNK_BYTES = CHUNK * D * 2;
    Merge& merge = *reinterpret_cast<Merge*>(shared + WARPS * STAGES * 2 * CHUNK_BYTES);
    int* prefix = reinterpret_cast<int*>(shared + WARPS * STAGES * 2 * CHUNK_BYTES + 11264);
    int* contexts = prefix + p.sequences + 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    release_next();
    // Extents and tables are staged before a step: no kernel writes them.
    const int stride = *p.stride;
    const int per_head = lay_out(p, merge, prefix, contexts);
    const Split split = Split::of(per_head, p.kv_heads, gridDim.x);
    const int begin = split.begin(split.own()), count = split.begin(split.own() + 1) - begin;
    if (count == 0) return wait_for_previous();  // A block that ends before the kernel before would count as if that had ended.
    const unsigned ring = shared_address(shared) + warp * STAGES * 2 * CHUNK_BYTES;

    Cursor at, ahead;
    at.seek(prefix, p.sequences, split.heads, begin);
    ahead = at;
    // The pool row of key lane % 16 of this warp's chunk at `ahead`; -1 past the end. Looked up one step before it is used.
    auto look_up = [&]() {
        const int key = ahead.tile * TILE + warp * CHUNK + lane % CHUNK;
        if (ahead.sequence >= p.sequences || key >= contexts[ahead.sequence]) return -1;
        const int page = p.table[size_t(ahead.sequence) * stride + (key >> p.page_shift)];
        return (page << p.page_shift) + (key & ((1 << p.page_shift) - 1));
    };
    int row = look_up(), stage_ahead = 0;
    auto request = [&]() {
        constexpr int LANES = D / 8;  // Lanes of a row.
        constexpr int ROWS_AT_ONCE = 32 / LANES;
        const unsigned to = ring + stage_ahead * 2 * CHUNK_BYTES;
#pragma unroll
        for (int j = 0; j < CHUNK / ROWS_AT_ONCE; ++j) {
            const int key = j * ROWS_AT_ONCE + lane / LANES;
            const int from = __shfl_sync(0xffffffffu, row, key);
            const size_t offset = (size_t(max(from, 0)) * p.kv_heads + split.lane + ahead.head) * D + (lane % LANES) * 8;
            copy_16(place<D>(to, key, lane % LANES), p.keys + offset, from >= 0);
            copy_16(place<D>(to + CHUNK_BYTES, key, lane % LANES), p.values + offset, from >= 0);
        }
        stage_ahead = stage_ahead + 1 == STAGES ? 0 : stage_ahead + 1;
        ahead.advance(prefix, p.sequences, split.heads);
        row = look_up();
    };
    // Keys but a sequence's last one are those of earlier steps.
    bool waited = false;
    auto wait = [&] {
        if (!waited) wait_for_previous();
        waited = true;
    };
#pragma unroll 1
    for (int n = 0; n < STAGES - 1; ++n) {
        if (ahead.tile + 1 == ahead.tiles) wait();
        if (n < count) request();
        copy_commit();
    }
    wait();

    State<D> state;
    unsigned query[D / 16][4];
    int stage = 0;
    bool fresh = true;
    const float scale = p.scale * LOG2_E;
#pragma unroll 1
    for (int n = 0; n < count; ++n) {
        if (fresh) {
            state.clear();
            const bf16* rows = p.q + (size_t(p.query_start[at.sequence]) * p.kv_heads + split.lane + at.head) * p.group * D;
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
#pragma unroll
                for (int part = 0; part < 4; ++part) {
                    const int r = lane / 4 + (part % 2) * 8, d = k * 16 + (part / 2) * 8 + (lane % 4) * 2;
                    const bool inside = r < p.group && (WIDE || part % 2 == 0);
                    query[k][part] = inside ? *reinterpret_cast<const unsigned*>(rows + size_t(r) * D + d) : 0u;
                }
        }
        copy_wait<STAGES - 2>();
        __syncwarp();
        if (n + STAGES - 1 < count) request();
        copy_commit();
        const unsigned keys = ring + stage * 2 * CHUNK_BYTES;
        const int visible = contexts[at.sequence] - at.tile * TILE - warp * CHUNK;
        if (visible > 0) step<D, WIDE>(state, query, keys, keys + CHUNK_BYTES, visible, scale);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        fresh = at.tile + 1 == at.tiles || n + 1 == count;
        if (fresh) finish<D, WIDE>(p, merge, state, split, prefix, at);
        at.advance(prefix, p.sequences, split.heads);
    }
}

#define ENTRY(NAME, D, WIDE, STAGES)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                       \
        NAME(const bf16* q, const bf16* keys, const bf16* values, const int* table, const int* context, const int* query_start,   \
             bf16* out, float* partial, int* arrived, const int* stride, int sequences, int kv_heads, int group, int page_shift,  \
             float scale) {                                                                                                       \
        decode<D, WIDE, STAGES>(Problem{q, keys, values, table, context, query_start, out, partial, arrived, stride, sequences,   \
                                        kv_heads, group, page_shift, scale});                                                     \
    }

ENTRY(paged_decode_d128_g8, 128, false, DECODE_STAGES)
ENTRY(paged_decode_d128_g16, 128, true, DECODE_STAGES)
ENTRY(paged_decode_d64_g8, 64, false, 2 * DECODE_STAGES)
ENTRY(paged_decode_d64_g16, 64, true, 2 * DECODE_STAGES)
