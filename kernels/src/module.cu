// The GPU entry points: every kernel's name, and nothing else.
#include "adam.cuh"
#include "batch.cuh"
#include "bias_act.cuh"
#include "convert.cuh"
#include "gemm.cuh"
#include "norm_act.cuh"
#include "shuffle.cuh"
#include "softmax_xent.cuh"

// Blocks of 256 threads that a multiprocessor has room for: it holds 1024, 1536 or 2048 threads.
#if __CUDA_ARCH__ == 750
#define ROOM 4
#elif __CUDA_ARCH__ > 800 && __CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1100
#define ROOM 6
#else
#define ROOM 8
#endif

// A kernel of which a multiprocessor holds `blocks` blocks at once, or as many as it has room for: the compiler
// keeps within the registers that this leaves. The numbers are those of launches.py and tests/budget.toml.
#define KERNEL(blocks) extern "C" __global__ void __launch_bounds__(256, blocks < ROOM ? blocks : ROOM)

#define BIAS_ACT(name, Act)                                                                                   \
  KERNEL(6) bias_act_##name(const float* z, const float* bias, float* y, index_t B, index_t N) {              \
    bias_act_rows<Act>(Rows{B, N}, z, bias, y);                                                               \
  }                                                                                                           \
  KERNEL(4) bias_act_backward_##name(const float* dy, const float* saved, const float* bias, float* dz,       \
                                     float* dbias, float* partial, unsigned* counters, index_t B,             \
                                     index_t N) {                                                             \
    bias_act_backward_block<Act>(dy, saved, bias, dz, dbias, partial, counters, B, N);                        \
  }

BIAS_ACT(identity, Identity)
BIAS_ACT(relu, Relu)
BIAS_ACT(leaky_relu, LeakyRelu)
BIAS_ACT(silu, Silu)
BIAS_ACT(gelu, Gelu)
BIAS_ACT(gelu_tanh, GeluTanh)

#define SOFTMAX_XENT(items, blocks)                                                                           \
  KERNEL(blocks) softmax_xent_##items(const float* logits, const int* labels, float* dlogits,                 \
                                      float* loss, double* totals, unsigned long long* confusion,             \
                                      float* partial, unsigned* counter, index_t B, int C, int N,             \
                                      float scale, float kept, float shared, const float* weights) {          \
    softmax_xent_block<items>(logits, labels, dlogits, loss, totals, confusion, partial, counter, B, C, N,    \
                              {scale, kept, shared, weights});                                                \
  }

SOFTMAX_XENT(0, 8)  // any number of classes; the others hold items x 32 of them in registers
SOFTMAX_XENT(1, 8)
SOFTMAX_XENT(2, 8)
SOFTMAX_XENT(4, 8)
SOFTMAX_XENT(8, 6)
SOFTMAX_XENT(16, 4)
SOFTMAX_XENT(32, 3)

// step and lr come as values, or where the pointer is not null from the device.
KERNEL(4) adam(float* p, const float* g, float* m, float* v, index_t n, float step, const float* step_pointer,
               float lr, const float* lr_pointer, float complement1, float complement2, float eps,
               float weight_decay, int decoupled) {
  adam_range(Range{n}, p, g, m, v, [=] {
    return adam_constants(step_pointer ? *step_pointer : step, lr_pointer ? *lr_pointer : lr, complement1,
                          complement2, eps, weight_decay, decoupled);
  });
}

KERNEL(6) sgd(float* p, const float* g, float* velocity, index_t n, float lr, const float* lr_pointer,
              float momentum, float weight_decay) {
  sgd_range(Range{n}, p, g, velocity, [=] { return lr_pointer ? *lr_pointer : lr; }, momentum, weight_decay);
}

KERNEL(6) average(float* average, const float* p, index_t n, float complement, float step, const float* step_pointer) {
  average_range(Range{n}, average, p, [=] { return average_rate(complement, step_pointer ? *step_pointer : step); });
}

KERNEL(6) gather(const unsigned char* images, const int* labels, const int* index, const index_t* offset, float* x,
                 int* y, index_t B, index_t N, index_t M, int D, float mean, float scale) {
  gather_grid({mean, scale, D, M}, images, labels, index, offset, x, y, B, N);
}

KERNEL(6) gather_augmented(const unsigned char* images, const int* labels, const int* numbers, const int* index,
                           const index_t* offset, const index_t* draw, const float* affine, float* x, int* y, index_t B,
                           index_t N, index_t M, int D, int side, float mean, float scale, float noise_sigma,
                           int noise_uniform, int random, float rotation, float zoom, float shear, float shift,
                           unsigned seed_low, unsigned seed_high) {
  const Augmentation augmentation{numbers, affine, noise_sigma, noise_uniform, random, rotation, zoom, shear, shift,
                                  draw ? (unsigned)*draw : 0u, seed_low, seed_high, side};
  const auto begin = [=] { return offset ? *offset : 0; };
  gather_quads(GatherSettings{mean, scale, D, M}, augmentation, images, labels, index, begin, x, y, B, N);
}

KERNEL(8) shuffle(const int* index, int* out, index_t N, unsigned seed_low, unsigned seed_high, unsigned epoch) {
  shuffle_grid(index, out, N, seed_low, seed_high, epoch);
}

KERNEL(8) advance(index_t* offset, index_t by, float* step) { advance_step(offset, by, step); }

KERNEL(8) to_bfloat16(const float* x, unsigned short* y, index_t n) { to_bfloat16_range(Range{n}, x, y); }

#if TENSOR_CORES
#define ON_TENSOR_CORES(...) __VA_ARGS__
#else
#define ON_TENSOR_CORES(...) __trap()  // kernels/gemm.py launches nothing on such a GPU
#endif

// Two blocks per multiprocessor: as many as its shared memory holds on 8.6, 8.9 and 12.0.
#define GEMM(precision, Precision, rows)                                                                      \
  KERNEL(2) gemm_forward_##precision##_##rows(const float* x, const float* w, const float* bias, float* y,    \
                                              float* z, float* partial, unsigned* counters, index_t M,        \
                                              index_t N, index_t K, index_t depth, int activation) {              \
    ON_TENSOR_CORES(gemm_forward<Precision, rows>(x, w, bias, y, z, partial, counters, M, N, K, depth,        \
                                                  activation));                                               \
  }                                                                                                           \
  KERNEL(2) gemm_input_gradient_##precision##_##rows(                                                         \
      const float* dz, const float* w, const float* saved, const float* bias, float* dx, float* dbias,        \
      float* sums, float* partial, unsigned* counters, index_t M, index_t N, index_t K, index_t depth,            \
      int activation) {                                                                                       \
    ON_TENSOR_CORES(gemm_input_gradient<Precision, rows>(dz, w, saved, bias, dx, dbias, sums, partial,        \
                                                         counters, M, N, K, depth, activation));              \
  }                                                                                                           \
  KERNEL(2) gemm_weight_gradient_##precision##_##rows(const float* x, const float* dz, float* dw,             \
                                                      float* partial, unsigned* counters, index_t M,          \
                                                      index_t N, index_t K, index_t depth) {                      \
    ON_TENSOR_CORES(gemm_weight_gradient<Precision, rows>(x, dz, dw, partial, counters, M, N, K, depth));     \
  }

GEMM(tf32, Tf32, 64)
GEMM(tf32, Tf32, 128)
GEMM(bf16, Bf16, 64)
GEMM(bf16, Bf16, 128)

KERNEL(4) batch_norm_stats(const float* z, float* mean, float* var, float* running_mean, float* running_var,
                           float momentum, float* partial, unsigned* counters, index_t B, index_t N) {
  batch_norm_stats_block(z, {mean, var, running_mean, running_var, momentum}, partial, counters, B, N);
}

#define DROPOUT                                                                                               \
  unsigned threshold, float scale, unsigned seed_low, unsigned seed_high, float step,                         \
      const float* step_pointer, unsigned layer, unsigned row

#define NORM_ACT(name, Act)                                                                                   \
  KERNEL(4) norm_act_##name(const float* z, const float* bias, const float* mean, const float* var,           \
                            const float* weight, float eps, float* y, index_t B, index_t N, DROPOUT) {        \
    norm_act_rows<Act>({B, N}, z, bias, {mean, var, weight, eps},                                             \
                       {threshold, scale, seed_low, seed_high, step, step_pointer, layer, row}, y);           \
  }                                                                                                           \
  KERNEL(4) norm_act_backward_##name(const float* dy, const float* z, const float* bias, const float* mean,   \
                                     const float* var, const float* weight, float eps, float* dz,             \
                                     float* bias_grad, float* weight_grad, float* partial,                    \
                                     unsigned* counters, index_t B, index_t N, DROPOUT) {                     \
    norm_act_backward_block<Act>(dy, z, bias, {mean, var, weight, eps},                                       \
                                 {threshold, scale, seed_low, seed_high, step, step_pointer, layer, row},     \
                                 dz, bias_grad, weight_grad, partial, counters, B, N);                        \
  }

NORM_ACT(identity, Identity)
NORM_ACT(relu, Relu)
NORM_ACT(leaky_relu, LeakyRelu)
NORM_ACT(silu, Silu)
NORM_ACT(gelu, Gelu)
NORM_ACT(gelu_tanh, GeluTanh)

KERNEL(4) norm_input_gradient(const float* z, const float* mean, const float* var, const float* weight, float eps,
                              const float* bias_grad, const float* weight_grad, float* dz, index_t B, index_t N) {
  norm_input_gradient_rows({B, N}, z, {mean, var, weight, eps}, bias_grad, weight_grad, 1.0f / (float)B, dz);
}
