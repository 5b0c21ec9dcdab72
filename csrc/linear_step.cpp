// A sampler's step with guidance and log-prob, x' = a x + b v + c w + std eps, and its gradients: the maths is in
// linear_step.cu. Here blocks of 1024 elements are brought to float (double for double), worked on in the cache, and
// stored; that the ratio of a policy to itself is exactly 1 rests on -ffp-contract=off and on the blocks' fixed order.
#include "common.h"
#include "linear_step.h"

namespace {

using OptTensor = std::optional<Tensor>;

// The tensors of a step and what the kernels ask about them. Absent ones are undefined.
struct Inputs {
    Tensor x, cond, uncond, w, eps, x_next;
    Inputs(const Tensor& x, const OptTensor& cond, const OptTensor& uncond, const OptTensor& w, const OptTensor& eps,
           const OptTensor& x_next)
        : x(x.contiguous()), cond(take(cond, true)), uncond(take(uncond, true)), w(take(w, false)),
          eps(take(eps, false)), x_next(take(x_next, false)) {
        TORCH_CHECK_VALUE(x.dim() >= 2, "linear_step: (B, ...) is needed, not ", x.sizes(), ".");
        if (uncond) check_same("linear_step", this->cond, this->uncond);
    }
    Tensor take(const OptTensor& other, bool half) const {
        if (!other) return {};
        bool same = other->sizes() == x.sizes() && other->device() == x.device();
        bool fits = other->scalar_type() == x.scalar_type() ||
                    (half && x.scalar_type() == at::kFloat && other->scalar_type() != at::kDouble);
        TORCH_CHECK_VALUE(same && fits, "linear_step: x ", x.toString(), x.sizes(), " on ", x.device(), " and ",
                          other->toString(), other->sizes(), " on ", other->device(), ".");
        return other->contiguous();
    }
    const Tensor& v() const { return cond.defined() ? cond : x; }          // says the network's dtype
    int64_t rows() const { return x.size(0); }
    int64_t d() const { return rows() ? x.numel() / rows() : 0; }
    static const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
    LinearStep step(double a, double b, double scale, double c, double std) const {
        return {data(x), data(cond), data(uncond), data(w), data(eps), data(x_next), a, b, scale, c, std, rows(), d(),
                false, {}, nullptr, nullptr};
    }
};

// f(a null pointer of x's type, one of v's)
template <typename F> void dispatch_pair(const Tensor& x, const Tensor& v, F f) {
    DISPATCH(v, "linear_step", [&] {
        if (x.scalar_type() == v.scalar_type()) f((scalar_t*)nullptr, (scalar_t*)nullptr);
        else f((at::opmath_type<scalar_t>*)nullptr, (scalar_t*)nullptr);
    });
}

constexpr int64_t kBlock = 1024;

// n elements in A: where they lie, or brought to `room`; null stays null.
template <typename A, typename T> const A* widen(const T* p, int64_t n, A* room) {
    if constexpr (std::is_same_v<A, T>) {
        return p;
    } else {
        using Vec = at::vec::Vectorized<T>;
        constexpr int64_t half = Vec::size() / 2;
        for (int64_t i = 0; p && i < n; i += Vec::size()) {
            int64_t m = std::min<int64_t>(Vec::size(), n - i);
            auto [low, high] = at::vec::convert_to_float<T>(Vec::loadu(p + i, m));
            low.store(room + i, std::min(m, half));
            if (m > half) high.store(room + i + half, m - half);
        }
        return p ? room : nullptr;
    }
}

template <typename A, typename T> void narrow(const A* from, int64_t n, T* to) {
    using Vec = at::vec::Vectorized<A>;
    if constexpr (std::is_same_v<A, T>) {
        if (from != to) std::copy(from, from + n, to);
    } else {
        constexpr int64_t size = Vec::size();
        for (int64_t i = 0; i < n; i += 2 * size) {
            int64_t m = std::min(2 * size, n - i);
            auto low = Vec::loadu(from + i, std::min(m, size)), high = Vec(0);
            if (m > size) high = Vec::loadu(from + i + size, m - size);
            at::vec::convert_from_float<T>(low, high).store(to + i, m);
        }
    }
}

template <typename A, typename F> void for_vectors(int64_t n, F f) {       // f(i, how many of a vector's elements)
    constexpr int64_t size = at::vec::Vectorized<A>::size();
    for (int64_t i = 0; i < n; i += size) f(i, std::min(size, n - i));
}

template <typename T> const T* from(const void* p, int64_t i) { return p ? (const T*)p + i : nullptr; }

// One block's mean, a x + b v + c w with v = u + scale (cond - u), of m elements from `at`.
template <typename X, typename V> struct Means {
    using A = at::opmath_type<V>;
    using Vec = at::vec::Vectorized<A>;
    A mean[kBlock], rooms[4][kBlock];
    const A* operator()(const LinearStep& p, int64_t at, int64_t m) {
        const A *x = widen(from<X>(p.x, at), m, rooms[0]), *w = widen(from<X>(p.w, at), m, rooms[1]);
        const A *v = widen(from<V>(p.cond, at), m, rooms[2]), *u = widen(from<V>(p.uncond, at), m, rooms[3]);
        Vec a(p.a), b(p.b), s(p.scale), c(p.c);
        for_vectors<A>(m, [&](int64_t i, int64_t k) {
            Vec g = v ? Vec::loadu(v + i, k) : Vec(0);
            if (u) {
                Vec base = Vec::loadu(u + i, k);
                g = at::vec::fmadd(s, g - base, base);
            }
            g = b * g;
            if (w) g = at::vec::fmadd(c, Vec::loadu(w + i, k), g);
            at::vec::fmadd(a, Vec::loadu(x + i, k), g).store(mean + i, k);
        });
        return mean;
    }
};

template <typename A> double square_sum(const A* x, const A* y, int64_t n) {
    using Vec = at::vec::Vectorized<A>;
    Vec sum(0);
    for_vectors<A>(n, [&](int64_t i, int64_t k) {
        Vec r = Vec::loadu(x + i, k) - Vec::loadu(y + i, k);               // past the end both are 0
        sum = at::vec::fmadd(r, r, sum);
    });
    return at::vec::vec_reduce_all<A>([](Vec x, Vec y) { return x + y; }, sum);
}

template <typename A> const A* draw(const NoiseKey& key, int64_t row, int64_t i, int64_t n, A* room) {
    float z[kBlock];                                                       // i is a multiple of 4
#pragma omp simd
    for (int64_t j = 0; j < (n + 3) / 4; ++j) {
        auto four = normals(key, row, uint32_t(i / 4 + j));
        z[4 * j] = four.v[0], z[4 * j + 1] = four.v[1], z[4 * j + 2] = four.v[2], z[4 * j + 3] = four.v[3];
    }
    std::copy(z, z + n, room);
    return room;
}

template <typename X, typename V> void step_cpu(const LinearStep& p) {
    using A = at::opmath_type<V>;
    using Vec = at::vec::Vectorized<A>;
    int64_t per_row = cpu::chunks(p.d);
    std::vector<double> partial(p.rows * per_row);                         // the chunks' sums, added in order below
    cpu::for_chunks(p.rows, p.d, [&](int64_t row, int64_t start, int64_t n) {
        Means<X, V> means;
        A rooms[2][kBlock];
        Vec std(p.std);
        double sum = 0;
        for (int64_t i = start; i < start + n; i += kBlock) {
            int64_t at = row * p.d + i, m = std::min(kBlock, start + n - i);
            const A *mean = means(p, at, m), *next = widen(from<X>(p.x_next, at), m, rooms[0]);
            X* out = p.out ? (X*)p.out + at : nullptr;
            if (next) {
                if (out) narrow(mean, m, out);
            } else if (p.draw || p.eps) {
                auto* e = p.draw ? draw(p.key, row, i, m, rooms[1]) : widen(from<X>(p.eps, at), m, rooms[1]);
                A* to = std::is_same_v<A, X> ? (A*)out : rooms[0];
                for_vectors<A>(m, [&](int64_t i, int64_t k) {
                    at::vec::fmadd(std, Vec::loadu(e + i, k), Vec::loadu(mean + i, k)).store(to + i, k);
                });
                narrow(to, m, out);
                next = widen((const X*)out, m, rooms[0]);                  // as it was rounded
            } else {
                narrow(mean, m, out);
            }
            if (p.logp && next) sum += square_sum(next, mean, m);
        }
        partial[row * per_row + start / cpu::kChunk] = sum;
    });
    for (int64_t row = 0; p.logp && row < p.rows; ++row) {
        double sum = std::accumulate(&partial[row * per_row], &partial[row * per_row] + per_row, 0.0);
        ((A*)p.logp)[row] = A(-sum / (2 * double(p.d) * p.std * p.std) - std::log(p.std) - std::log(2 * M_PI) / 2);
    }
}

template <typename X, typename V> void backward_cpu(const LinearStep& p, const LinearStepGrads& g) {
    using A = at::opmath_type<V>;
    using Vec = at::vec::Vectorized<A>;
    cpu::for_chunks(p.rows, p.d, [&](int64_t row, int64_t start, int64_t n) {
        Means<X, V> means;
        A rooms[3][kBlock];
        Vec by(g.logp ? A(double(((const A*)g.logp)[row]) / (double(p.d) * p.std * p.std)) : A(0));
        for (int64_t i = start; i < start + n; i += kBlock) {
            int64_t at = row * p.d + i, m = std::min(kBlock, start + n - i);
            const A* dmean = widen(from<X>(g.out, at), m, rooms[0]);
            if (g.logp) {
                const A *mean = means(p, at, m), *next = widen(from<X>(p.x_next, at), m, rooms[1]);
                for_vectors<A>(m, [&](int64_t i, int64_t k) {
                    Vec r = Vec::loadu(next + i, k) - Vec::loadu(mean + i, k);
                    at::vec::fmadd(by, r, dmean ? Vec::loadu(dmean + i, k) : Vec(0)).store(rooms[2] + i, k);
                });
                dmean = rooms[2];
            }
            auto give = [&](auto* to, double coefficient) {
                using T = std::remove_pointer_t<decltype(to)>;
                if (!to) return;
                A* scaled = std::is_same_v<A, T> ? (A*)(to + at) : rooms[1];
                for_vectors<A>(m, [&](int64_t i, int64_t k) {
                    (Vec::loadu(dmean + i, k) * Vec(coefficient)).store(scaled + i, k);
                });
                narrow(scaled, m, to + at);
            };
            give((X*)g.x, p.a), give((X*)g.w, p.c), give((V*)g.cond, p.b * p.scale);
            give((V*)g.uncond, p.b * (1 - p.scale));
        }
    });
}

void run_cpu(const Inputs& in, const LinearStep& p) {
    dispatch_pair(in.x, in.v(), [&](auto* tx, auto* tv) {
        step_cpu<std::remove_pointer_t<decltype(tx)>, std::remove_pointer_t<decltype(tv)>>(p);
    });
}

void run_cpu(const Inputs& in, const LinearStep& p, const LinearStepGrads& g) {
    dispatch_pair(in.x, in.v(), [&](auto* tx, auto* tv) {
        backward_cpu<std::remove_pointer_t<decltype(tx)>, std::remove_pointer_t<decltype(tv)>>(p, g);
    });
}

#ifdef WITH_CUDA
void run_cuda(const Inputs& in, const LinearStep& p) {
    c10::cuda::CUDAGuard guard(in.x.device());
    auto partial = at::empty({p.logp ? p.rows * chunks(p.d) : 0}, wide(in.v()));
    C10_CUDA_CHECK(linear_step_cuda(code(in.x), code(in.v()), p, partial.mutable_data_ptr(), stream(in.x)));
}

void run_cuda(const Inputs& in, const LinearStep& p, const LinearStepGrads& g) {
    c10::cuda::CUDAGuard guard(in.x.device());
    C10_CUDA_CHECK(linear_step_backward_cuda(code(in.x), code(in.v()), p, g, stream(in.x)));
}
#endif

using Step = void (*)(const Inputs&, const LinearStep&);
using StepBackward = void (*)(const Inputs&, const LinearStep&, const LinearStepGrads&);

// key: nothing, or seed, step and the first image's number, which draw eps. mean: where x_next is scored, out is it.
template <Step run>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptTensor& cond, const OptTensor& uncond, const OptTensor& w,
                                   const OptTensor& eps, const OptTensor& x_next, double a, double b, double scale,
                                   double c, double std, at::IntArrayRef key, bool mean) {
    Inputs in(x, cond, uncond, w, eps, x_next);
    auto p = in.step(a, b, scale, c, std);
    bool scored = std > 0 && (eps || x_next || !key.empty());
    auto out = at::empty(x_next && !mean ? at::IntArrayRef{0} : x.sizes(), in.x.options());
    auto logp = at::empty({scored ? p.rows : 0}, wide(in.v()));
    p.out = x_next && !mean ? nullptr : out.mutable_data_ptr();
    p.logp = scored ? logp.mutable_data_ptr() : nullptr;
    TORCH_CHECK_VALUE(key.empty() || key.size() == 3, "linear_step: a key is (seed, step, image), not ", key, ".");
    if (!key.empty()) p.draw = true, p.key = {uint64_t(key[0]), uint32_t(key[1]), uint32_t(key[2])};
    run(in, p);
    return {out, logp};
}

// The gradients of x, cond, uncond and w: those that are wanted, the others empty.
template <StepBackward run>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const OptTensor& g_out, const OptTensor& g_logp, const Tensor& x, const OptTensor& cond, const OptTensor& uncond,
    const OptTensor& w, const OptTensor& x_next, double a, double b, double scale, double c, double std,
    at::IntArrayRef wanted) {
    Inputs in(x, cond, uncond, w, g_out, x_next);                          // g_out in the place of eps: x's like
    TORCH_CHECK_VALUE(wanted.size() == 4, "linear_step_backward: wanted says yes or no to four gradients.");
    TORCH_CHECK_VALUE(!g_logp || x_next, "linear_step_backward: g_logp wants x_next, which was scored.");
    if (g_logp) check_values("linear_step_backward", *g_logp, in.v());
    auto p = in.step(a, b, scale, c, std);
    std::vector<Tensor> grads;
    for (int i = 0; i < 4; ++i) {
        auto& like = i == 1 || i == 2 ? in.v() : x;
        grads.push_back(at::empty(wanted[i] ? x.sizes() : at::IntArrayRef{0}, like.options()));
    }
    auto to = [&](int i) { return wanted[i] ? grads[i].mutable_data_ptr() : nullptr; };
    auto logp = g_logp ? g_logp->contiguous() : Tensor();
    run(in, p, {p.eps, Inputs::data(logp), to(0), to(1), to(2), to(3)});
    return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(t2i, m) {
    m.def("linear_step(Tensor x, Tensor? cond, Tensor? uncond, Tensor? w, Tensor? eps, Tensor? x_next, float a, "
          "float b, float scale, float c, float std, int[] key, bool mean) -> (Tensor out, Tensor logp)",
          {at::Tag::pt2_compliant_tag});
    m.def("linear_step_backward(Tensor? g_out, Tensor? g_logp, Tensor x, Tensor? cond, Tensor? uncond, Tensor? w, "
          "Tensor? x_next, float a, float b, float scale, float c, float std, int[] wanted)"
          " -> (Tensor, Tensor, Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(t2i, CPU, m) {
    m.impl("linear_step", forward<run_cpu>);
    m.impl("linear_step_backward", backward<run_cpu>);
}
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(t2i, CUDA, m) {
    m.impl("linear_step", forward<run_cuda>);
    m.impl("linear_step_backward", backward<run_cuda>);
}
#endif
