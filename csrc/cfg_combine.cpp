// Classifier-free guidance, uncond + scale (cond - uncond), and its gradients: the maths is in cfg_combine.cu.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <ATen/EmptyTensor.h>
#include "common.h"

namespace {

Tensor forward_cpu(const Tensor& uncond, const Tensor& cond, double scale) {
    check_same("cfg_combine", uncond, cond);
    auto u = uncond.expect_contiguous(), c = cond.expect_contiguous();
    Tensor out = at::detail::empty_cpu(u->sizes(), u->scalar_type());
    DISPATCH(*u, "cfg_combine", [&] {
        using Vec = at::vec::Vectorized<at::opmath_type<scalar_t>>;
        auto *pu = u->const_data_ptr<scalar_t>(), *pc = c->const_data_ptr<scalar_t>();
        auto* po = out.mutable_data_ptr<scalar_t>();
        Vec s(scale);
        cpu::for_chunks(1, u->numel(), [&](int64_t, int64_t i, int64_t n) {
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

// Autograd, here rather than in Python: a small call is all overhead. Each of the two is the other's transpose, so that
// they can be differentiated any number of times.

using torch::autograd::AutogradContext, torch::autograd::variable_list;

template <typename F> auto find(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

Tensor combine(const Tensor& uncond, const Tensor& cond, double scale) {
    static auto op = find<Tensor(const Tensor&, const Tensor&, double)>("t2i::cfg_combine");
    return op.call(uncond, cond, scale);
}

std::tuple<Tensor, Tensor> split(const Tensor& grad, double scale) {
    static auto op = find<std::tuple<Tensor, Tensor>(const Tensor&, double)>("t2i::cfg_combine_backward");
    return op.call(grad, scale);
}

struct Combine : torch::autograd::Function<Combine> {
    static Tensor forward(AutogradContext* ctx, const Tensor& uncond, const Tensor& cond, double scale) {
        ctx->saved_data["scale"] = scale;
        at::AutoDispatchBelowADInplaceOrView below;
        return combine(uncond, cond, scale);
    }
    static variable_list backward(AutogradContext* ctx, variable_list grads) {
        double scale = ctx->saved_data["scale"].toDouble();
        if (!ctx->needs_input_grad(0)) return {Tensor(), grads[0].mul(scale), Tensor()};
        if (!ctx->needs_input_grad(1)) return {grads[0].mul(1 - scale), Tensor(), Tensor()};
        auto [uncond, cond] = split(grads[0], scale);
        return {uncond, cond, Tensor()};
    }
};

struct Split : torch::autograd::Function<Split> {
    static variable_list forward(AutogradContext* ctx, const Tensor& grad, double scale) {
        ctx->saved_data["scale"] = scale;
        at::AutoDispatchBelowADInplaceOrView below;
        auto [uncond, cond] = split(grad, scale);
        return {uncond, cond};
    }
    static variable_list backward(AutogradContext* ctx, variable_list grads) {
        return {combine(grads[0], grads[1], ctx->saved_data["scale"].toDouble()), Tensor()};
    }
};

bool followed(const Tensor& x) {                                           // Function refuses forward mode
    return (at::GradMode::is_enabled() && x.requires_grad()) || torch::autograd::isFwGradDefined(x);
}

Tensor combine_autograd(c10::DispatchKeySet keys, const Tensor& uncond, const Tensor& cond, double scale) {
    if (followed(uncond) || followed(cond)) return Combine::apply(uncond, cond, scale);
    static auto op = find<Tensor(const Tensor&, const Tensor&, double)>("t2i::cfg_combine");
    return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, uncond, cond, scale);
}

std::tuple<Tensor, Tensor> split_autograd(const Tensor& grad, double scale) {
    if (followed(grad)) {
        auto both = Split::apply(grad, scale);
        return {both[0], both[1]};
    }
    at::AutoDispatchBelowADInplaceOrView below;
    return split(grad, scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(t2i, m) {
    m.def("cfg_combine(Tensor uncond, Tensor cond, float scale) -> Tensor", {at::Tag::pt2_compliant_tag});
    m.def("cfg_combine_backward(Tensor grad, float scale) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(t2i, Autograd, m) {
    m.impl("cfg_combine", combine_autograd);
    m.impl("cfg_combine_backward", split_autograd);
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
