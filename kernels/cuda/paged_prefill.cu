// Causal attention of chunks of query rows over pages, any card since sm_80; `paged_prefill_sm90.cu` is the faster one for Hopper.
//
// Query heads of one kv head are packed: packed row r of a sequence is query row r / group, head r % group, so a tile of 64 packed
// rows reads its keys once for the whole group, and little of its work is masked.
//
// Grid: x = kv heads, y = tiles; block: 128; dynamic shared memory: 320 (D + 8) * 2 bytes (87,040 at D 128).
// Arguments: q, out [T, kv_heads group D]; pools [blocks, block_tokens, kv_heads, D], block_tokens = 1 << page_shift; table
// [sequences, stride]; context [sequences]; query_start [sequences + 1]; tiles int32 [tiles, 2]: (sequence, first packed row), built on
// the host for each step, first rows multiples of the tile's 64 rows, longest work first; a negative sequence is a tile of padding. Sequences of one row that `paged_decode`
// serves are left out of the list.
//
// Operations: 4 D per visible (query head, key) pair, twice that at the diagonal. Bytes: q, out, and keys and values once per tile
// from the L2; far above the card's operations per byte from some hundred rows on, so the floor is operations / tensor-core rate.
#include "flash.cuh"

template <int D>
__device__ void prefill(const bf16* q, const bf16* keys, const bf16* values, const int* table, const int* context,
                        const int* query_start, const int* tiles, bf16* out, int stride, int kv_heads, int group, int page_shift,
                        float scale) {
    extern __shared__ __align__(128) unsigned char raw[];
    FlashShared<D>& shared = *reinterpret_cast<FlashShared<D>*>(raw);
    wait_for_previous();
    release_next();
    const int sequence = tiles[2 * blockIdx.y], first = tiles[2 * blockIdx.y + 1], head = blockIdx.x;
    if (sequence < 0) return;
    const int start = query_start[sequence], rows = query_start[sequence + 1] - start, length = context[sequence];
    const int count = min(rows * group - first, FLASH_ROWS);
    const int* pages = table + size_t(sequence) * stride;
    auto pool_row = [&](int t) {
        const size_t row = (size_t(pages[t >> page_shift]) << page_shift) + (t & ((1 << page_shift) - 1));
        return (row * kv_heads + head) * D;
    };
    auto place = [&](int r) {
        const int row = (first + r) / group;
        return ((size_t(start + row) * kv_heads + head) * group + (first + r - row * group)) * D;
    };
    auto limit = [&](int r) { return r < count ? max(0, length - rows + (first + r) / group + 1) : 0; };
    flash<D>(
        shared, q, [&](int r) { return r < count ? q + place(r) : nullptr; }, [&](int t) { return keys + pool_row(t); },
        [&](int t) { return values + pool_row(t); }, limit, count > 0 ? limit(count - 1) : 0, limit(0), scale,
        [&](int r, int d, float low, float high) {
            if (r < count) *reinterpret_cast<unsigned*>(out + place(r) + d) = pack(low, high);
        });
}

#define ENTRY(NAME, D)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(FLASH_THREADS, 2)                                                              \
        NAME(const bf16* q, const bf16* keys, const bf16* values, const int* table, const int* context, const int* query_start, \
             const int* tiles, bf16* out, int stride, int kv_heads, int group, int page_shift, float scale) {                   \
        prefill<D>(q, keys, values, table, context, query_start, tiles, out, stride, kv_heads, group, page_shift, scale);       \
    }

ENTRY(paged_prefill_d64, 64)
ENTRY(paged_prefill_d128, 128)
