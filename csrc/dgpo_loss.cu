// DGPO's loss, Eq. (17), of P groups of G images, and what each image weighs in it.
//
//     z_g = beta/G sum_i A_i (l_i - l_ref,i)     L = mean_g -log sigmoid(-z_g) = mean_g log(1 + exp z_g)
//     w_i = dL/dl_i = beta/(P G) sigmoid(z_g) A_i
//
// One launch of one block, a warp to a group. Reads l, l_ref, A, writes w: 3 x sizeof(T) + 4 bytes per image, some
// hundred images a batch, so that the time is the launch's. Sums are double. Backward is a product, g w.
#include "common.cuh"

template <typename T>
__global__ void __launch_bounds__(1024)
preference(const T* dsm, const T* ref, const T* adv, acc_t<T>* loss, acc_t<T>* weight, int64_t groups,
           int64_t group_size, double beta) {
    auto add = [](double x, double y) { return x + y; };
    double total = 0;
    for (int64_t k = threadIdx.x / 32; k < groups; k += blockDim.x / 32) {
        int64_t end = (k + 1) * group_size;
        double z = 0;
        for (int64_t i = k * group_size + threadIdx.x % 32; i < end; i += 32)
            z += double(widen(adv[i])) * (double(widen(dsm[i])) - widen(ref[i]));
        z = warp_reduce(z, add) * beta / group_size;
        double slope = 1 / (1 + exp(-z)) * beta / (groups * group_size);
        for (int64_t i = k * group_size + threadIdx.x % 32; i < end; i += 32)
            weight[i] = acc_t<T>(slope * widen(adv[i]));
        if (threadIdx.x % 32 == 0) total += (z > 0 ? z : 0) + log1p(exp(-fabs(z)));
    }
    total = block_reduce(total, add);
    if (threadIdx.x == 0) *loss = acc_t<T>(total / groups);
}

cudaError_t dgpo_loss_cuda(Dtype dtype, const void* dsm, const void* dsm_ref, const void* adv, void* loss, void* weight,
                           int64_t b, int64_t group_size, double beta, cudaStream_t stream) {
    return dispatch(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        using A = acc_t<T>;
        int64_t groups = b / group_size;
        int threads = groups < 32 ? int(groups) * 32 : 1024;
        preference<T><<<1, threads ? threads : 32, 0, stream>>>((const T*)dsm, (const T*)dsm_ref, (const T*)adv,
                                                                (A*)loss, (A*)weight, groups, group_size, beta);
    });
}
