// Classifier-free guidance in one pass, and its two gradients in another.
//
//     out = u + s (c - u)              reads u, c, writes out:     3 x sizeof(T) bytes per element
//     du  = (1 - s) g,   dc = s g      reads g, writes du, dc:     3 x sizeof(T) bytes per element
//
// No reuse and two flops per element: the time is the bytes over the memory's bandwidth.
#include "common.cuh"

template <typename T>
__global__ void __launch_bounds__(kThreads) combine(const T* u, const T* c, T* out, int64_t size, acc_t<T> s) {
    int64_t start = blockIdx.x * kChunk;
    int n = int(min(kChunk, size - start));
    u += start, c += start, out += start;
    auto value = [s](T a, T b) { return narrow<T>(fma(s, widen(b) - widen(a), widen(a))); };   // linear_step.cu's bits
    sweep<T>(n, head(n, u, c, out), [&](int i) { out[i] = value(u[i], c[i]); }, [&](int i) {
        Pack<T> a = load(u + i), b = load(c + i);
        for (int j = 0; j < a.size; ++j) a.v[j] = value(a.v[j], b.v[j]);
        store(out + i, a);
    });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) split(const T* g, T* du, T* dc, int64_t size, acc_t<T> s) {
    int64_t start = blockIdx.x * kChunk;
    int n = int(min(kChunk, size - start));
    g += start, du += start, dc += start;
    auto value = [](T a, acc_t<T> by) { return narrow<T>(widen(a) * by); };
    acc_t<T> r = 1 - s;
    sweep<T>(n, head(n, g, du, dc), [&](int i) { du[i] = value(g[i], r), dc[i] = value(g[i], s); }, [&](int i) {
        Pack<T> a = load(g + i), b;
        for (int j = 0; j < a.size; ++j) b.v[j] = value(a.v[j], s), a.v[j] = value(a.v[j], r);
        store(du + i, a), store(dc + i, b);
    });
}

cudaError_t cfg_combine_cuda(Dtype dtype, const void* uncond, const void* cond, void* out, int64_t n, double scale,
                             cudaStream_t stream) {
    if (n == 0) return cudaSuccess;
    return dispatch(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        combine<T><<<chunks(n), kThreads, 0, stream>>>((const T*)uncond, (const T*)cond, (T*)out, n, scale);
    });
}

cudaError_t cfg_combine_backward_cuda(Dtype dtype, const void* grad, void* grad_uncond, void* grad_cond, int64_t n,
                                      double scale, cudaStream_t stream) {
    if (n == 0) return cudaSuccess;
    return dispatch(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        split<T><<<chunks(n), kThreads, 0, stream>>>((const T*)grad, (T*)grad_uncond, (T*)grad_cond, n, scale);
    });
}
