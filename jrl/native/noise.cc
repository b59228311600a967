// The factors of a noisy network's noise: f(x) = sign(x) sqrt(|x|) of normal x, from the bits that JAX's keys give.
//
// Compiled and called by noise.py, which says what the arguments are.

#include <cmath>
#include <cstdint>
#include <limits>

#include "threefry.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

template <int N>
JRL_INLINE Vec Polynomial(const float (&factors)[N], Vec x) {
  Vec sum = Spread(factors[0]);
  for (int i = 1; i < N; ++i) sum = Fma(sum, x, Spread(factors[i]));
  return sum;
}

// The inverse of the error function, for |x| < 1: the polynomials of Giles, 2010, "Approximating the erfinv function".
JRL_INLINE Vec InverseErf(Vec x) {
  const Vec w = -Log((1.0f - x) * (1.0f + x));
  const Vec near = Polynomial({2.81022636e-08f, 3.43273939e-07f, -3.5233877e-06f, -4.39150654e-06f, 0.00021858087f,
                               -0.00125372503f, -0.00417768164f, 0.246640727f, 1.50140941f},
                              w - 2.5f);
  const Vec far = Polynomial({-0.000200214257f, 0.000100950558f, 0.00134934322f, -0.00367342844f, 0.00573950773f,
                              -0.0076224613f, 0.00943887047f, 1.00167406f, 2.83297682f},
                             Sqrt(w) - 3.0f);
  return x * (w < 5.0f ? near : far);
}

// keys [..., 2] -> [..., *]
ffi::Error NoiseFactors(ffi::Buffer<ffi::U32> keys, Result factors) {
  const int64_t batch = keys.element_count() / 2;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = factors->element_count() / batch;
    const uint32_t* key = keys.typed_data() + 2 * b;
    float* out = factors->typed_data() + b * n;
    Word count;
    for (int i = 0; i < kLanes; ++i) count[i] = i;
    for (int64_t i = 0; i < n; i += kLanes, count += kLanes) {
      // As jax.random.normal: 23 bits are a number of [1, 2), which becomes one of (-1, 1).
      const Block block = Threefry(Word{} + key[0], Word{} + key[1], count);
      const Vec unit = (Vec)(((block.a ^ block.b) >> 9) | 0x3f800000u) - 1.0f;
      const Vec normal = 1.41421356f * InverseErf(unit * 2.0f - 0.99999994f);
      const Vec size = Max(-normal, normal), root = Sqrt(size);
      const Vec f = normal / Max(Spread(std::numeric_limits<float>::min()), root);
      i + kLanes <= n ? Store(out + i, f) : StoreMasked(out + i, f, MaskOf(n - i));
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jrl_noise_factors, NoiseFactors,
                              ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::U32>>().Ret<Floats>());
