// Group-relative advantages (r - mean) / (std + 1e-4), NaN left out, and SLAS's shape: the maths is in
// group_advantage.cu. Advantages are constants: there is no gradient.
#include "common.h"
#include "group_advantage.h"

namespace {

Shaping check(const Tensor& reward, int64_t group_size, int64_t by, double gamma, bool recenter, bool after,
              double clip) {
    TORCH_CHECK_VALUE(reward.dim() == 1 && group_size > 0 && reward.numel() % group_size == 0 && by >= 0 && by <= 3,
                      "group_advantage: reward ", reward.sizes(), ", group_size ", group_size, ", by ", by, ".");
    return {Shaping::By(by), gamma, recenter, after, clip};
}

struct Moments { double low, mean, std; };                                 // mean: of r - low

template <typename T> Moments moments(const T* r, int64_t n) {            // NaN compares false with everything
    double low = std::numeric_limits<double>::infinity(), count = 0, first = 0, second = 0;
#pragma omp simd reduction(min : low) reduction(+ : count)
    for (int64_t i = 0; i < n; ++i) {
        double x = r[i];
        low = x < low ? x : low, count += x == x ? 1 : 0;
    }
#pragma omp simd reduction(+ : first)
    for (int64_t i = 0; i < n; ++i) {
        double x = r[i];
        first += x == x ? x - low : 0;
    }
    double mean = first / count;
#pragma omp simd reduction(+ : second)
    for (int64_t i = 0; i < n; ++i) {
        double x = r[i], e = x - low - mean;
        second += x == x ? e * e : 0;
    }
    return {low, mean, std::sqrt(second / count)};
}

template <typename T> void deviations(const T* r, double by, double* dr, int64_t n, bool own) {        // own std
    auto m = moments(r, n);
    if (own) by = m.std + 1e-4;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        double x = r[i], d = (x - m.low - m.mean) / by;
        dr[i] = x == x ? d : 0;
    }
}

// Population std + 1e-4 of the n values in x whose reward is there.
template <typename T> double spread(const T* r, const double* x, int64_t n) {
    double count = 0, sum = 0, squares = 0;
#pragma omp simd reduction(+ : count, sum, squares)
    for (int64_t i = 0; i < n; ++i) {
        bool valid = r[i] == r[i];
        double y = valid ? x[i] : 0;
        count += valid ? 1 : 0, sum += y, squares += y * y;
    }
    double mean = sum / count, var = squares / count - mean * mean;
    return std::sqrt(var < 0 ? 0 : var) + 1e-4;
}

// |dr|^gamma (dr - lam) in place, for one group.
template <typename T> void shape_group(const T* r, double* dr, double* weight, int64_t n, const Shaping& shape) {
    using Vec = at::vec::Vectorized<double>;
    Vec power(shape.gamma);
    if (shape.gamma == 0) std::fill(weight, weight + n, 1.0);
    else if (shape.gamma == 1) at::vec::map([](Vec x) { return x.abs(); }, weight, dr, n);
    else at::vec::map([power](Vec x) { return x.abs().pow(power); }, weight, dr, n);
    double sum = 0, total = 0;
    if (shape.recenter) {
#pragma omp simd reduction(+ : sum, total)
        for (int64_t i = 0; i < n; ++i) {
            double w = r[i] == r[i] ? weight[i] : 0;
            sum += w * dr[i], total += w;
        }
    }
    double lam = sum / (total < 1e-30 ? 1e-30 : total);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        double shaped = weight[i] * (dr[i] - lam);
        dr[i] = r[i] == r[i] ? shaped : 0;
    }
}

template <typename T> void scale(const T* r, double by, double* x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = r[i] == r[i] ? x[i] / by : 0;
}

Tensor forward_cpu(const Tensor& reward, int64_t group_size, int64_t by, double gamma, bool recenter, bool after,
                   double clip) {
    auto shape = check(reward, group_size, by, gamma, recenter, after, clip);
    auto contiguous = reward.to(wide(reward)).contiguous();                // a copy only of bfloat16 and float16
    auto out = at::empty(contiguous.sizes(), contiguous.options());
    AT_DISPATCH_FLOATING_TYPES(contiguous.scalar_type(), "group_advantage", [&] {
        auto* r = contiguous.const_data_ptr<scalar_t>();
        std::vector<double> rows(contiguous.numel());
        auto* adv = rows.data();
        int64_t n = contiguous.numel();
        auto for_groups = [&](auto f) {
            at::parallel_for(0, n / group_size, std::max<int64_t>(1, cpu::kGrain / group_size), f);
        };
        double by = shape.by == Shaping::batch ? moments(r, n).std + 1e-4 : 1;
        for_groups([&](int64_t begin, int64_t end) {
            for (int64_t i = begin * group_size; i < end * group_size; i += group_size)
                deviations(r + i, by, adv + i, group_size, shape.by == Shaping::group);
        });
        if (shape.by == Shaping::centred) scale(r, spread(r, adv, n), adv, n);
        if (shape.gamma || shape.recenter) for_groups([&](int64_t begin, int64_t end) {
            std::vector<double> weight(group_size);
            for (int64_t i = begin * group_size; i < end * group_size; i += group_size)
                shape_group(r + i, adv + i, weight.data(), group_size, shape);
        });
        if (shape.after) scale(r, spread(r, adv, n), adv, n);
        auto* to = out.mutable_data_ptr<scalar_t>();
        double c = shape.clip;
        for (int64_t i = 0; i < n; ++i) to[i] = scalar_t(adv[i] < -c ? -c : adv[i] > c ? c : adv[i]);   // NaN stays
    });
    return out;
}

#ifdef WITH_CUDA
Tensor forward_cuda(const Tensor& reward, int64_t group_size, int64_t by, double gamma, bool recenter, bool after,
                    double clip) {
    auto shape = check(reward, group_size, by, gamma, recenter, after, clip);
    c10::cuda::CUDAGuard guard(reward.device());
    auto r = reward.contiguous();
    auto adv = at::empty(r.sizes(), wide(r)), room = at::empty(r.sizes(), r.options().dtype(at::kDouble));
    C10_CUDA_CHECK(group_advantage_cuda(code(r), r.const_data_ptr(), room.mutable_data_ptr(), adv.mutable_data_ptr(),
                                        r.numel(), group_size, shape, stream(r)));
    return adv;
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(t2i, m) {
    m.def("group_advantage(Tensor reward, int group_size, int by, float gamma, bool recenter, bool after, float clip)"
          " -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(t2i, CPU, m) { m.impl("group_advantage", forward_cpu); }
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(t2i, CUDA, m) { m.impl("group_advantage", forward_cuda); }
#endif
