// Proximal matching, 1 - exp(-|pred - target|^2 / (d zeta^2)) for each sample: the maths is in prox_matching_loss.cu.
#include "common.h"

namespace {

int64_t row_size(const Tensor& x) { return x.size(0) ? x.numel() / x.size(0) : 0; }

void check(const Tensor& pred, const Tensor& target) {
    check_same("prox_matching_loss", pred, target);
    TORCH_CHECK_VALUE(pred.dim() >= 2, "prox_matching_loss: (B, ...) is needed, not ", pred.sizes(), ".");
}

// Sum of (p - t)^2 over a chunk. Blocks of 1024 keep the float sums short, so that little is lost to rounding.
template <typename T> double square_sum(const T* p, const T* t, int64_t n) {
    using Vec = at::vec::Vectorized<at::opmath_type<T>>;
    double sum = 0;
    auto square = [](Vec a, Vec b) { return (a - b) * (a - b); };
    auto add = [](Vec a, Vec b) { return a + b; };
    for (int64_t i = 0; i < n; i += 1024)
        sum += at::vec::map2_reduce_all<T>(square, add, p + i, t + i, std::min<int64_t>(1024, n - i));
    return sum;
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& pred, const Tensor& target, double zeta) {
    check(pred, target);
    auto p = pred.contiguous(), t = target.contiguous();
    int64_t rows = p.size(0), d = row_size(p), per_row = cpu::chunks(d);
    auto loss = at::empty({rows}, wide(p)), weight = at::empty({rows}, wide(p));
    std::vector<double> partial(rows * per_row);                           // the chunks' sums, added in order below
    DISPATCH(p, "prox_matching_loss", [&] {
        using A = at::opmath_type<scalar_t>;
        auto *pp = p.const_data_ptr<scalar_t>(), *pt = t.const_data_ptr<scalar_t>();
        cpu::for_chunks(rows, d, [&](int64_t row, int64_t start, int64_t n) {
            int64_t i = row * d + start;
            partial[row * per_row + start / cpu::kChunk] = square_sum(pp + i, pt + i, n);
        });
        for (int64_t row = 0; row < rows; ++row) {
            double sum = std::accumulate(&partial[row * per_row], &partial[row * per_row] + per_row, 0.0);
            double q = sum / (double(d) * zeta * zeta);
            loss.mutable_data_ptr<A>()[row] = A(-std::expm1(-q));
            weight.mutable_data_ptr<A>()[row] = A(std::exp(-q));
        }
    });
    return {loss, weight};
}

Tensor backward_cpu(const Tensor& grad, const Tensor& pred, const Tensor& target, const Tensor& weight, double zeta) {
    check(pred, target);
    check_values("prox_matching_loss_backward", grad, pred);
    check_values("prox_matching_loss_backward", weight, pred);
    auto g = grad.contiguous(), p = pred.contiguous(), t = target.contiguous(), w = weight.contiguous();
    auto dp = at::empty(p.sizes(), p.options());
    int64_t rows = p.size(0), d = row_size(p);
    if (p.numel() == 0) return dp;
    DISPATCH(p, "prox_matching_loss_backward", [&] {
        using A = at::opmath_type<scalar_t>;
        using Vec = at::vec::Vectorized<A>;
        auto *pp = p.const_data_ptr<scalar_t>(), *pt = t.const_data_ptr<scalar_t>();
        auto *pg = g.const_data_ptr<A>(), *pw = w.const_data_ptr<A>();
        auto* out = dp.mutable_data_ptr<scalar_t>();
        cpu::for_chunks(rows, d, [&](int64_t row, int64_t start, int64_t n) {
            Vec by(A(double(pg[row]) * pw[row] * 2 / (double(d) * zeta * zeta)));
            int64_t i = row * d + start;
            at::vec::map2([by](Vec a, Vec b) { return by * (a - b); }, out + i, pp + i, pt + i, n);
        });
    });
    return dp;
}

#ifdef WITH_CUDA
std::tuple<Tensor, Tensor> forward_cuda(const Tensor& pred, const Tensor& target, double zeta) {
    check(pred, target);
    c10::cuda::CUDAGuard guard(pred.device());
    auto p = pred.contiguous(), t = target.contiguous();
    int64_t rows = p.size(0), d = row_size(p);
    auto loss = at::empty({rows}, wide(p)), weight = at::empty({rows}, wide(p));
    auto partial = at::empty({rows * chunks(d)}, wide(p));
    C10_CUDA_CHECK(prox_matching_loss_cuda(code(p), p.const_data_ptr(), t.const_data_ptr(), partial.mutable_data_ptr(),
                                           loss.mutable_data_ptr(), weight.mutable_data_ptr(), rows, d, zeta,
                                           stream(p)));
    return {loss, weight};
}

Tensor backward_cuda(const Tensor& grad, const Tensor& pred, const Tensor& target, const Tensor& weight, double zeta) {
    check(pred, target);
    check_values("prox_matching_loss_backward", grad, pred);
    check_values("prox_matching_loss_backward", weight, pred);
    c10::cuda::CUDAGuard guard(pred.device());
    auto g = grad.contiguous(), p = pred.contiguous(), t = target.contiguous(), w = weight.contiguous();
    auto dp = at::empty(p.sizes(), p.options());
    C10_CUDA_CHECK(prox_matching_loss_backward_cuda(code(p), g.const_data_ptr(), p.const_data_ptr(), t.const_data_ptr(),
                                                    w.const_data_ptr(), dp.mutable_data_ptr(), p.size(0), row_size(p),
                                                    zeta, stream(p)));
    return dp;
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(t2i, m) {
    m.def("prox_matching_loss(Tensor pred, Tensor target, float zeta) -> (Tensor loss, Tensor weight)",
          {at::Tag::pt2_compliant_tag});
    m.def("prox_matching_loss_backward(Tensor grad, Tensor pred, Tensor target, Tensor weight, float zeta) -> Tensor",
          {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(t2i, CPU, m) {
    m.impl("prox_matching_loss", forward_cpu);
    m.impl("prox_matching_loss_backward", backward_cpu);
}
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(t2i, CUDA, m) {
    m.impl("prox_matching_loss", forward_cuda);
    m.impl("prox_matching_loss_backward", backward_cuda);
}
#endif
