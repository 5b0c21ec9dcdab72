// One step of a linear sampler with guidance and log-prob, for B rows of d elements, in one pass.
//
//     v = u + s (v_cond - u)        mean = a x + b v + c w        x' = mean + std eps
//     logp = -sum_i (x'_i - mean_i)^2 / (2 d std^2) - ln std - ln(2 pi) / 2
//
// To take the step it reads x, v_cond, u and eps and writes x': 5 values an element, one less where eps is drawn here
// (philox.h). To score one taken it reads x, v_cond, u and x': 4. Backward, with dmean = g_x' + g_logp (x' - mean) /
// (d std^2): it reads the same four again and writes b s dmean and b (1 - s) dmean, the gradients of v_cond and u: 6.
// w is the last step's estimate in multistep solvers. x, w, eps and x' may be float where v_cond and u are half.
// logp comes from the x' that is written, with its rounding, by the same instructions and in the same order whether
// the step is taken or scored, wherever a row lies: the ratio of a policy to itself is exactly 1.
#include <cstring>
#include "common.cuh"

template <typename V> constexpr int kEach = sizeof(V) == 2 ? 8 : 4;        // elements of a thread at a time

template <typename T> __device__ T* from(const void* p, int64_t i) { return p ? (T*)p + i : nullptr; }

template <typename... Ts> __device__ bool aligned(const Ts*... p) {
    return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

template <int N, bool packs> struct By {                                   // N elements, by 16 bytes or one by one
    static constexpr int size = N;
    static constexpr bool whole = packs;
};

// body(i, by) for the elements of a chunk of n, in one order however they lie: E at i, or four by four.
template <int E, typename F> __device__ void each(int n, bool packs, F body) {
    for (int i = threadIdx.x * E; i < n; i += blockDim.x * E) {
        if (packs && i + E <= n) {
            body(i, By<E, true>());
            continue;
        }
#pragma unroll 1
        for (int j = i; j < i + E; j += 4) body(j, By<4, false>());
    }
}

template <typename T, int N> struct Words {                                // N elements as they lie in memory
    uint32_t w[N * sizeof(T) / 4];
};

// The elements at i, so that nothing waits for them yet; zeros past n and where there is no tensor.
template <typename B, typename T> __device__ auto fetch(B, const T* p, int i, int n) {
    Pack<T, B::size> all{};
    Words<T, B::size> x{};
    if constexpr (B::whole) {
        if (!p) return x;
        all = load<B::size>(p + i);
    } else {
        for (int j = 0; j < B::size; ++j) if (p && i + j < n) all.v[j] = p[i + j];
    }
    memcpy(&x, &all, sizeof x);
    return x;
}

template <typename T, int N> __device__ Pack<acc_t<T>, N> widen(const Words<T, N>& x) {
    T all[N];
    memcpy(all, &x, sizeof x);
    Pack<acc_t<T>, N> wide;
    for (int j = 0; j < N; ++j) wide.v[j] = widen(all[j]);
    return wide;
}

template <typename B, typename T> __device__ void put(B, T* p, int i, int n, const Pack<acc_t<T>, B::size>& wide) {
    Pack<T, B::size> x;
    for (int j = 0; j < B::size; ++j) x.v[j] = narrow<T>(wide.v[j]);
    if constexpr (B::whole) store(p + i, x);
    else for (int j = 0; j < B::size; ++j) if (i + j < n) p[i + j] = x.v[j];
}

template <typename A, int E> __device__ Pack<A, E> drawn(const NoiseKey& key, int64_t row, int64_t i) {
    Pack<A, E> wide;
#pragma unroll
    for (int j = 0; j < E; j += 4) {
        auto z = normals(key, row, uint32_t((i + j) / 4));
        for (int k = 0; k < 4; ++k) wide.v[j + k] = z.v[k];
    }
    return wide;
}

template <typename X, typename V> struct Means {                           // of one chunk
    static constexpr int E = kEach<V>;
    using A = acc_t<V>;
    const X *x, *w;
    const V *cond, *uncond;
    A a, b, s, c;
    __device__ Means(const LinearStep& p, int64_t at)
        : x(from<const X>(p.x, at)), w(from<const X>(p.w, at)), cond(from<const V>(p.cond, at)),
          uncond(from<const V>(p.uncond, at)), a(p.a), b(p.b), s(p.scale), c(p.c) {}
    template <int N> struct Terms {
        Words<X, N> x, w;
        Words<V, N> cond, uncond;
    };
    template <typename B> __device__ Terms<B::size> terms(B by, int i, int n) const {
        return {fetch(by, x, i, n), fetch(by, w, i, n), fetch(by, cond, i, n), fetch(by, uncond, i, n)};
    }
    template <int N> __device__ Pack<A, N> operator()(const Terms<N>& t) const {
        auto px = widen(t.x), pw = widen(t.w);
        auto v = widen(t.cond), u = widen(t.uncond);
        Pack<A, N> mean;
        for (int j = 0; j < N; ++j) {
            A g = uncond ? fma(s, v.v[j] - u.v[j], u.v[j]) : v.v[j], m = b * g;
            if (w) m = fma(c, pw.v[j], m);
            mean.v[j] = fma(a, px.v[j], m);
        }
        return mean;
    }
};

template <typename A> struct LogProb {
    A* logp;
    double d, std;
    __device__ void operator()(int64_t row, double sum) const {
        logp[row] = A(-sum / (2 * d * std * std) - log(std) - 0.91893853320467274178);     // ln(2 pi) / 2
    }
};

template <typename X, typename V>
__global__ void __launch_bounds__(kThreads)
step(LinearStep p, acc_t<V>* partial, int64_t per_row, LogProb<acc_t<V>> finish) {
    constexpr int E = kEach<V>;
    using A = acc_t<V>;
    int64_t start = blockIdx.x % per_row * kChunk, row = blockIdx.x / per_row, at = row * p.d + start;
    int n = int(min(kChunk, p.d - start));
    Means<X, V> means(p, at);
    auto *eps = from<const X>(p.eps, at), *given = from<const X>(p.x_next, at);
    auto* out = from<X>(p.out, at);
    bool packs = aligned(means.x, means.w, means.cond, means.uncond, eps, given, out);
    A std = p.std, sum = 0;
    each<E>(n, packs, [&](int i, auto by) {
        constexpr int N = by.size;
        auto terms = means.terms(by, i, n);                                // all loads, then what waits for them
        auto other = fetch(by, given ? given : eps, i, n);
        auto mean = means(terms), next = mean;
        if (given) {
            next = widen(other);
            if (out) put(by, out, i, n, mean);
        } else {
            auto e = p.draw ? drawn<A, N>(p.key, row, start + i) : widen(other);
            if (eps || p.draw)
                for (int j = 0; j < N; ++j) next.v[j] = widen(narrow<X>(fma(std, e.v[j], mean.v[j])));
            put(by, out, i, n, next);
        }
        for (int j = 0; j < N; ++j) {
            A r = next.v[j] - mean.v[j];
            if (i + j < n) sum = fma(r, r, sum);
        }
    });
    if (!p.logp) return;
    sum = block_reduce(sum, [](auto x, auto y) { return x + y; });
    if (threadIdx.x) return;
    if (per_row == 1) finish(row, sum);
    else partial[blockIdx.x] = sum;
}

template <typename X, typename V>
__global__ void __launch_bounds__(kThreads) step_backward(LinearStep p, LinearStepGrads g, int64_t per_row) {
    constexpr int E = kEach<V>;
    using A = acc_t<V>;
    int64_t start = blockIdx.x % per_row * kChunk, row = blockIdx.x / per_row, at = row * p.d + start;
    int n = int(min(kChunk, p.d - start));
    Means<X, V> means(p, at);
    auto *g_out = from<const X>(g.out, at), *next = from<const X>(p.x_next, at);
    auto *dx = from<X>(g.x, at), *dw = from<X>(g.w, at);
    auto *dv = from<V>(g.cond, at), *du = from<V>(g.uncond, at);
    bool packs = aligned(means.x, means.w, means.cond, means.uncond, g_out, next, dx, dw, dv, du);
    A factor = g.logp ? A(double(((const A*)g.logp)[row]) / (double(p.d) * p.std * p.std)) : 0;
    if (!g.logp) means.x = means.w = next = nullptr, means.cond = means.uncond = nullptr;        // not read
    each<E>(n, packs, [&](int i, auto by) {
        constexpr int N = by.size;
        auto terms = means.terms(by, i, n);
        auto after = fetch(by, next, i, n), g_next = fetch(by, g_out, i, n);
        auto dmean = widen(g_next);
        if (g.logp) {
            auto mean = means(terms), to = widen(after);
            for (int j = 0; j < N; ++j) dmean.v[j] = fma(factor, to.v[j] - mean.v[j], dmean.v[j]);
        }
        auto give = [&](auto* to, double coefficient) {
            if (!to) return;
            auto scaled = dmean;
            for (int j = 0; j < N; ++j) scaled.v[j] *= A(coefficient);
            put(by, to, i, n, scaled);
        };
        give(dx, p.a), give(dw, p.c), give(dv, p.b * p.scale), give(du, p.b * (1 - p.scale));
    });
}

template <typename F> cudaError_t dispatch_pair(Dtype x, Dtype v, F f) {  // x's type is v's or the one that v widens to
    return dispatch(v, [&](auto* t) {
        using V = std::remove_pointer_t<decltype(t)>;
        if (x == v) f((V*)nullptr, t);
        else f((acc_t<V>*)nullptr, t);
    });
}

cudaError_t linear_step_cuda(Dtype x, Dtype v, const LinearStep& p, void* partial, cudaStream_t stream) {
    if (p.rows == 0) return cudaSuccess;
    return dispatch_pair(x, v, [&](auto* tx, auto* tv) {
        using X = std::remove_pointer_t<decltype(tx)>;
        using V = std::remove_pointer_t<decltype(tv)>;
        using A = acc_t<V>;
        int64_t per_row = chunks(p.d);
        LogProb<A> finish{(A*)p.logp, double(p.d), p.std};
        step<X, V><<<p.rows * per_row, kThreads, 0, stream>>>(p, (A*)partial, per_row, finish);
        if (per_row > 1 && p.logp) finish_rows((const A*)partial, p.rows, per_row, finish, stream);
    });
}

cudaError_t linear_step_backward_cuda(Dtype x, Dtype v, const LinearStep& p, const LinearStepGrads& g,
                                      cudaStream_t stream) {
    if (p.rows == 0 || p.d == 0) return cudaSuccess;
    return dispatch_pair(x, v, [&](auto* tx, auto* tv) {
        using X = std::remove_pointer_t<decltype(tx)>;
        using V = std::remove_pointer_t<decltype(tv)>;
        step_backward<X, V><<<p.rows * chunks(p.d), kThreads, 0, stream>>>(p, g, chunks(p.d));
    });
}
