// Group-relative advantages of B rewards, G in a row to a group. NaN marks a failed sample: it counts nowhere, gets 0.
//
//     dr_i = (r_i - mean_g r) / (std + 1e-4)     std: population std of the group, of all r, of all r - mean_g r, or 1
//     A_i = |dr_i|^gamma (dr_i - lam_g)          lam = 0, or sum_g |dr|^gamma dr / sum_g |dr|^gamma
//     A_i / (std A + 1e-4) if asked, then cut to [-clip, clip]
//
// One launch. Reads r, writes A: sizeof(T) + 4 bytes per reward from memory; what lies between hits the cache, and for
// thousands of rewards the time is the launch's. A warp takes a group. One block does all where the whole batch's std
// is asked for: that suits the batches there are, up to some ten thousand; beyond, one sweep on one SM sets the time.
// Sums are double. The lowest reward is taken off before they are averaged: a constant group gives exactly 0.
#include "common.cuh"

struct Moments { double low, mean, std; };                                 // mean: of r - low

// Of r[first], r[first + stride] ..., combined over the threads by reduce.
template <typename T, typename Reduce>
__device__ Moments moments(const T* r, int64_t n, int first, int stride, Reduce reduce) {
    auto sum = [](double x, double y) { return x + y; };
    double low = INFINITY, count = 0, total = 0, squares = 0;
    for (int64_t i = first; i < n; i += stride) {
        double x = widen(r[i]);
        if (x == x) low = min(low, x), count += 1;
    }
    low = reduce(low, [](double x, double y) { return min(x, y); });
    count = reduce(count, sum);
    for (int64_t i = first; i < n; i += stride) {
        double x = widen(r[i]);
        if (x == x) total += x - low;
    }
    double mean = reduce(total, sum) / count;
    for (int64_t i = first; i < n; i += stride) {
        double x = widen(r[i]), e = x - low - mean;
        if (x == x) squares += e * e;
    }
    return {low, mean, sqrt(reduce(squares, sum) / count)};
}

struct Spread {                                                            // of what the block's threads have seen
    double count = 0, sum = 0, squares = 0;
    __device__ void see(double x) { count += 1, sum += x, squares += x * x; }
    __device__ double std() const {
        auto add = [](double x, double y) { return x + y; };
        double n = block_reduce(count, add), mean = block_reduce(sum, add) / n;
        double var = block_reduce(squares, add) / n - mean * mean;
        return sqrt(var < 0 ? 0 : var);                                    // not max, which would make 0 of NaN
    }
};

template <typename T>                                                      // x: room for the groups' deviations
__global__ void __launch_bounds__(1024)
advantages(const T* r, double* x, acc_t<T>* adv, int64_t groups, int64_t group_size, Shaping shape) {
    auto in_block = [](auto x, auto op) { return block_reduce(x, op); };
    auto in_warp = [](auto x, auto op) { return warp_reduce(x, op); };
    auto add = [](double x, double y) { return x + y; };
    int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    auto for_groups = [&](auto f) {                                        // f(the group's first): alike in every pass,
        for (int64_t k = int64_t(blockIdx.x) * warps + threadIdx.x / 32; k < groups; k += int64_t(gridDim.x) * warps)
            f(k * group_size);
    };
    auto for_valid = [&](int64_t first, auto f) {                          // so that a thread reads what it wrote
        for (int64_t i = first + lane; i < first + group_size; i += 32) if (widen(r[i]) == widen(r[i])) f(i);
    };
    double by = 1;
    if (shape.by == Shaping::batch) by = moments(r, groups * group_size, threadIdx.x, blockDim.x, in_block).std + 1e-4;
    Spread centred, shaped;
    for_groups([&](int64_t first) {
        auto m = moments(r + first, group_size, lane, 32, in_warp);
        double own = shape.by == Shaping::group ? m.std + 1e-4 : by;
        for_valid(first, [&](int64_t i) { centred.see(x[i] = (widen(r[i]) - m.low - m.mean) / own); });
    });
    by = shape.by == Shaping::centred ? centred.std() + 1e-4 : 1;
    auto weight = [gamma = shape.gamma](double d) {
        return gamma == 0 ? 1 : gamma == 1 ? fabs(d) : pow(fabs(d), gamma);
    };
    for_groups([&](int64_t first) {
        double lam = 0, weights = 0;
        if (shape.recenter) {
            for_valid(first, [&](int64_t i) { double d = x[i] / by, w = weight(d); lam += w * d, weights += w; });
            lam = warp_reduce(lam, add) / max(warp_reduce(weights, add), 1e-30);
        }
        for_valid(first, [&](int64_t i) { double d = x[i] / by; shaped.see(x[i] = weight(d) * (d - lam)); });
    });
    by = shape.after ? shaped.std() + 1e-4 : 1;
    double clip = shape.clip;
    for_groups([&](int64_t first) {
        for (int64_t i = first + lane; i < first + group_size; i += 32) adv[i] = 0;
        for_valid(first, [&](int64_t i) {
            double a = x[i] / by;
            adv[i] = acc_t<T>(a < -clip ? -clip : a > clip ? clip : a);    // NaN stays
        });
    });
}

cudaError_t group_advantage_cuda(Dtype dtype, const void* reward, void* room, void* adv, int64_t b, int64_t group_size,
                                 const Shaping& shape, cudaStream_t stream) {
    if (b == 0) return cudaSuccess;
    return dispatch(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        int64_t groups = b / group_size, warps = shape.whole_batch() ? 32 : 4;
        int64_t blocks = shape.whole_batch() ? 1 : (groups + warps - 1) / warps;
        advantages<T><<<blocks, 32 * warps, 0, stream>>>((const T*)reward, (double*)room, (acc_t<T>*)adv, groups,
                                                         group_size, shape);
    });
}
