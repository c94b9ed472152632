// The C entry points of the fast host build: the same device code as module.cu, a contiguous chunk at a
// time. Chunks depend on the shape alone, and sums over chunks run in order, so results do not depend on
// the number of threads. The nanoseconds per element are rough; they only set the length of a chunk and whether
// an op is worth sharing.
#include "../adam.cuh"
#include "../batch.cuh"
#include "../bias_act.cuh"
#include "../convert.cuh"
#include "../norm_act.cuh"
#include "../shuffle.cuh"
#include "../softmax_xent.cuh"
#include "gather.h"
#include "pool.h"
#include "stream.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr double CHUNK_NANOSECONDS = 4000;  // long against handing a chunk out, short against the whole op
constexpr index_t MIN_ROWS = 16, MAX_ROWS = 512;  // column sums: few partial sums, and few digits lost in each

index_t divide_up(index_t a, index_t b) { return (a + b - 1) / b; }

// A chunk's length follows from the op's cost, never from the number of threads.
template <class F> void over_elements(index_t n, double nanoseconds_each, F f) {
  const index_t length = (index_t)(CHUNK_NANOSECONDS / nanoseconds_each) / 16 * 16;  // whole cache lines
  Pool::instance().share(divide_up(n, length), n * nanoseconds_each, [&](index_t k) {
    f(Range{k * length, std::min(n, (k + 1) * length)});
  });
}

struct RowChunks {
  index_t B, N, rows, count;
  double nanoseconds;
  RowChunks(index_t B, index_t N, double nanoseconds_each) : B(B), N(N), nanoseconds((double)B * N * nanoseconds_each) {
    const double row = nanoseconds_each * std::max<index_t>(1, N);
    rows = std::clamp((index_t)(CHUNK_NANOSECONDS / row), MIN_ROWS, MAX_ROWS);
    count = std::max<index_t>(1, divide_up(B, rows));
  }
};

template <class F> void over_rows(const RowChunks& c, F f) {
  Pool::instance().share(c.count, c.nanoseconds, [&](index_t k) {
    f(k, Rows{k * c.rows, std::min(c.B, (k + 1) * c.rows), c.N});
  });
}

// Adds what chunks have left, `width` floats each, in their order.
void add_chunks(const std::vector<float>& partial, index_t width, float* sums) {
  std::copy_n(partial.data(), width, sums);
  for (index_t k = width; k < (index_t)partial.size(); k += width)
    for (index_t j = 0; j < width; ++j) sums[j] += partial[k + j];
}

template <class Act> void backward(const float* dy, const float* saved, const float* bias, float* dz, float* dbias,
                                   index_t B, index_t N, double cost) {
  const RowChunks chunks(B, N, cost);
  std::vector<float> partial(chunks.count > 1 ? chunks.count * N : 0);
  over_rows(chunks, [&](index_t k, Rows rows) {
    bias_act_backward_rows<Act>(rows, dy, saved, bias, dz, chunks.count > 1 ? &partial[k * N] : dbias);
  });
  if (chunks.count > 1) add_chunks(partial, N, dbias);
}

// dbias and dweight of all chunks, and dz: du, which with normalisation a second pass turns into what it is.
template <class Act>
void norm_backward(const float* dy, const float* z, const float* bias, const Norm& norm, const Dropout& dropout,
                   float* dz, float* dbias, float* dweight, index_t B, index_t N, double cost) {
  std::vector<float> scratch(3 * N), sums(2 * N);
  const PreparedColumns columns = prepare_columns(norm, bias, N, scratch.data());
  const RowChunks chunks(B, N, cost);
  std::vector<float> partial(chunks.count * 2 * N);
  over_rows(chunks, [&](index_t k, Rows rows) {
    float* const mine = partial.data() + k * 2 * N;
    norm_act_backward_rows<Act>(rows, dy, z, columns, dropout, dz, mine, mine + N);
  });
  add_chunks(partial, 2 * N, sums.data());
  std::copy_n(sums.data(), N, dbias);
  if (!norm.mean) return;
  std::copy_n(sums.data() + N, N, dweight);
  over_rows(RowChunks(B, N, 0.4), [&](index_t, Rows rows) {
    norm_input_gradient_rows(rows, z, columns, dbias, dweight, 1.0f / (float)B, dz);
  });
}

}  // namespace

EXPORT const char* kernels_source_hash() { return KERNELS_SOURCE_HASH; }

// At most `helpers` workers beside the caller take part in an op.
EXPORT void kernels_set_helpers(int helpers) { Pool::instance().limit(helpers); }

// Announces (or takes back) that kernels_run_blas is OpenBLAS's threading callback.
EXPORT void kernels_serve_blas(int yes, int workers) { Pool::instance().serve_blas(yes, workers); }

// OpenBLAS's openblas_threads_callback: run dojob on each of `count` elements, all at the same time.
EXPORT void kernels_run_blas(int, void (*dojob)(int, void*, int), int count, size_t size, void* data, int argument) {
  Pool::instance().together(count, [=](index_t k) { dojob((int)k, static_cast<char*>(data) + k * size, argument); });
}

#define BIAS_ACT(name, Act, forward_cost, backward_cost)                                                      \
  EXPORT void bias_act_##name(const float* z, const float* bias, float* y, index_t B, index_t N) {            \
    over_rows(RowChunks(B, N, forward_cost), [=](index_t, Rows rows) { bias_act_rows<Act>(rows, z, bias, y); }); \
  }                                                                                                           \
  EXPORT void bias_act_backward_##name(const float* dy, const float* saved, const float* bias, float* dz,     \
                                       float* dbias, index_t B, index_t N) {                                  \
    backward<Act>(dy, saved, bias, dz, dbias, B, N, backward_cost);                                           \
  }

BIAS_ACT(identity, Identity, 0.2, 0.3)
BIAS_ACT(relu, Relu, 0.2, 0.3)
BIAS_ACT(leaky_relu, LeakyRelu, 0.2, 0.3)
BIAS_ACT(silu, Silu, 0.5, 0.7)
BIAS_ACT(gelu, Gelu, 0.7, 1.0)
BIAS_ACT(gelu_tanh, GeluTanh, 0.6, 0.9)

EXPORT void softmax_xent(const float* logits, const int* labels, float* dlogits, float* loss, double* totals,
                         unsigned long long* confusion, index_t B, int C, int N, float scale, float kept,
                         float shared, const float* weights) {
  const Targets targets{scale, kept, shared, weights};
  const RowChunks chunks(B, C, 1.5);
  struct Sum { double loss, correct; };
  std::vector<Sum> partial(chunks.count);
  over_rows(chunks, [&](index_t k, Rows rows) {
    if (confusion || N > C)
      for (index_t r = rows.begin; r < rows.end; ++r)
        confusion_and_padding(logits + r * N, dlogits + r * N, C, N, labels[r], confusion);
    Sum sum{0.0, 0.0};
    for (index_t r = rows.begin; r < rows.end; ++r) {
      float* const dx = dlogits + r * N;
      const RowResult result = softmax_xent_row(InMemory{dx}, logits + r * N, dx, C, labels[r], targets);
      sum.loss += result.loss;
      sum.correct += result.correct;
    }
    partial[k] = sum;
  });
  Sum sum{0.0, 0.0};
  for (const Sum& s : partial) sum = {sum.loss + s.loss, sum.correct + s.correct};
  *loss = (float)(sum.loss * scale);
  if (totals) {
    totals[0] += sum.loss;
    totals[1] += sum.correct;
  }
}

EXPORT void adam(float* p, const float* g, float* m, float* v, index_t n, float step, float lr, float complement1,
                 float complement2, float eps, float weight_decay, int decoupled) {
  const AdamConstants c = adam_constants(step, lr, complement1, complement2, eps, weight_decay, decoupled);
  over_elements(n, 0.6, [=](Range range) {
    update_streamed(p, range.begin, range.end, [=](float* block, index_t i, index_t count) {
      adam_range(Range{0, count}, block, g + i, m + i, v + i, [&] { return c; });
    });
  });
}

EXPORT void sgd(float* p, const float* g, float* velocity, index_t n, float lr, float momentum,
                float weight_decay) {
  over_elements(n, 0.4, [=](Range range) {
    update_streamed(p, range.begin, range.end, [=](float* block, index_t i, index_t count) {
      sgd_range(Range{0, count}, block, g + i, velocity ? velocity + i : nullptr, [=] { return lr; }, momentum,
                weight_decay);
    });
  });
}

EXPORT void average(float* average, const float* p, index_t n, float complement, float step) {
  const float rate = average_rate(complement, step);
  over_elements(n, 0.3, [=](Range range) {
    update_streamed(average, range.begin, range.end, [=](float* block, index_t i, index_t count) {
      average_range(Range{0, count}, block, p + i, [=] { return rate; });
    });
  });
}

EXPORT void gather(const unsigned char* images, const int* labels, const int* numbers, const int* index,
                   const index_t* offset, const index_t* draw, const float* affine, float* x, int* y, index_t B,
                   index_t N, index_t M, int D, int side, float mean, float scale, float noise_sigma,
                   int noise_uniform, int random, float rotation, float zoom, float shear, float shift,
                   unsigned seed_low, unsigned seed_high) {
  const index_t begin = offset ? *offset : 0;
  const bool mapped = affine || random;
  const GatherSettings settings{mean, scale, D, M};
  const Augmentation augmentation{numbers, affine, noise_sigma, noise_uniform, random, rotation, zoom, shear, shift,
                                  draw ? (unsigned)*draw : 0u, seed_low, seed_high, side};
  const PixelGrid grid(mapped ? side : 0);
  const double cost = 0.6 + (mapped ? 2.0 : 0.0) + (noise_sigma != 0.0f ? 2.5 : 0.0);
  over_rows(RowChunks(B, D, cost), [&](index_t, Rows rows) {
    Neighbours neighbours(grid);
    for (index_t b = rows.begin; b < rows.end; ++b) {
      const index_t source = source_of(index, N, begin, b), ahead = source_of(index, N, begin, b + 2);
      if (is_image(ahead, M))  // rows lie anywhere in the data set: fetch the one after the next
        for (int d = 0; d < D; d += 64) __builtin_prefetch(images + ahead * D + d);
      y[b] = gather_label(labels, source, M);
      gather_row(settings, augmentation, neighbours, images, source, b, x + b * D);
    }
    stream_fence();
  });
}

EXPORT void shuffle(const int* index, int* out, index_t N, unsigned seed_low, unsigned seed_high, unsigned epoch) {
  const Bijection p = bijection(N, seed_low, seed_high, epoch);
  Pool::instance().share(divide_up(N, SHUFFLE_BLOCK), N * 8.0, [&](index_t k) {
    const index_t begin = k * SHUFFLE_BLOCK;
    shuffle_block(p, index, out, N, begin, (int)std::min<index_t>(SHUFFLE_BLOCK, N - begin));
  });
}

EXPORT void advance(index_t* offset, index_t by, float* step) { advance_step(offset, by, step); }

EXPORT void to_bfloat16(const float* x, unsigned short* y, index_t n) {
  over_elements(n, 0.2, [=](Range range) { to_bfloat16_range(range, x, y); });
}

EXPORT void batch_norm_stats(const float* z, float* mean, float* var, float* running_mean, float* running_var,
                             float momentum, index_t B, index_t N) {
  const RowChunks chunks(B, N, 0.3);
  std::vector<float> partial(chunks.count * 2 * N);
  over_rows(chunks, [&](index_t k, Rows rows) {
    float* const mine = partial.data() + k * 2 * N;
    moments_of_rows(rows, z, mine, mine + N);
  });
  float *const means = partial.data(), *const m2 = means + N;
  for (index_t k = 1; k < chunks.count; ++k) {
    const index_t before = k * chunks.rows;
    const Shares s = shares((float)before, (float)std::min(chunks.rows, B - before));
    const float* const other = partial.data() + k * 2 * N;
    for (index_t j = 0; j < N; ++j) merge_moments(means[j], m2[j], other[j], other[N + j], s);
  }
  const Statistics statistics{mean, var, running_mean, running_var, momentum};
  for (index_t j = 0; j < N; ++j) write_statistics(statistics, j, means[j], m2[j], B);
}

#define DROPOUT                                                                                               \
  unsigned threshold, float scale, unsigned seed_low, unsigned seed_high, float step, unsigned layer, unsigned row

#define NORM_ACT(name, Act, forward_cost, backward_cost)                                                      \
  EXPORT void norm_act_##name(const float* z, const float* bias, const float* mean, const float* var,         \
                              const float* weight, float eps, float* y, index_t B, index_t N, DROPOUT) {      \
    const Dropout dropout{threshold, scale, seed_low, seed_high, step, nullptr, layer, row};                  \
    std::vector<float> scratch(3 * N);                                                                        \
    const PreparedColumns columns = prepare_columns({mean, var, weight, eps}, bias, N, scratch.data());       \
    over_rows(RowChunks(B, N, forward_cost + (threshold ? 1.0 : 0.0)),                                        \
              [&](index_t, Rows rows) { norm_act_rows<Act>(rows, z, columns, dropout, y); });                 \
  }                                                                                                           \
  EXPORT void norm_act_backward_##name(const float* dy, const float* z, const float* bias, const float* mean, \
                                       const float* var, const float* weight, float eps, float* dz,           \
                                       float* dbias, float* dweight, index_t B, index_t N, DROPOUT) {         \
    norm_backward<Act>(dy, z, bias, {mean, var, weight, eps},                                                 \
                       {threshold, scale, seed_low, seed_high, step, nullptr, layer, row}, dz, dbias, dweight, \
                       B, N, backward_cost + (threshold ? 1.0 : 0.0));                                        \
  }

NORM_ACT(identity, Identity, 0.3, 0.5)
NORM_ACT(relu, Relu, 0.3, 0.5)
NORM_ACT(leaky_relu, LeakyRelu, 0.3, 0.5)
NORM_ACT(silu, Silu, 0.6, 0.9)
NORM_ACT(gelu, Gelu, 0.8, 1.2)
NORM_ACT(gelu_tanh, GeluTanh, 0.7, 1.1)
