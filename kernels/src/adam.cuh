// Adam, SGD and the moving average over one flat arena of parameters: the whole model in one launch.
//
// Adam (Kingma & Ba 2015, algorithm 1, with the L2 and decoupled weight decay of torch.optim.Adam/AdamW):
//   p <- p (1 - lr wd)  if decoupled, else  g <- g + wd p
//   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
//   p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
// SGD (torch.optim.SGD):  g <- g + wd p;  u <- mu u + g;  p <- p - lr u
// Average:  a <- a + (1 - d) (p - a),  d = min(decay, (1 + t) / (10 + t))
//
// p, g, m, v, a: (P,) float32. Bytes per element: Adam reads 16 and writes 12; SGD with momentum reads 12
// and writes 8; the average reads 8 and writes 4. Launch: grid-stride, 16-byte accesses; no element depends on another.
// What all elements share, from a load of the learning rate to Adam's two powers, comes after a thread's first loads:
// it takes as long as they do.
#pragma once
#include "common.cuh"

struct AdamConstants {
  float complement1, complement2; // 1 - beta1, 1 - beta2
  float beta1, beta2, eps, weight_decay;
  float step_size;       // lr / (1 - beta1^t)
  float root_correction; // 1 / sqrt(1 - beta2^t)
  float shrink;          // what decoupled decay leaves of p: 1 - lr * weight_decay, else 1
};

// The betas come in as their complements, rounded once from float64: 1.0f - 0.999f is off by 5e-5.
// For the same reason 1 - beta^t is computed as -expm1(t log1p(-complement)).
DEVICE AdamConstants adam_constants(float step, float lr, float complement1, float complement2, float eps,
                                    float weight_decay, int decoupled) {
  AdamConstants c;
  c.complement1 = complement1;
  c.complement2 = complement2;
  c.beta1 = 1.0f - complement1;
  c.beta2 = 1.0f - complement2;
  c.eps = eps;
  c.weight_decay = decoupled ? 0.0f : weight_decay;
  c.step_size = lr / -expm1f(step * log1pf(-complement1));
  c.root_correction = 1.0f / sqrtf(-expm1f(step * log1pf(-complement2)));
  c.shrink = decoupled ? 1.0f - lr * weight_decay : 1.0f;
  return c;
}

DEVICE void adam_element(float& p, float g, float& m, float& v, const AdamConstants& c) {
  g += c.weight_decay * p;
  m = c.beta1 * m + c.complement1 * g;
  v = c.beta2 * v + c.complement2 * g * g;
  p = c.shrink * p - c.step_size * m / (sqrtf(v) * c.root_correction + c.eps);
}

DEVICE void sgd_element(float& p, float g, float& velocity, float lr, float momentum, float weight_decay) {
  velocity = momentum * velocity + (g + weight_decay * p);
  p -= lr * velocity;
}

template <int W> struct AdamPack { Pack<W> p, g, m, v; };

// `constants()` gives the AdamConstants, which on a GPU take as long as a load: so they are asked for after one.
template <class Constants>
DEVICE void adam_range(Range range, float* p, const float* g, float* m, float* v, Constants constants) {
  const auto fetch = [=](auto width, index_t i) {
    constexpr int W = decltype(width)::value;
    return AdamPack<W>{load<W>(p + i), load<W>(g + i), load<W>(m + i), load<W>(v + i)};
  };
  range.for_each(aligned16(p, g, m, v), fetch, constants, [=](auto width, index_t i, auto x, const auto& c) {
    constexpr int W = decltype(width)::value;
    UNROLL for (int k = 0; k < W; ++k) adam_element(x.p[k], x.g[k], x.m[k], x.v[k], c);
    store(p + i, x.p);
    store(m + i, x.m);
    store(v + i, x.v);
  });
}

// `velocity` may be null where momentum is 0: it is then neither read nor written. `rate()` gives the learning rate;
// on a GPU it may be a load, so each pack's own loads come first.
template <class Rate>
DEVICE void sgd_range(Range range, float* p, const float* g, float* velocity, Rate rate, float momentum,
                      float weight_decay) {
  if (velocity) {
    range.for_each(aligned16(p, g, velocity), [=](auto width, index_t i) {
      constexpr int W = decltype(width)::value;
      Pack<W> pp = load<W>(p + i), uu = load<W>(velocity + i);
      const Pack<W> gg = load<W>(g + i);
      const float lr = rate();
      UNROLL for (int k = 0; k < W; ++k) sgd_element(pp[k], gg[k], uu[k], lr, momentum, weight_decay);
      store(p + i, pp);
      store(velocity + i, uu);
    });
  } else {
    range.for_each(aligned16(p, g), [=](auto width, index_t i) {
      constexpr int W = decltype(width)::value;
      Pack<W> pp = load<W>(p + i);
      const Pack<W> gg = load<W>(g + i);
      const float lr = rate();
      UNROLL for (int k = 0; k < W; ++k) {
        float fresh = 0.0f;
        sgd_element(pp[k], gg[k], fresh, lr, 0.0f, weight_decay);
      }
      store(p + i, pp);
    });
  }
}

// 1 - d, without its cancellation: 1 - (1 + t) / (10 + t) = 9 / (10 + t). complement: 1 - decay.
DEVICE float average_rate(float complement, float step) {
  const float early = 9.0f / (10.0f + step);
  return early > complement ? early : complement;
}

template <int W> struct AveragePack { Pack<W> average, p; };

template <class Rate> DEVICE void average_range(Range range, float* average, const float* p, Rate rate) {
  const auto fetch = [=](auto width, index_t i) {
    constexpr int W = decltype(width)::value;
    return AveragePack<W>{load<W>(average + i), load<W>(p + i)};
  };
  range.for_each(aligned16(average, p), fetch, rate, [=](auto width, index_t i, auto x, float share) {
    constexpr int W = decltype(width)::value;
    UNROLL for (int k = 0; k < W; ++k) x.average[k] += share * (x.p[k] - x.average[k]);
    store(average + i, x.average);
  });
}
