// Grids of patches (grid.rs): where a patch lies in its grid, its rotation angles, and the interpolation of position embeddings.
// Patches of a grid go merge block by merge block in raster order, those of a block in raster order. `start` [grids + 1]: prefix sums
// of patches; `sizes` [grids]: (patches down, patches across), multiples of `merge`; checked on the host.
#include "numeric.cuh"

struct Place {
    int row, column, height, width;
};

__device__ __forceinline__ Place place_of(int patch, const int* start, const int2* sizes, int grids, int merge) {
    int low = 0, high = grids;  // The last grid that starts at or before the patch: it is not empty.
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (start[middle] <= patch) low = middle;
        else high = middle;
    }
    const int2 size = sizes[low];
    const int within = patch - start[low], area = merge * merge, across = size.y / merge;
    const int block = within / area, inner = within % area;
    return {block / across * merge + inner / merge, block % across * merge + inner % merge, size.x, size.y};
}

// cos and sin [patches, 2 * count] in f32: every frequency at the row, then at the column; rounded as `rope_table` rounds, to f32 only.
// Grid: x over patches x 2 count.
extern "C" __global__ void patch_angles(const int* start, const int2* sizes, const float* frequencies, float* cosines, float* sines,
                                        int grids, int merge, int count, size_t total) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= total) return;
    const int within = int(i % (2 * count));
    const Place place = place_of(int(i / (2 * count)), start, sizes, grids, merge);
    const int position = within < count ? place.row : place.column;
    double sine, cosine;
    sincos(double(__fmul_rn(float(position), frequencies[within % count])), &sine, &cosine);
    cosines[i] = float(cosine);
    sines[i] = float(sine);
}

struct Taps {
    int at[2];
    float weight[2];
};

// Position `index` of `size`, stretched over `side` entries with corners aligned; every step rounded as on the host.
__device__ __forceinline__ Taps taps(int index, int size, int side) {
    const float source = __fdiv_rn(__fmul_rn(float(index), float(side - 1)), float(max(size - 1, 1)));
    const float whole = floorf(source), part = __fsub_rn(source, whole);
    return {{min(int(whole), side - 1), min(int(whole) + 1, side - 1)},
            {fmaxf(__fsub_rn(1.0f, fabsf(part)), 0.0f), fmaxf(__fsub_rn(1.0f, fabsf(__fsub_rn(part, 1.0f))), 0.0f)}};
}

// out[i] = round(sum of four taps of table [side, side, width] around patch i), taps in order, as separate products and sums.
// Grid: x = patch; block = 128 threads that walk the row.
extern "C" __global__ void interpolate_grids(const bf16* table, const int* start, const int2* sizes, bf16* out, int grids, int merge,
                                             int side, int width) {
    const Place place = place_of(blockIdx.x, start, sizes, grids, merge);
    const Taps down = taps(place.row, place.height, side), across = taps(place.column, place.width, side);
    const bf16* rows[4];
    float weights[4];
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) {
        rows[tap] = table + (size_t(down.at[tap / 2]) * side + across.at[tap % 2]) * width;
        weights[tap] = __fmul_rn(down.weight[tap / 2], across.weight[tap % 2]);
    }
    const auto blend = [&](float a, float b, float c, float d) {
        float sum = __fmul_rn(weights[0], a);
        sum = __fadd_rn(sum, __fmul_rn(weights[1], b));
        sum = __fadd_rn(sum, __fmul_rn(weights[2], c));
        return narrow(__fadd_rn(sum, __fmul_rn(weights[3], d)));
    };
    bf16* to = out + size_t(blockIdx.x) * width;
    if (width % VECTOR == 0) {
        for (int i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            const Vector a = load(rows[0] + i), b = load(rows[1] + i), c = load(rows[2] + i), d = load(rows[3] + i);
            Vector y;
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) y.at[e] = blend(widen(a.at[e]), widen(b.at[e]), widen(c.at[e]), widen(d.at[e]));
            store(to + i, y);
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            to[i] = blend(widen(rows[0][i]), widen(rows[1][i]), widen(rows[2][i]), widen(rows[3][i]));
        }
    }
}
