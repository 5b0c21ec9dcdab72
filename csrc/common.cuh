// What the .cu files share and, above the __CUDACC__ line, what the .cpp files need to call them. No torch header.
#pragma once
#include <cstdint>
#include <cuda_runtime_api.h>
#include "group_advantage.h"
#include "linear_step.h"

enum class Dtype { f32, f64, f16, bf16 };

// Each queues its work on `stream`, waits for nothing and returns the error of its launches. Per-sample values and
// partial are float, double for f64; room is double. Sizes of 0 are fine; pointers are aligned to an element only.
cudaError_t prox_matching_loss_cuda(Dtype, const void* pred, const void* target, void* partial, void* loss,
                                    void* weight, int64_t rows, int64_t d, double zeta, cudaStream_t stream);
cudaError_t prox_matching_loss_backward_cuda(Dtype, const void* grad, const void* pred, const void* target,
                                             const void* weight, void* grad_pred, int64_t rows, int64_t d, double zeta,
                                             cudaStream_t stream);
cudaError_t cfg_combine_cuda(Dtype, const void* uncond, const void* cond, void* out, int64_t n, double scale,
                             cudaStream_t stream);
cudaError_t cfg_combine_backward_cuda(Dtype, const void* grad, void* grad_uncond, void* grad_cond, int64_t n,
                                      double scale, cudaStream_t stream);
cudaError_t group_advantage_cuda(Dtype, const void* reward, void* room, void* adv, int64_t b, int64_t group_size,
                                 const Shaping&, cudaStream_t stream);
cudaError_t dgpo_loss_cuda(Dtype, const void* dsm, const void* dsm_ref, const void* adv, void* loss, void* weight,
                           int64_t b, int64_t group_size, double beta, cudaStream_t stream);
cudaError_t linear_step_cuda(Dtype x, Dtype v, const LinearStep&, void* partial, cudaStream_t stream);
cudaError_t linear_step_backward_cuda(Dtype x, Dtype v, const LinearStep&, const LinearStepGrads&,
                                      cudaStream_t stream);

constexpr int64_t kChunk = 2048;                       // elements that one block handles; a row is cut at its multiples
inline int64_t chunks(int64_t n) { return n > kChunk ? (n + kChunk - 1) / kChunk : 1; }

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstring>
#include <type_traits>

constexpr int kThreads = 256;

template <typename T> using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;   // the maths

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ T narrow(acc_t<T> x) {                                             // to nearest even
    if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
    else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
    else return x;
}

template <typename T, int N = 16 / sizeof(T)> struct alignas(16) Pack {                             // 16 bytes at once
    static constexpr int size = N;
    T v[N];
};
template <int N = 0, typename T> __device__ auto load(const T* p) {
    return *reinterpret_cast<const Pack<T, N ? N : 16 / sizeof(T)>*>(p);
}
template <typename T, int N> __device__ void store(T* p, const Pack<T, N>& x) {    // by words: a Pack's own assignment
    uint4 words[sizeof x / 16];                                                    // nvcc takes apart in some kernels
    memcpy(words, &x, sizeof x);
    for (int k = 0; k < int(sizeof x / 16); ++k) __stcg(reinterpret_cast<uint4*>(p) + k, words[k]);
}

// How many of n elements come before the first at which every pointer is 16-byte aligned: n if there is none.
template <typename T, typename... Ts> __device__ int head(int n, const T* p, const Ts*... others) {
    auto offset = [](const void* q) { return int(reinterpret_cast<uintptr_t>(q) % 16); };
    bool alike = ((offset(others) == offset(p)) && ...);
    int before = (16 - offset(p)) % 16 / int(sizeof(T));
    return alike && before < n ? before : n;
}

// Walks a block over n elements: one(i) for each before `head` and after the last pack, pack(i) for the 16 bytes at i.
template <typename T, typename One, typename Many> __device__ void sweep(int n, int head, One one, Many pack) {
    int end = n - (n - head) % Pack<T>::size;
    for (int i = threadIdx.x; i < head; i += blockDim.x) one(i);
    for (int i = head + threadIdx.x * Pack<T>::size; i < end; i += blockDim.x * Pack<T>::size) pack(i);
    for (int i = end + threadIdx.x; i < n; i += blockDim.x) one(i);
}

template <typename A, typename Op> __device__ A warp_reduce(A x, Op op) {  // every lane gets the result
    for (int lane = 16; lane > 0; lane /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

// Combines x over the block (whole warps) in a fixed order; every thread gets the result.
template <typename A, typename Op> __device__ A block_reduce(A x, Op op) {
    __shared__ A warps[32];
    x = warp_reduce(x, op);
    __syncthreads();                                                       // a former call's values have been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = warps[0];
    for (int w = 1; w < int(blockDim.x / 32); ++w) x = op(x, warps[w]);
    return x;
}

// f(row, sum) of each row's partial sums, added in order: one warp a row.
template <typename A, typename F>
__global__ void __launch_bounds__(kThreads) sum_rows(const A* partial, int64_t rows, int64_t per_row, F f) {
    int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
    if (row >= rows) return;
    int lane = threadIdx.x % 32;
    double sum = 0;
    for (int64_t k = lane; k < per_row; k += 32) sum += partial[row * per_row + k];
    sum = warp_reduce(sum, [](double x, double y) { return x + y; });
    if (lane == 0) f(row, sum);
}

template <typename A, typename F>
void finish_rows(const A* partial, int64_t rows, int64_t per_row, F f, cudaStream_t stream) {
    if (cudaPeekAtLastError() != cudaSuccess) return;                      // reported by dispatch
    sum_rows<<<(rows * 32 + kThreads - 1) / kThreads, kThreads, 0, stream>>>(partial, rows, per_row, f);
}

template <typename F> cudaError_t dispatch(Dtype dtype, F f) {             // f takes a null pointer of the element type
    switch (dtype) {
        case Dtype::f32: f((float*)nullptr); break;
        case Dtype::f64: f((double*)nullptr); break;
        case Dtype::f16: f((__half*)nullptr); break;
        case Dtype::bf16: f((__nv_bfloat16*)nullptr); break;
        default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}
#endif
