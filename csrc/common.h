// What the launchers share: checks, the chunks a row is cut into, and the way to the current CUDA stream.
#pragma once
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>
#ifdef WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include "common.cuh"
#endif

using at::Tensor;

#define DISPATCH(tensor, name, ...) \
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (tensor).scalar_type(), name, __VA_ARGS__)

inline void check_same(const char* name, const Tensor& a, const Tensor& b) {
    bool same = a.sym_sizes() == b.sym_sizes() && a.scalar_type() == b.scalar_type() && a.device() == b.device();
    TORCH_CHECK_VALUE(same && at::isFloatingType(a.scalar_type()), name, ": shapes, dtypes and devices must be equal, "
                      "and floating point, not ", a.toString(), a.sym_sizes(), " on ", a.device(), " and ",
                      b.toString(), b.sym_sizes(), " on ", b.device(), ".");
}

// Where sums and per-sample values live: float, double for double.
inline at::TensorOptions wide(const Tensor& x) {
    return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

inline void check_values(const char* name, const Tensor& values, const Tensor& x) {
    bool fits = values.sizes() == x.sizes().slice(0, 1) && values.dtype() == wide(x).dtype() &&
                values.device() == x.device();
    TORCH_CHECK_VALUE(fits, name, ": one value for each sample of ", x.toString(), x.sizes(), " on ", x.device(),
                      " is needed, float or double, not ", values.toString(), values.sizes(), ".");
}

namespace cpu {
constexpr int64_t kChunk = 8192;                       // elements that a thread handles at a time, in its cache
constexpr int64_t kGrain = 32768;                      // elements below which another thread is not worth waking

inline int64_t chunks(int64_t n) { return n > kChunk ? (n + kChunk - 1) / kChunk : 1; }

// f(row, start, n) for every chunk of `rows` rows of d elements, shared out over the threads.
template <typename F> void for_chunks(int64_t rows, int64_t d, const F& f) {
    int64_t per_row = chunks(d), each = std::max<int64_t>(1, std::min(d, kChunk));
    at::parallel_for(0, rows * per_row, std::max<int64_t>(1, kGrain / each), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
            int64_t start = k % per_row * kChunk;
            f(k / per_row, start, std::min(kChunk, d - start));
        }
    });
}
}  // namespace cpu

#ifdef WITH_CUDA
inline Dtype code(const Tensor& x) {
    switch (x.scalar_type()) {
        case at::kFloat: return Dtype::f32;
        case at::kDouble: return Dtype::f64;
        case at::kHalf: return Dtype::f16;
        case at::kBFloat16: return Dtype::bf16;
        default: TORCH_CHECK_VALUE(false, "Floating point is needed, not ", x.scalar_type(), ".");
    }
}
inline cudaStream_t stream(const Tensor& x) { return c10::cuda::getCurrentCUDAStream(x.get_device()).stream(); }
#endif
