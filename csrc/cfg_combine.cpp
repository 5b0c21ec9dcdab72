// Classifier-free guidance, uncond + scale (cond - uncond), and its gradients: the maths is in cfg_combine.cu.
#include "common.h"

namespace {

Tensor forward_cpu(const Tensor& uncond, const Tensor& cond, double scale) {
    check_same("cfg_combine", uncond, cond);
    auto u = uncond.contiguous(), c = cond.contiguous();
    auto out = at::empty(u.sizes(), u.options());
    DISPATCH(u, "cfg_combine", [&] {
        using Vec = at::vec::Vectorized<at::opmath_type<scalar_t>>;
        auto *pu = u.const_data_ptr<scalar_t>(), *pc = c.const_data_ptr<scalar_t>();
        auto* po = out.mutable_data_ptr<scalar_t>();
        Vec s(scale);
        cpu::for_chunks(1, u.numel(), [&](int64_t, int64_t i, int64_t n) {
            at::vec::map2([s](Vec a, Vec b) { return at::vec::fmadd(s, b - a, a); }, po + i, pu + i, pc + i, n);
        });
    });
    return out;
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad, double scale) {
    auto g = grad.contiguous();
    auto du = at::empty(g.sizes(), g.options()), dc = at::empty(g.sizes(), g.options());
    DISPATCH(g, "cfg_combine_backward", [&] {
        using Vec = at::vec::Vectorized<at::opmath_type<scalar_t>>;
        auto* pg = g.const_data_ptr<scalar_t>();
        auto *pu = du.mutable_data_ptr<scalar_t>(), *pc = dc.mutable_data_ptr<scalar_t>();
        Vec s(scale), r(1 - scale);
        cpu::for_chunks(1, g.numel(), [&](int64_t, int64_t i, int64_t n) {
            at::vec::map([r](Vec a) { return a * r; }, pu + i, pg + i, n);
            at::vec::map([s](Vec a) { return a * s; }, pc + i, pg + i, n);      // grad comes from the cache this time
        });
    });
    return {du, dc};
}

#ifdef WITH_CUDA
Tensor forward_cuda(const Tensor& uncond, const Tensor& cond, double scale) {
    check_same("cfg_combine", uncond, cond);
    c10::cuda::CUDAGuard guard(uncond.device());
    auto u = uncond.contiguous(), c = cond.contiguous();
    auto out = at::empty(u.sizes(), u.options());
    C10_CUDA_CHECK(cfg_combine_cuda(code(u), u.const_data_ptr(), c.const_data_ptr(), out.mutable_data_ptr(), u.numel(),
                                    scale, stream(u)));
    return out;
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad, double scale) {
    c10::cuda::CUDAGuard guard(grad.device());
    auto g = grad.contiguous();
    auto du = at::empty(g.sizes(), g.options()), dc = at::empty(g.sizes(), g.options());
    C10_CUDA_CHECK(cfg_combine_backward_cuda(code(g), g.const_data_ptr(), du.mutable_data_ptr(), dc.mutable_data_ptr(),
                                             g.numel(), scale, stream(g)));
    return {du, dc};
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(t2i, m) {
    m.def("cfg_combine(Tensor uncond, Tensor cond, float scale) -> Tensor", {at::Tag::pt2_compliant_tag});
    m.def("cfg_combine_backward(Tensor grad, float scale) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(t2i, CPU, m) {
    m.impl("cfg_combine", forward_cpu);
    m.impl("cfg_combine_backward", backward_cpu);
}
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(t2i, CUDA, m) {
    m.impl("cfg_combine", forward_cuda);
    m.impl("cfg_combine_backward", backward_cuda);
}
#endif
