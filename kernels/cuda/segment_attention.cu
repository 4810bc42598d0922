// Attention of the vision tower: every row of a segment sees the whole segment. And the 2-D rotation before it.
//
// segment_rope: q and k of qkv [n, 3, heads, dim] rotated (half split: element i < dim / 2 pairs with i + dim / 2) with f32 cos and sin
// [n, dim / 2], in f32, rounded once. rotated [n, 2, heads, dim] takes q and k; v stays in qkv.
// Grid: x = n; block: up to 1024 threads, any number; dim a multiple of 4. Bytes: 8 heads dim n + 4 dim n; floor = bytes / bandwidth.
//
// segment_attention_d{64,72,80}: grid: x = heads, y = tiles; block: 128; dynamic shared memory: 320 (D + 8) * 2 bytes, D = dim rounded up to 16
// (46,080 at 64, 56,320 at 72 and 80). Arguments: rotated, qkv as above; start int32 [segments + 1]; tiles int32 [tiles, 2]: (segment, first
// row within it), first rows multiples of 64; a negative segment is a tile of padding; out [n, heads dim].
// Operations: 4 dim heads sum of squared segment lengths; floor = operations / tensor-core rate.
#include "flash.cuh"

extern "C" __global__ void segment_rope(const bf16* qkv, const float* cosines, const float* sines, bf16* rotated, int heads, int dim) {
    wait_for_previous();
    release_next();
    const int half = dim / 2, width = heads * dim, pairs = half / 2;  // Two neighbouring elements and their two partners at once.
    const bf16* from = qkv + size_t(blockIdx.x) * 3 * width;
    bf16* to = rotated + size_t(blockIdx.x) * 2 * width;
    for (int i = threadIdx.x; i < 2 * heads * pairs; i += blockDim.x) {
        const int at = i / pairs * dim + i % pairs * 2;
        const float2 c = *reinterpret_cast<const float2*>(cosines + size_t(blockIdx.x) * half + i % pairs * 2);
        const float2 s = *reinterpret_cast<const float2*>(sines + size_t(blockIdx.x) * half + i % pairs * 2);
        const float2 a = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from + at));
        const float2 b = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from + at + half));
        *reinterpret_cast<unsigned*>(to + at) = pack(a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y);
        *reinterpret_cast<unsigned*>(to + at + half) = pack(b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y);
    }
}

template <int HEAD>
__device__ void attend(const bf16* rotated, const bf16* qkv, const int* start, const int* tiles, bf16* out, int heads, float scale) {
    extern __shared__ __align__(128) unsigned char raw[];
    auto& shared = *reinterpret_cast<FlashShared<(HEAD + 15) / 16 * 16>*>(raw);
    wait_for_previous();
    release_next();
    const int segment = tiles[2 * blockIdx.y], first = tiles[2 * blockIdx.y + 1], head = blockIdx.x, width = heads * HEAD;
    if (segment < 0) return;
    const size_t begin = start[segment];
    const int rows = start[segment + 1] - start[segment], count = min(rows - first, FLASH_ROWS);
    flash<HEAD>(
        shared, qkv, [&](int r) { return r < count ? rotated + (begin + first + r) * 2 * width + head * HEAD : nullptr; },
        [&](int t) { return rotated + (begin + t) * 2 * width + width + head * HEAD; },
        [&](int t) { return qkv + (begin + t) * 3 * width + 2 * width + head * HEAD; }, [&](int) { return rows; }, rows, rows, scale,
        [&](int r, int d, float low, float high) {
            if (r < count) *reinterpret_cast<unsigned*>(out + (begin + first + r) * width + head * HEAD + d) = pack(low, high);
        });
}

#define ENTRY(NAME, HEAD)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(FLASH_THREADS, 2)                                                         \
        NAME(const bf16* rotated, const bf16* qkv, const int* start, const int* tiles, bf16* out, int heads, float scale) { \
        attend<HEAD>(rotated, qkv, start, tiles, out, heads, scale);                                                       \
    }

ENTRY(segment_attention_d64, 64)
ENTRY(segment_attention_d72, 72)
ENTRY(segment_attention_d80, 80)
