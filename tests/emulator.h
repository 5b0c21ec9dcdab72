// Enough of CUDA to run csrc's kernels on a CPU, block after block, every thread of a block a fiber of its own.
// A kernel's order of threads is undefined: here it differs from pass to pass. One that can never go on, a shuffle that
// half a warp has left, say, ends the process.
#pragma once
#include <ucontext.h>
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

struct Index { unsigned x; };
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Barrier {                                                           // of `members` threads, or of those left
    int arrived = 0, members = 0;
    unsigned passed = 0;
    void open_if_full() { if (members && arrived == members) arrived = 0, ++passed; }
};
struct Fiber { ucontext_t context; bool done; alignas(16) char slot[16]; };

constexpr int kMost = 1024, kStack = 1 << 16;                              // threads a block, bytes of each one's stack
inline std::unique_ptr<char[]> stacks(new char[kMost * kStack]);
inline Fiber fibers[kMost];
inline Barrier block, warps[kMost / 32];
inline ucontext_t scheduler;
inline std::function<void()> kernel;

inline void wait(Barrier& at) {
    unsigned mine = at.passed;
    ++at.arrived, at.open_if_full();
    while (at.passed == mine) swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

inline void run_fiber() {
    kernel();
    fibers[threadIdx.x].done = true;
    --block.members, block.open_if_full();                                 // a thread that is gone is not waited for
}

inline unsigned run_pass(int threads, unsigned pass) {                     // what has moved: threads done, barriers open
    for (int i = 0; i < threads; ++i) {
        threadIdx.x = (i * 13u + pass * 7u) % threads;                     // each once, as 13 divides no block's size
        Fiber& fiber = fibers[threadIdx.x];
        if (!fiber.done) swapcontext(&scheduler, &fiber.context);
    }
    unsigned moved = block.passed;
    for (int i = 0; i < threads; ++i) moved += fibers[i].done + (i % 32 ? 0 : warps[i / 32].passed);
    return moved;
}

inline void launch(int64_t grid, int threads, std::function<void()> f) {
    if (threads < 1 || threads > kMost || threads % 32 || grid < 1) std::puts("emulator: launch refused"), std::abort();
    kernel = f, blockDim.x = threads, gridDim.x = unsigned(grid);
    for (int64_t b = 0; b < grid; ++b) {
        blockIdx.x = unsigned(b), block = {0, threads};
        for (int i = 0; i < threads; ++i) {
            Fiber& fiber = fibers[i];
            fiber.done = false, warps[i / 32] = {0, 32};
            getcontext(&fiber.context);
            fiber.context.uc_stack = {stacks.get() + int64_t(i) * kStack, 0, kStack};
            fiber.context.uc_link = &scheduler;
            makecontext(&fiber.context, run_fiber, 0);
        }
        for (unsigned pass = 0, before = 0, moved; block.members; ++pass, before = moved)
            if ((moved = run_pass(threads, pass)) == before) std::puts("emulator: threads wait forever"), std::abort();
    }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block); }

template <typename A> A __shfl_xor_sync(unsigned, A x, int lane) {
    using namespace emulator;
    Barrier& warp = warps[threadIdx.x / 32];
    std::memcpy(fibers[threadIdx.x].slot, &x, sizeof x);
    wait(warp);
    std::memcpy(&x, fibers[threadIdx.x ^ lane].slot, sizeof x);
    wait(warp);
    return x;
}

struct alignas(16) uint4 { unsigned x, y, z, w; };
template <typename T> void __stcg(T* p, T x) { *p = x; }

inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

struct __half { uint16_t bits; };
inline float __half2float(__half x) { return float(std::bit_cast<_Float16>(x)); }
inline __half __float2half_rn(float x) { return std::bit_cast<__half>(_Float16(x)); }

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    if (x != x) return {0x7fff};
    uint32_t bits = std::bit_cast<uint32_t>(x);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};           // to nearest, ties to even
}

using std::exp, std::expm1, std::fabs, std::fma, std::log, std::log1p, std::pow, std::sqrt;

template <typename A, typename B> auto max(A a, B b) {                     // as CUDA's: of NaN and a number the number
    using C = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<C>) return std::fmax(C(a), C(b));
    else return std::max(C(a), C(b));
}
template <typename A, typename B> auto min(A a, B b) {
    using C = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<C>) return std::fmin(C(a), C(b));
    else return std::min(C(a), C(b));
}

#ifdef TORCH_EXTENSION                                                     // what the launchers want of c10/cuda
#define C10_CUDA_CHECK(code) TORCH_CHECK((code) == cudaSuccess)
namespace c10::cuda {
struct CUDAGuard { explicit CUDAGuard(c10::Device) {} };
struct CUDAStream { cudaStream_t stream() const { return nullptr; } };
inline CUDAStream getCurrentCUDAStream(int) { return {}; }
}  // namespace c10::cuda
#endif
