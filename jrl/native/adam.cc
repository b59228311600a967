// A step of Adam on all parameters in one pass, and the norm of a gradient.
//
// Compiled and called by adam.py, which says what the arguments are.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

// Of n numbers; several sums, as one would wait for itself.
float SumOfSquares(const float* x, int64_t n) {
  Vec sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) {
      const Vec v = Load(x + i + k * kLanes);
      sum[k] = Fma(v, v, sum[k]);
    }
  ForEach(n - i, [&](int64_t k, auto load, auto) __attribute__((always_inline)) {
    const Vec v = load(x + i + k);
    sum[0] = Fma(v, v, sum[0]);
  });
  return Total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// gradients [..., *] -> [...]
ffi::Error AdamNorm(ffi::RemainingArgs grads, Result norm) {
  const int64_t batch = norm->element_count();
  for (int64_t b = 0; b < batch; ++b) {
    float sum = 0.0f;
    for (size_t leaf = 0; leaf < grads.size(); ++leaf) {
      const auto grad = *grads.get<Floats>(leaf);
      const int64_t n = grad.element_count() / batch;
      sum += SumOfSquares(grad.typed_data() + b * n, n);
    }
    norm->typed_data()[b] = std::sqrt(sum);
  }
  return ffi::Error::Success();
}

// first and second moment [..., P], norm, its bound, step size, corrections of both moments [...], gradients [..., *]
// -> first and second moment, updates, of the shapes that they have above.
ffi::Error AdamUpdate(double b1, double b2, double eps, Floats first, Floats second, Floats norm, Floats most,
                      Floats rate, Floats correct_first, Floats correct_second, ffi::RemainingArgs grads,
                      Result new_first, Result new_second, ffi::RemainingRets updates) {
  const int64_t batch = norm.element_count(), size = first.element_count() / std::max<int64_t>(batch, 1);
  for (int64_t b = 0; b < batch; ++b) {
    const float length = norm.typed_data()[b], bound = most.typed_data()[b];
    const Vec scale = Spread(length < bound ? 1.0f : bound / length);
    const Vec step = Spread(-rate.typed_data()[b] / correct_first.typed_data()[b]);
    const Vec correction = Spread(1.0f / correct_second.typed_data()[b]);
    const Vec b1s = Spread(static_cast<float>(b1)), rest1 = Spread(static_cast<float>(1.0 - b1));
    const Vec b2s = Spread(static_cast<float>(b2)), rest2 = Spread(static_cast<float>(1.0 - b2));
    int64_t at = b * size;
    for (size_t leaf = 0; leaf < grads.size(); ++leaf) {
      const auto grad = *grads.get<Floats>(leaf);
      const int64_t n = grad.element_count() / batch;
      const float* g = grad.typed_data() + b * n;
      float* u = (*updates.get<Floats>(leaf))->typed_data() + b * n;
      const float *m = first.typed_data() + at, *v = second.typed_data() + at;
      float *m_out = new_first->typed_data() + at, *v_out = new_second->typed_data() + at;
      ForEach(n, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        const Vec clipped = load(g + i) * scale;
        const Vec mean = Fma(b1s, load(m + i), rest1 * clipped);
        const Vec square = Fma(b2s, load(v + i), rest2 * (clipped * clipped));
        store(m_out + i, mean);
        store(v_out + i, square);
        store(u + i, step * mean / (Sqrt(square * correction) + static_cast<float>(eps)));
      });
      at += n;
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jrl_adam_norm, AdamNorm, ffi::Ffi::Bind().RemainingArgs().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jrl_adam_update, AdamUpdate,
                              ffi::Ffi::Bind()
                                  .Attr<double>("b1")
                                  .Attr<double>("b2")
                                  .Attr<double>("eps")
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .RemainingRets());
