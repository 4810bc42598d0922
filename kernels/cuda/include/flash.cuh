// Tiled attention on mma.sync (every card since sm_80): 64 query rows a block, 4 warps of 16, keys and values in tiles of 64, two
// stages of asynchronous copies, online softmax, probabilities rounded before PV, one rounding of the output.
//
// The caller gives pointers for rows of q, of keys and values, and how many keys each query row sees.
#pragma once
#include "mma.cuh"

constexpr int FLASH_WARPS = 4;
constexpr int FLASH_THREADS = 32 * FLASH_WARPS;
constexpr int FLASH_ROWS = 16 * FLASH_WARPS;
constexpr int FLASH_KEYS = 64;

// Rows are padded by 16 bytes: an odd number of 16-byte units, so that eight neighbouring rows lie in different banks.
template <int D>
struct FlashShared {
    bf16 query[FLASH_ROWS][D + 8];
    bf16 keys[2][FLASH_KEYS][D + 8];
    bf16 values[2][FLASH_KEYS][D + 8];
    static_assert(D % 16 == 0, "whole steps of the product");
};

// Starts copying `rows` rows of HEAD elements, padded with zeros to D, from where `row_at` says (null: zeros), to rows D + 8 apart.
// `mapped` is any address in global memory.
template <int HEAD, int D, typename RowAt>
__device__ __forceinline__ void flash_fill(bf16* to, int rows, const bf16* mapped, RowAt row_at) {
    constexpr int UNITS = D / 8;
    for (int i = threadIdx.x; i < rows * UNITS; i += FLASH_THREADS) {
        const int row = i / UNITS, unit = i % UNITS;
        const bf16* from = row_at(row);
        const bool valid = from != nullptr && unit * 8 < HEAD;
        copy_16(shared_address(to + row * (D + 8) + unit * 8), valid ? from + unit * 8 : mapped, valid);
    }
}

// `mapped`: any address in global memory. `query(r)`, `key(t)`, `value(t)`: first element of a row of HEAD elements, null for a row of zeros. `limit(r)`: keys that query row r
// sees. `most`, `least`: largest and smallest of limit over the tile. `write(r, d, low, high)` takes elements d and d + 1 of row r.
template <int HEAD, typename Query, typename Key, typename Value, typename Limit, typename Write>
__device__ void flash(FlashShared<(HEAD + 15) / 16 * 16>& shared, const bf16* mapped, Query query, Key key, Value value, Limit limit, int most, int least,
                      float scale, Write write) {
    constexpr int D = (HEAD + 15) / 16 * 16;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, eighth = lane / 8, line = lane % 8;
    auto fill_tile = [&](int tile) {
        const int first = tile * FLASH_KEYS, rows = FLASH_KEYS;
        const bf16* none = nullptr;
        flash_fill<HEAD, D>(&shared.keys[tile % 2][0][0], rows, mapped, [&](int t) { return first + t < most ? key(first + t) : none; });
        flash_fill<HEAD, D>(&shared.values[tile % 2][0][0], rows, mapped, [&](int t) { return first + t < most ? value(first + t) : none; });
    };
    const int tiles = (most + FLASH_KEYS - 1) / FLASH_KEYS;
    flash_fill<HEAD, D>(&shared.query[0][0], FLASH_ROWS, mapped, query);
    if (tiles > 0) fill_tile(0);
    copy_commit();

    const int rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
    const int limits[2] = {limit(rows[0]), limit(rows[1])};
    float sum[D / 8][4] = {}, highest[2] = {-INFINITY, -INFINITY}, total[2] = {};
    scale *= LOG2_E;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        if (tile + 1 < tiles) fill_tile(tile + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        float score[FLASH_KEYS / 8][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            unsigned a[4];
            ldmatrix(a, shared_address(&shared.query[warp * 16 + (eighth % 2) * 8 + line][k * 16 + (eighth / 2) * 8]));
#pragma unroll
            for (int n = 0; n < FLASH_KEYS / 16; ++n) {
                unsigned b[4];
                ldmatrix(b, shared_address(&shared.keys[tile % 2][n * 16 + (eighth / 2) * 8 + line][k * 16 + (eighth % 2) * 8]));
                mma(score[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma(score[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
        if ((tile + 1) * FLASH_KEYS > least) {
#pragma unroll
            for (int n = 0; n < FLASH_KEYS / 8; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int t = tile * FLASH_KEYS + n * 8 + (lane % 4) * 2 + c % 2;
                    if (t >= limits[c / 2]) score[n][c] = -INFINITY;
                }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float now = highest[half];
#pragma unroll
            for (int n = 0; n < FLASH_KEYS / 8; ++n) now = fmaxf(now, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
            now = quad_max(now);
            const float base = now == -INFINITY ? 0.0f : now * scale;
            const float shrink = highest[half] == -INFINITY ? 0.0f : power_of_two(highest[half] * scale - base);
            highest[half] = now;
            float add = 0.0f;
#pragma unroll
            for (int n = 0; n < FLASH_KEYS / 8; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float p = power_of_two(score[n][2 * half + c] * scale - base);
                    score[n][2 * half + c] = p;
                    add += p;
                }
            total[half] = total[half] * shrink + add;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                sum[n][2 * half] *= shrink;
                sum[n][2 * half + 1] *= shrink;
            }
        }
#pragma unroll
        for (int k = 0; k < FLASH_KEYS / 16; ++k) {
            const unsigned a0 = pack(score[2 * k][0], score[2 * k][1]), a1 = pack(score[2 * k][2], score[2 * k][3]);
            const unsigned a2 = pack(score[2 * k + 1][0], score[2 * k + 1][1]), a3 = pack(score[2 * k + 1][2], score[2 * k + 1][3]);
#pragma unroll
            for (int n = 0; n < D / 16; ++n) {
                unsigned b[4];
                ldmatrix_transposed(b, shared_address(&shared.values[tile % 2][k * 16 + (eighth % 2) * 8 + line][n * 16 + (eighth / 2) * 8]));
                mma(sum[2 * n], a0, a1, a2, a3, b[0], b[1]);
                mma(sum[2 * n + 1], a0, a1, a2, a3, b[2], b[3]);
            }
        }
        __syncthreads();
    }
    copy_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float whole = quad_sum(total[half]), inverse = whole > 0.0f ? 1.0f / whole : 0.0f;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const int d = n * 8 + (lane % 4) * 2;
            if (d < HEAD) write(rows[half], d, sum[n][2 * half] * inverse, sum[n][2 * half + 1] * inverse);
        }
    }
}
