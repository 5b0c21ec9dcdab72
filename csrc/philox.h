// Gaussian noise that is a function of a key and a counter alone, bit for bit the same on a CPU, on a GPU and in the
// PyTorch twin: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), then Box-Muller
// with a logarithm, sine and cosine made of +, x and square roots of float32 alone, which every device rounds alike.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DEVICE __device__ inline
#else
#define DEVICE inline
#endif

struct NoiseKey { uint64_t seed; uint32_t step, image; };                 // image: the first row's number

struct Four { uint32_t v[4]; };
struct Normals { float v[4]; };

DEVICE Four philox(Four c, uint32_t key0, uint32_t key1) {
#pragma unroll
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
        uint64_t p = uint64_t(0xD2511F53u) * c.v[0], q = uint64_t(0xCD9E8D57u) * c.v[2];
        c = {uint32_t(q >> 32) ^ c.v[1] ^ key0, uint32_t(q), uint32_t(p >> 32) ^ c.v[3] ^ key1, uint32_t(p)};
    }
    return c;
}

#ifdef __CUDACC__                                                          // nvcc would fuse x and + to one rounding
__device__ inline float add(float x, float y) { return __fadd_rn(x, y); }
__device__ inline float mul(float x, float y) { return __fmul_rn(x, y); }
__device__ inline float root(float x) { return __fsqrt_rn(x); }
__device__ inline int32_t bits(float x) { return __float_as_int(x); }
__device__ inline float from_bits(int32_t x) { return __int_as_float(x); }
#else                                                                      // compiled with -ffp-contract=off
inline float add(float x, float y) { return x + y; }
inline float mul(float x, float y) { return x * y; }
inline float root(float x) { return std::sqrt(x); }
inline int32_t bits(float x) { return std::bit_cast<int32_t>(x); }
inline float from_bits(int32_t x) { return std::bit_cast<float>(x); }
#endif

template <typename... Cs> DEVICE float polynomial(float x, float c, Cs... higher) {
    if constexpr (sizeof...(Cs) == 0) return c;
    else return add(mul(polynomial(x, higher...), x), c);
}

DEVICE void box_muller(uint32_t a, uint32_t b, float& z0, float& z1) {
    // sqrt(-2 ln u), u = (a + .5) 2^-32 = m 2^(e - 32), m in [sqrt(1/2), sqrt(2))
    int32_t raw = bits(add(float(a), 0.5f)), e = (raw - 0x3f3504f3) >> 23;
    float y = add(from_bits(raw - e * (1 << 23)), -1.0f);                  // m - 1
    float p = polynomial(y, 0.333334088f, -0.250009209f, 0.199851274f, -0.165928558f, 0.146763965f, -0.141184255f,
                         0.0927221403f);
    float log_m = add(y, mul(mul(y, y), add(mul(p, y), -0.5f)));
    float radius = root(mul(-2.0f, add(mul(float(e - 32), 0.693147181f), log_m)));
    // the angle, b 2^-32 turns: a quarter, and what is left, h of a quarter, in [-1/2, 1/2)
    uint32_t quarter = (b + (1u << 29)) >> 30;
    float h = mul(float(int32_t(b << 2)), 0x1p-32f), h2 = mul(h, h);
    float sine = mul(h, polynomial(h2, 1.57079637f, -0.645964086f, 0.0796925798f, -0.00468126638f, 0.000158206531f));
    float cosine = polynomial(h2, 1.0f, -1.23370051f, 0.253669202f, -0.0208600704f, 0.000903629872f);
    float x = quarter & 1 ? sine : cosine, other = quarter & 1 ? cosine : sine;
    z0 = mul(radius, quarter == 1 || quarter == 2 ? -x : x);
    z1 = mul(radius, quarter >= 2 ? -other : other);
}

// The noise of elements 4 j to 4 j + 3 of row `row`.
DEVICE Normals normals(const NoiseKey& key, int64_t row, uint32_t j) {
    Four c = philox({j, uint32_t(key.image + row), key.step, 0}, uint32_t(key.seed), uint32_t(key.seed >> 32));
    Normals z;
    box_muller(c.v[0], c.v[1], z.v[0], z.v[1]);
    box_muller(c.v[2], c.v[3], z.v[2], z.v[3]);
    return z;
}
