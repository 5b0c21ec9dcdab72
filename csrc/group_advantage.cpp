// Group-relative advantages (r - mean) / (std + 1e-4), NaN left out: the maths is in group_advantage.cu.
// mode says which std divides: 0 the group's, 1 the batch's, 2 none. Advantages are constants: there is no gradient.
#include "common.h"

namespace {

void check(const Tensor& reward, int64_t group_size, int64_t mode) {
    TORCH_CHECK_VALUE(reward.dim() == 1 && group_size > 0 && reward.numel() % group_size == 0 && mode >= 0 && mode <= 2,
                      "group_advantage: reward ", reward.sizes(), ", group_size ", group_size, ", mode ", mode, ".");
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

template <typename T> void advantages(const T* r, double batch_std, T* adv, int64_t n, int64_t mode) {
    auto m = moments(r, n);
    double by = mode == 2 ? 1 : (mode == 1 ? batch_std : m.std) + 1e-4;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        double x = r[i], a = (x - m.low - m.mean) / by;
        adv[i] = T(x == x ? a : 0);
    }
}

Tensor forward_cpu(const Tensor& reward, int64_t group_size, int64_t mode) {
    check(reward, group_size, mode);
    auto r = reward.to(wide(reward)).contiguous();                         // a copy only of bfloat16 and float16
    auto adv = at::empty(r.sizes(), r.options());
    AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "group_advantage", [&] {
        auto* in = r.const_data_ptr<scalar_t>();
        auto* out = adv.mutable_data_ptr<scalar_t>();
        double batch_std = mode == 1 ? moments(in, r.numel()).std : 0;
        int64_t grain = std::max<int64_t>(1, cpu::kGrain / group_size);
        at::parallel_for(0, r.numel() / group_size, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * group_size; i < end * group_size; i += group_size)
                advantages(in + i, batch_std, out + i, group_size, mode);
        });
    });
    return adv;
}

#ifdef WITH_CUDA
Tensor forward_cuda(const Tensor& reward, int64_t group_size, int64_t mode) {
    check(reward, group_size, mode);
    c10::cuda::CUDAGuard guard(reward.device());
    auto r = reward.contiguous();
    auto adv = at::empty(r.sizes(), wide(r)), batch_std = at::empty({1}, r.options().dtype(at::kDouble));
    C10_CUDA_CHECK(group_advantage_cuda(code(r), r.const_data_ptr(), batch_std.mutable_data_ptr(),
                                        adv.mutable_data_ptr(), r.numel(), group_size, int(mode), stream(r)));
    return adv;
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(t2i, m) {
    m.def("group_advantage(Tensor reward, int group_size, int mode) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(t2i, CPU, m) { m.impl("group_advantage", forward_cpu); }
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(t2i, CUDA, m) { m.impl("group_advantage", forward_cuda); }
#endif
