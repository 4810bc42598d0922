// Whole rows: gather (embedding too), scatter, scatter-add, and frames repeated in time, normalised too.
// Grids: x = row, block = 128 threads that walk the row. Indices are checked on the host.
#include "numeric.cuh"

// The block's row of `out` = row `row` of `table`.
__device__ __forceinline__ void copy_row(const bf16* table, unsigned row, bf16* out, int width) {
    const bf16* from = table + size_t(row) * width;
    bf16* to = out + size_t(blockIdx.x) * width;
    if (width % VECTOR == 0) {
        for (int i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) store(to + i, load(from + i));
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
    }
}

// out[i] = table[rows[i]]; width in elements.
extern "C" __global__ void gather_rows(const bf16* table, const unsigned* rows, bf16* out, int width) {
    release_next();
    wait_for_previous();
    copy_row(table, rows[blockIdx.x], out, width);
}

// out[i] = table[ids[i]], `count` rows of it. An id with its top bit set names an entry of `drawn`, what the step before drew
// (argmax.cu, sample.cu): 0xffffffff there, a row that was not finite, gives row 0, which the host drops later.
extern "C" __global__ void embed_rows(const bf16* table, const unsigned* ids, const unsigned* drawn, bf16* out, int width,
                                      int count) {
    release_next();
    wait_for_previous();
    unsigned id = ids[blockIdx.x];
    if (id & 0x80000000u) id = drawn[id & 0x7fffffffu];
    copy_row(table, id < unsigned(count) ? id : 0u, out, width);
}

// x[rows[i]] = values[i]; of equal rows the last one counts. `distinct`: there are none, and nothing is searched.
extern "C" __global__ void scatter_rows(bf16* x, const unsigned* rows, const bf16* values, int width, int count, int distinct) {
    const unsigned row = rows[blockIdx.x];
    if (!distinct) {
        for (int later = blockIdx.x + 1; later < count; ++later) {
            if (rows[later] == row) return;
        }
    }
    const bf16* from = values + size_t(blockIdx.x) * width;
    bf16* to = x + size_t(row) * width;
    if (width % VECTOR == 0) {
        for (int i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) store(to + i, load(from + i));
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
    }
}

// x[rows[i]] = round(x[rows[i]] + values[i]); equal rows are added in order, each sum rounded. `distinct`: there are none.
extern "C" __global__ void scatter_add_rows(bf16* x, const unsigned* rows, const bf16* values, int width, int count, int distinct) {
    const unsigned row = rows[blockIdx.x];
    const bf16* from = values + size_t(blockIdx.x) * width;
    bf16* to = x + size_t(row) * width;
    if (distinct && width % VECTOR == 0) {
        for (int i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            Vector sum = load(to + i);
            const Vector value = load(from + i);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) sum.at[e] = narrow(widen(sum.at[e]) + widen(value.at[e]));
            store(to + i, sum);
        }
        return;
    }
    for (int earlier = 0; !distinct && earlier < int(blockIdx.x); ++earlier) {
        if (rows[earlier] == row) return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = widen(to[i]) + widen(from[i]);
        for (int later = blockIdx.x + 1; !distinct && later < count; ++later) {
            if (rows[later] == row) sum = rounded(sum) + widen(values[size_t(later) * width + i]);
        }
        to[i] = narrow(sum);
    }
}

// Frame blockIdx.x of `area` pixels, `temporal` times in a row. Grid: x = patch and channel.
extern "C" __global__ void repeat_frames(const bf16* frames, bf16* out, int area, int temporal) {
    const bf16* from = frames + size_t(blockIdx.x) * area;
    bf16* to = out + size_t(blockIdx.x) * temporal * area;
    for (int i = threadIdx.x; i < area; i += blockDim.x) {
        const bf16 pixel = from[i];
        for (int t = 0; t < temporal; ++t) to[t * area + i] = pixel;
    }
}

// out = (sample - shift) / scale of its channel, each operation rounded to f32, then to bf16; each frame `repeats` times in a row.
// Frames are [patches, 3 channels, slots] of `area` samples. A thread takes VECTOR neighbours of a frame, or one where `area` is
// no multiple; grid: x = all of them.
extern "C" __global__ void normalise_frames(const unsigned char* samples, bf16* out, float shift_r, float shift_g, float shift_b,
                                            float scale_r, float scale_g, float scale_b, int area, int slots, int repeats,
                                            int frames) {
    const unsigned width = area % VECTOR == 0 ? VECTOR : 1;
    const unsigned runs = area / width;
    const unsigned run = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned frame = run / runs;
    if (frame >= unsigned(frames)) return;
    const unsigned at = (run % runs) * width;
    const unsigned channel = frame / slots % 3;
    const float shift = channel == 0 ? shift_r : channel == 1 ? shift_g : shift_b;
    const float scale = channel == 0 ? scale_r : channel == 1 ? scale_g : scale_b;
    // Intrinsics: neither fused into a multiply-add nor replaced by a reciprocal.
    const auto normal = [&](unsigned sample) { return narrow(__fdiv_rn(__fsub_rn(float(sample), shift), scale)); };
    const unsigned char* from = samples + size_t(frame) * area + at;
    bf16* to = out + size_t(frame) * repeats * area + at;
    if (width == 1) {
        const bf16 value = normal(*from);
        for (int t = 0; t < repeats; ++t) to[size_t(t) * area] = value;
        return;
    }
    const uint2 read = *reinterpret_cast<const uint2*>(from);
    Vector values;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) values.at[e] = normal((e < 4 ? read.x : read.y) >> (e % 4 * 8) & 0xffu);
    for (int t = 0; t < repeats; ++t) store(to + size_t(t) * area, values);
}
