// Group-relative advantages of B rewards, G in a row to a group. NaN marks a failed sample: it counts nowhere, gets 0.
//
//     A_i = (r_i - mean_g r) / (std + 1e-4)      std: population std of the group, of the batch, or no division
//
// Reads r, writes A: sizeof(T) + 4 bytes per reward from memory, further sweeps over a group hit the
// cache; the batch std reads r once more. For thousands of rewards the time is that of a launch, two for the batch std.
// Sums are double. The lowest reward is taken off before they are averaged: a constant group gives exactly 0.
#include "common.cuh"

struct Moments { double low, mean, std; };                                 // mean: of r - low

template <typename T> __device__ Moments moments(const T* r, int64_t n) {  // of the n rewards at r, by one block
    auto sum = [](double x, double y) { return x + y; };
    double low = INFINITY, count = 0, first = 0, second = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        double x = widen(r[i]);
        if (x == x) low = min(low, x), count += 1;
    }
    low = block_reduce(low, [](double x, double y) { return min(x, y); });
    count = block_reduce(count, sum);
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        double x = widen(r[i]);
        if (x == x) first += x - low;
    }
    double mean = block_reduce(first, sum) / count;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        double x = widen(r[i]), e = x - low - mean;
        if (x == x) second += e * e;
    }
    return {low, mean, sqrt(block_reduce(second, sum) / count)};
}

template <typename T> __global__ void batch_moments(const T* r, double* std, int64_t b) {
    double s = moments(r, b).std;
    if (threadIdx.x == 0) *std = s;
}

template <typename T>                                                      // one block a group; mode as in the .cpp
__global__ void advantages(const T* r, const double* batch_std, acc_t<T>* adv, int64_t group_size, int mode) {
    r += blockIdx.x * group_size, adv += blockIdx.x * group_size;
    auto m = moments(r, group_size);
    double by = mode == 2 ? 1 : (mode == 1 ? *batch_std : m.std) + 1e-4;
    for (int64_t i = threadIdx.x; i < group_size; i += blockDim.x) {
        double x = widen(r[i]);
        adv[i] = acc_t<T>(x == x ? (x - m.low - m.mean) / by : 0);
    }
}

cudaError_t group_advantage_cuda(Dtype dtype, const void* reward, void* batch_std, void* adv, int64_t b,
                                 int64_t group_size, int mode, cudaStream_t stream) {
    if (b == 0) return cudaSuccess;
    return dispatch(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        auto* r = (const T*)reward;
        auto* s = (double*)batch_std;
        if (mode == 1) batch_moments<T><<<1, 1024, 0, stream>>>(r, s, b);
        if (cudaPeekAtLastError() != cudaSuccess) return;                  // reported by dispatch
        int threads = group_size >= kThreads ? kThreads : int(group_size + 31) / 32 * 32;
        advantages<T><<<b / group_size, threads, 0, stream>>>(r, s, (acc_t<T>*)adv, group_size, mode);
    });
}
