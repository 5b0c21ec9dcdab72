// DGPO's loss, mean_g log(1 + exp z_g), and dL/dl_i, all that its gradient needs: the maths is in dgpo_loss.cu.
#include "common.h"

namespace {

void check(const Tensor& dsm, const Tensor& dsm_ref, const Tensor& adv, int64_t group_size) {
    check_same("dgpo_loss", dsm, dsm_ref), check_same("dgpo_loss", dsm, adv);
    TORCH_CHECK_VALUE(dsm.dim() == 1 && group_size > 0 && dsm.numel() % group_size == 0, "dgpo_loss: dsm ",
                      dsm.sizes(), ", group_size ", group_size, ".");
}

template <typename T> double margin(const T* l, const T* ref, const T* adv, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += double(adv[i]) * (double(l[i]) - double(ref[i]));
    return sum;
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& dsm, const Tensor& dsm_ref, const Tensor& adv, int64_t group_size,
                                       double beta) {
    check(dsm, dsm_ref, adv, group_size);
    auto l = dsm.contiguous(), r = dsm_ref.contiguous(), a = adv.contiguous();
    auto loss = at::empty({}, wide(l)), weight = at::empty(l.sizes(), wide(l));
    int64_t groups = l.numel() / group_size;
    DISPATCH(l, "dgpo_loss", [&] {
        using A = at::opmath_type<scalar_t>;
        auto *pl = l.const_data_ptr<scalar_t>(), *pr = r.const_data_ptr<scalar_t>();
        auto* pa = a.const_data_ptr<scalar_t>();
        auto* out = weight.mutable_data_ptr<A>();
        double total = 0;
        for (int64_t k = 0; k < groups; ++k, pl += group_size, pr += group_size, pa += group_size, out += group_size) {
            double z = beta / group_size * margin(pl, pr, pa, group_size);
            double slope = 1 / (1 + std::exp(-z)) * beta / (groups * group_size);
            for (int64_t i = 0; i < group_size; ++i) out[i] = A(slope * A(pa[i]));
            total += (z > 0 ? z : 0) + std::log1p(std::exp(-std::abs(z)));
        }
        *loss.mutable_data_ptr<A>() = A(total / groups);
    });
    return {loss, weight};
}

#ifdef WITH_CUDA
std::tuple<Tensor, Tensor> forward_cuda(const Tensor& dsm, const Tensor& dsm_ref, const Tensor& adv, int64_t group_size,
                                        double beta) {
    check(dsm, dsm_ref, adv, group_size);
    c10::cuda::CUDAGuard guard(dsm.device());
    auto l = dsm.contiguous(), r = dsm_ref.contiguous(), a = adv.contiguous();
    auto loss = at::empty({}, wide(l)), weight = at::empty(l.sizes(), wide(l));
    C10_CUDA_CHECK(dgpo_loss_cuda(code(l), l.const_data_ptr(), r.const_data_ptr(), a.const_data_ptr(),
                                  loss.mutable_data_ptr(), weight.mutable_data_ptr(), l.numel(), group_size, beta,
                                  stream(l)));
    return {loss, weight};
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(t2i, m) {
    m.def("dgpo_loss(Tensor dsm, Tensor dsm_ref, Tensor adv, int group_size, float beta)"
          " -> (Tensor loss, Tensor weight)", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(t2i, CPU, m) { m.impl("dgpo_loss", forward_cpu); }
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(t2i, CUDA, m) { m.impl("dgpo_loss", forward_cuda); }
#endif
