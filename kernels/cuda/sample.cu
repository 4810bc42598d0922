// Draws with temperature, top-k, top-p and min-p, in this order, without a sort: logits are bf16, so one pass counts equal ones,
// thresholds come from the counts, and a second pass finds the token in order of id.
// Differs from the host's draws (executor/src/sampling) in two ways: weights are f32, and logits nearer to zero than 2^-20 count
// as one value.
#include "numeric.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
// Magnitudes from 2^-20 up to 2^12, 128 values an octave, for each sign.
constexpr int LOWEST_EXPONENT = 127 - 20;
constexpr int HALF = 32 * 128;
constexpr int BINS = 2 * HALF;
constexpr int OWN = BINS / THREADS;

// What the host decides about one row; temperature 0 leaves the greedy draw.
struct Draw {
    double uniform;
    float temperature, top_p, min_p;
    int top_k;
};

// Bins in descending order of logit.
__device__ __forceinline__ int bin_of(bf16 x) {
    const int bits = __bfloat16_as_ushort(x);
    const int magnitude = min(max((bits & 0x7fff) - LOWEST_EXPONENT * 128, 0), HALF - 1);
    return bits & 0x8000 ? HALF + magnitude : HALF - 1 - magnitude;
}
__device__ __forceinline__ float value_of(int bin) {
    const int magnitude = bin < HALF ? HALF - 1 - bin : bin - HALF;
    const unsigned short bits = magnitude == 0 ? 0 : magnitude + LOWEST_EXPONENT * 128;
    const float x = widen(__ushort_as_bfloat16(bits));
    return bin < HALF ? x : -x;
}

// Sum of `x` over all threads before this one; `total` over all.
template <typename T>
__device__ T before(T x, T& total, T* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    T sum = x;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const T other = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    T earlier = 0;
    total = 0;
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) earlier += scratch[w];
        total += scratch[w];
    }
    const T own = __shfl_up_sync(0xffffffffu, sum, 1);
    return earlier + (lane == 0 ? T(0) : own);
}

struct Shared {
    unsigned counts[BINS];
    double scratch[WARPS];
    int ties[WARPS];
    double sums[WARPS];
    int boundary;
    int kept_ties;
};

// logits [rows, width], winners [rows] (greedy draws, replaced), draws [rows]. Grid: x = row; block = 1024; dynamic shared
// memory: sizeof(Shared).
extern "C" __global__ void __launch_bounds__(THREADS) sample_rows(const bf16* logits, unsigned* winners, const Draw* draws,
                                                                  int width) {
    extern __shared__ char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Draw draw = draws[blockIdx.x];
    const unsigned winner = winners[blockIdx.x];
    if (draw.temperature <= 0.0f || winner == 0xffffffffu) return;
    const bf16* row = logits + size_t(blockIdx.x) * width;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float highest = value_of(bin_of(row[winner]));
    auto weight = [&](int bin) { return expf(value_of(bin) / draw.temperature - highest / draw.temperature); };

    for (int b = threadIdx.x; b < BINS; b += THREADS) shared.counts[b] = 0;
    if (threadIdx.x == 0) shared.boundary = BINS - 1;
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += THREADS) atomicAdd(&shared.counts[bin_of(row[i])], 1u);
    __syncthreads();

    // Each thread has OWN neighbouring bins. Top-k: the bin in which the k-th lies; all of it stays.
    int counts[OWN];
    int own_count = 0;
#pragma unroll
    for (int k = 0; k < OWN; ++k) own_count += counts[k] = shared.counts[threadIdx.x * OWN + k];
    if (draw.top_k > 0 && draw.top_k < width) {
        int all;
        int seen = before(own_count, all, reinterpret_cast<int*>(shared.scratch));
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            if (seen < draw.top_k && seen + counts[k] >= draw.top_k) shared.boundary = threadIdx.x * OWN + k;
            seen += counts[k];
        }
        __syncthreads();
    }
    const int last_of_k = shared.boundary;
    double mass = 0.0;
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
        const int b = threadIdx.x * OWN + k;
        if (b > last_of_k) counts[k] = 0;
        if (counts[k] > 0) mass += double(counts[k]) * weight(b);
    }
    double total;
    double seen = before(mass, total, shared.scratch);
    __syncthreads();
    // Top-p: a token stays if the ones at most as likely as it, itself included, hold more than 1 - p; of equal ones the first
    // stay. The likeliest always stays.
    if (threadIdx.x == 0) shared.kept_ties = 0x7fffffff;
    __syncthreads();
    if (draw.top_p < 1.0f) {
        const double limit = (1.0 - double(draw.top_p)) * total;
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            if (counts[k] == 0) continue;
            const int b = threadIdx.x * OWN + k;
            const double each = weight(b), from_here = total - seen, behind = from_here - counts[k] * each;
            const bool first_bin = seen <= 0.0;
            // The boundary is the last bin of which a token stays.
            if ((from_here > limit || first_bin) && behind <= limit) {
                int kept = counts[k];
                if (each > 0.0) kept -= min(kept, int(floor((limit - behind) / each)));
                shared.boundary = b;
                shared.kept_ties = max(kept, first_bin ? 1 : 0);
            }
            seen += counts[k] * each;
        }
    }
    __syncthreads();
    const int boundary = shared.boundary, kept_ties = shared.kept_ties;
    auto stays = [&](int bin) { return bin <= boundary && weight(bin) >= draw.min_p; };

    // Each warp has a run of ids.
    const int run = (width + WARPS - 1) / WARPS, from = warp * run, to = min(width, from + run);
    double sum = 0.0;
    int ties = 0;
    for (int i = from + lane; i < to; i += 32) {
        const int bin = bin_of(row[i]);
        if (!stays(bin)) continue;
        if (bin == boundary) ++ties; else sum += weight(bin);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        ties += __shfl_xor_sync(0xffffffffu, ties, distance);
    }
    if (lane == 0) {
        shared.sums[warp] = sum;
        shared.ties[warp] = ties;
    }
    __syncthreads();
    const double tie = weight(boundary);
    double earlier = 0.0, everything = 0.0;
    int ties_before = 0, all_ties = 0, last_warp = 0;
    for (int w = 0; w < WARPS; ++w) {
        const int left = kept_ties - all_ties, kept = min(shared.ties[w], left < 0 ? 0 : left);
        const double own = shared.sums[w] + kept * tie;
        if (w == warp) {
            earlier = everything;
            ties_before = all_ties;
        }
        if (own > 0.0) last_warp = w;
        everything += own;
        all_ties += shared.ties[w];
    }
    const int left = kept_ties - ties_before;
    const double mine = shared.sums[warp] + min(shared.ties[warp], left < 0 ? 0 : left) * tie;
    const double target = draw.uniform * everything;
    const bool here = target >= earlier && (target < earlier + mine || warp == last_warp) && mine > 0.0;
    if (!here) return;

    // The token whose share of the warp's run holds the target; the last one that stays if rounding leaves none.
    double reached = earlier;
    int rank = ties_before, answer = int(winner);
    for (int first = from; first < to; first += 32) {
        const int i = first + lane;
        const int bin = i < to ? bin_of(row[i]) : BINS;
        const bool in = i < to && stays(bin), is_tie = in && bin == boundary;
        const unsigned equal = __ballot_sync(0xffffffffu, is_tie);
        const bool kept = in && (!is_tie || rank + __popc(equal & ((1u << lane) - 1)) < kept_ties);
        double share = kept ? double(weight(bin)) : 0.0;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const double other = __shfl_up_sync(0xffffffffu, share, distance);
            if (lane >= distance) share += other;
        }
        const unsigned hit = __ballot_sync(0xffffffffu, kept && target < reached + share);
        const unsigned any = __ballot_sync(0xffffffffu, kept);
        if (any != 0) answer = first + 31 - __clz(any);
        if (hit != 0) {
            answer = first + __ffs(hit) - 1;
            break;
        }
        reached += __shfl_sync(0xffffffffu, share, 31);
        rank += __popc(equal);
    }
    if (lane == 0) winners[blockIdx.x] = unsigned(answer);
}
