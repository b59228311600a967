// Distributions over fixed, evenly spaced atoms (C51), a row of atoms at a time: mean, projected target, and loss.
//
// Compiled and called by categorical.py, which says what the arguments are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;
using Result = ffi::ResultBuffer<ffi::F32>;

constexpr float kShift = 12582912.f;  // 1.5 2^23: adding it rounds to whole numbers, which are its last bits then

// exp(x) of x <= 0: 2^n and Taylor's series of the rest, at most log(2) / 2. Below the smallest exponent it stays
// there.
JRL_INLINE Vec Exp(Vec x) {
  x = Max(Spread(-87.3f), x);
  const Vec shifted = Fma(x, Spread(1.44269504f), Spread(kShift)), n = shifted - kShift;
  Vec rest = Fma(n, Spread(-0.693359375f), x);  // log(2) in two parts, the first of few bits
  rest = Fma(n, Spread(2.12194440e-4f), rest);
  Vec series = Spread(1.0f / 5040.0f);
  for (float inverse : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f})
    series = Fma(series, rest, Spread(inverse));
  const Whole power = ((Whole)shifted + 127) << kMantissa;
  return series * (Vec)power;
}

// A row of atoms in whole vectors, of which the last one may be part.
struct Row {
  explicit Row(int64_t size) : atoms(size), last((size - 1) / kLanes * kLanes), mask(MaskOf(size - last)) {}

  // each(k, vector at k), 0 behind the last atom.
  template <typename Each>
  JRL_INLINE void Read(const float* x, Each each) const {
    for (int64_t k = 0; k < last; k += kLanes) each(k, Load(x + k));
    each(last, LoadMasked(x + last, mask));
  }

  JRL_INLINE void Write(float* x, int64_t k, Vec v) const { k < last ? Store(x + k, v) : StoreMasked(x + k, v, mask); }

  int64_t atoms, last;
  Whole mask;
};

struct Softmax {
  float largest, total;  // of the logits, and of exp(logits - largest)
};

// each(k, exp(logits - largest)) of a row, 0 behind its last.
template <typename Each>
JRL_INLINE Softmax Exponentials(const Row& row, const float* logits, Each each) {
  const Vec part = LoadMasked(logits + row.last, row.mask);
  Vec best = row.mask ? part : Spread(-std::numeric_limits<float>::infinity()), total{};
  for (int64_t k = 0; k < row.last; k += kLanes) best = Max(best, Load(logits + k));
  const float largest = Largest(best);
  auto one = [&](int64_t k, Vec e) __attribute__((always_inline)) {
    total += e;
    each(k, e);
  };
  for (int64_t k = 0; k < row.last; k += kLanes) one(k, Exp(Load(logits + k) - largest));
  one(row.last, row.mask ? Exp(part - largest) : Vec{});
  return {largest, Total(total)};
}

// As jnp.argmax: the first of the largest, or the first NaN.
JRL_INLINE int64_t Best(const float* q, int64_t actions) {
  int64_t best = 0;
  for (int64_t a = 1; a < actions && !std::isnan(q[best]); ++a)
    if (!(q[a] <= q[best])) best = a;
  return best;
}

// All dimensions but the last `trailing`.
template <typename Array>
int64_t Leading(const Array& x, size_t trailing) {
  int64_t count = 1;
  for (size_t i = 0; i + trailing < x.dimensions().size(); ++i) count *= x.dimensions()[i];
  return count;
}

// logits [..., N, K], support [..., K] -> [..., N]
ffi::Error CategoricalMean(Floats logits, Floats support, Result mean) {
  const auto dims = logits.dimensions();
  const int64_t atoms = dims[dims.size() - 1], rows = dims[dims.size() - 2];
  const Row row(atoms);
  scratch.Begin(Padded(atoms));
  float* z = scratch.Take(Padded(atoms));
  for (int64_t b = 0; b < Leading(logits, 2); ++b) {
    row.Read(support.typed_data() + b * atoms, [&](int64_t k, Vec v) { Store(z + k, v); });
    for (int64_t r = b * rows; r < (b + 1) * rows; ++r) {
      Vec sum{};
      const Softmax softmax =
          Exponentials(row, logits.typed_data() + r * atoms,
                       [&](int64_t k, Vec e) __attribute__((always_inline)) { sum = Fma(e, Load(z + k), sum); });
      mean->typed_data()[r] = Total(sum) / softmax.total;
    }
  }
  return ffi::Error::Success();
}

// logits [..., N, A, K], q [..., N, A], reward and discount [..., N], support [..., K] -> [..., N, K]
ffi::Error CategoricalTarget(Floats logits, Floats q, Floats reward, Floats discount, Floats support, Result target) {
  const auto dims = logits.dimensions();
  const int64_t atoms = dims[dims.size() - 1], actions = dims[dims.size() - 2], rows = dims[dims.size() - 3];
  const int64_t padded = Padded(atoms);
  const int32_t highest_index = static_cast<int32_t>(atoms - 1);
  const Row row(atoms);
  scratch.Begin(7 * (padded + kLanes + 16));
  float *z = scratch.Take(padded), *mass = scratch.Take(padded), *stays = scratch.Take(padded);
  float *moves = scratch.Take(padded), *lower_sum = scratch.Take(padded);
  float* upper_sum = scratch.Take(padded + kLanes) + kLanes;  // one atom up: what is at -1 is 0
  float* index = scratch.Take(padded);
  for (int64_t b = 0; b < Leading(logits, 3); ++b) {
    row.Read(support.typed_data() + b * atoms, [&](int64_t k, Vec v) { Store(z + k, v); });
    const Vec lowest = Spread(z[0]), highest = Spread(z[atoms - 1]);
    const Vec per_spacing = Spread(static_cast<float>(atoms - 1) / (z[atoms - 1] - z[0]));
    for (int64_t r = b * rows; r < (b + 1) * rows; ++r) {
      const int64_t best = Best(q.typed_data() + r * actions, actions);
      const Softmax softmax =
          Exponentials(row, logits.typed_data() + (r * actions + best) * atoms,
                       [&](int64_t k, Vec e) __attribute__((always_inline)) { Store(mass + k, e); });
      const Vec base = Spread(reward.typed_data()[r]), factor = Spread(discount.typed_data()[r]);
      const Vec scale = Spread(1.0f / softmax.total);
      for (int64_t k = 0; k < padded; k += kLanes) {
        const Vec value = Max(lowest, Min(highest, factor * Load(z + k) + base));
        const Vec position = (value - lowest) * per_spacing, probability = Load(mass + k) * scale;
        // Within the support whatever the rounding, and NaN, which is no index.
        Whole lower = __builtin_convertvector(position, Whole);
        lower = lower > highest_index ? Whole{} + highest_index : lower;
        lower = lower < 0 ? Whole{} : lower;
        const Vec share = (position - __builtin_convertvector(lower, Vec)) * probability;
        Store(moves + k, share);
        Store(stays + k, probability - share);
        Store(index + k, (Vec)lower);
        Store(lower_sum + k, Vec{});
        Store(upper_sum + k, Vec{});
      }
      // Two sums, as in one most atoms would wait for the last one's.
      for (int64_t k = 0; k < atoms; ++k) {
        int32_t at;
        std::memcpy(&at, index + k, sizeof(at));
        lower_sum[at] += stays[k];
        upper_sum[at] += moves[k];
      }
      upper_sum[-1] = 0.0f;
      float* out = target->typed_data() + r * atoms;
      for (int64_t k = 0; k < padded; k += kLanes) row.Write(out, k, Load(lower_sum + k) + Load(upper_sum + k - 1));
    }
  }
  return ffi::Error::Success();
}

// logits [..., N, A, K], action [..., N], target [..., N, K] -> cross-entropy and divergence [..., N], and the gradient
// of the former [..., N, A, K].
ffi::Error CategoricalLoss(Floats logits, Integers action, Floats target, Result cross_entropy, Result divergence,
                           Result grad) {
  const auto dims = logits.dimensions();
  const int64_t atoms = dims[dims.size() - 1], actions = dims[dims.size() - 2];
  const Row row(atoms);
  scratch.Begin(Padded(atoms));
  float* mass = scratch.Take(Padded(atoms));
  std::fill_n(grad->typed_data(), grad->element_count(), 0.0f);
  for (int64_t r = 0; r < Leading(logits, 2); ++r) {
    const int64_t taken = std::clamp<int64_t>(action.typed_data()[r], 0, actions - 1);
    const float* x = logits.typed_data() + (r * actions + taken) * atoms;
    float* slope = grad->typed_data() + (r * actions + taken) * atoms;
    const Softmax softmax =
        Exponentials(row, x, [&](int64_t k, Vec e) __attribute__((always_inline)) { Store(mass + k, e); });
    // sum t log p = sum t (x - largest) - log(sum of exponentials) sum t; own is sum t log t
    Vec products{}, own{}, total{};
    const float* t = target.typed_data() + r * atoms;
    row.Read(t, [&](int64_t k, Vec v) __attribute__((always_inline)) {
      const Vec logit = k < row.last ? Load(x + k) : LoadMasked(x + k, row.mask);
      products = Fma(v, logit - softmax.largest, products);
      own = Fma(v, v > 0.0f ? Log(v) : Vec{}, own);
      total += v;
    });
    const float sum = Total(total), crossed = std::log(softmax.total) * sum - Total(products);
    cross_entropy->typed_data()[r] = crossed;
    divergence->typed_data()[r] = crossed + Total(own);
    const Vec scale = Spread(sum / softmax.total);
    row.Read(t, [&](int64_t k, Vec v)
                    __attribute__((always_inline)) { row.Write(slope, k, Fma(Load(mass + k), scale, -v)); });
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jrl_categorical_mean, CategoricalMean,
                              ffi::Ffi::Bind().Arg<Floats>().Arg<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jrl_categorical_target, CategoricalTarget,
    ffi::Ffi::Bind().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jrl_categorical_loss, CategoricalLoss,
    ffi::Ffi::Bind().Arg<Floats>().Arg<Integers>().Arg<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>());
