// Proximal matching, ProxT2I Eq. (8), for B rows of d elements.
//
//     q_b = sum_i (p_bi - t_bi)^2 / (d zeta^2)       w_b = exp(-q_b)       loss_b = 1 - w_b = -expm1(-q_b)
//     dp_bi = g_b w_b 2 (p_bi - t_bi) / (d zeta^2)   dt_bi = -dp_bi
//
// Forward reads p and t: 2 x sizeof(T) bytes per element. Backward reads them once more and writes dp: 3 x sizeof(T).
// A row is cut into chunks that depend on d alone, and their sums are added in order: the same bits in every run,
// and, where rows are multiples of 16 bytes, whatever else is in the batch.
#include "common.cuh"

template <typename A> struct Loss {
    A *loss, *weight;
    double by;                                                             // 1 / (d zeta^2)
    __device__ void operator()(int64_t row, double sum) const {
        loss[row] = A(-expm1(-sum * by)), weight[row] = A(exp(-sum * by));
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
square_sums(const T* p, const T* t, acc_t<T>* partial, int64_t d, int64_t per_row, Loss<acc_t<T>> finish) {
    int64_t start = blockIdx.x % per_row * kChunk, row = blockIdx.x / per_row;
    int n = int(min(kChunk, d - start));
    p += row * d + start, t += row * d + start;
    acc_t<T> sum = 0;
    auto add = [&sum](T a, T b) { acc_t<T> e = widen(a) - widen(b); sum += e * e; };
    sweep<T>(n, head(n, p, t), [&](int i) { add(p[i], t[i]); }, [&](int i) {
        Pack<T> a = load(p + i), b = load(t + i);
        for (int j = 0; j < a.size; ++j) add(a.v[j], b.v[j]);
    });
    sum = block_reduce(sum, [](auto x, auto y) { return x + y; });
    if (threadIdx.x) return;
    if (per_row == 1) finish(row, sum);
    else partial[blockIdx.x] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
backward(const acc_t<T>* g, const T* p, const T* t, const acc_t<T>* weight, T* dp, int64_t d, int64_t per_row,
         double zeta) {
    int64_t start = blockIdx.x % per_row * kChunk, row = blockIdx.x / per_row;
    int n = int(min(kChunk, d - start));
    p += row * d + start, t += row * d + start, dp += row * d + start;
    acc_t<T> by = acc_t<T>(double(g[row]) * weight[row] * 2 / (double(d) * zeta * zeta));
    auto value = [by](T a, T b) { return narrow<T>(by * (widen(a) - widen(b))); };
    sweep<T>(n, head(n, p, t, dp), [&](int i) { dp[i] = value(p[i], t[i]); }, [&](int i) {
        Pack<T> a = load(p + i), b = load(t + i);
        for (int j = 0; j < a.size; ++j) a.v[j] = value(a.v[j], b.v[j]);
        store(dp + i, a);
    });
}

cudaError_t prox_matching_loss_cuda(Dtype dtype, const void* pred, const void* target, void* partial, void* loss,
                                    void* weight, int64_t rows, int64_t d, double zeta, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    return dispatch(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        using A = acc_t<T>;
        int64_t per_row = chunks(d);
        Loss<A> finish{(A*)loss, (A*)weight, 1 / (double(d) * zeta * zeta)};
        square_sums<T><<<rows * per_row, kThreads, 0, stream>>>((const T*)pred, (const T*)target, (A*)partial, d,
                                                                per_row, finish);
        if (per_row > 1) finish_rows((const A*)partial, rows, per_row, finish, stream);
    });
}

cudaError_t prox_matching_loss_backward_cuda(Dtype dtype, const void* grad, const void* pred, const void* target,
                                             const void* weight, void* grad_pred, int64_t rows, int64_t d, double zeta,
                                             cudaStream_t stream) {
    if (rows == 0 || d == 0) return cudaSuccess;
    return dispatch(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        using A = acc_t<T>;
        backward<T><<<rows * chunks(d), kThreads, 0, stream>>>((const A*)grad, (const T*)pred, (const T*)target,
                                                               (const A*)weight, (T*)grad_pred, d, chunks(d), zeta);
    });
}
