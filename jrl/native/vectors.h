// Vectors as wide as this processor's, and the scratch memory of a thread: what the kernels here are written in.

#ifndef JRL_NATIVE_VECTORS_H_
#define JRL_NATIVE_VECTORS_H_

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Compilers give up inlining somewhere in so many tiles, and a call there costs half as much again.
#define JRL_INLINE inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Whole __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef float Loose __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

JRL_INLINE Vec Load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
JRL_INLINE void Store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
JRL_INLINE Vec Spread(float x) { return x - Vec{}; }  // x + 0 would not be x where that is -0
inline int64_t Padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// a b + c, rounded once where the processor can. Said, as compilers see it in some places and not in others, and then
// rows of a tail would differ from those of a tile.
JRL_INLINE Vec Fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// v, with 0 in its lanes from n on.
JRL_INLINE Vec First(Vec v, int64_t n) {
  Vec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(i);
  return lane < static_cast<float>(n) ? v : Vec{};
}

// Of the lanes before n, all bits; then none.
inline Whole MaskOf(int64_t n) {
  Whole mask;
  for (int i = 0; i < kLanes; ++i) mask[i] = i < n ? -1 : 0;
  return mask;
}

// What the mask has of a vector, and nothing behind it is touched; 0 in other lanes.
JRL_INLINE Vec LoadMasked(const float* p, Whole mask) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(_mm512_test_epi32_mask((__m512i)mask, (__m512i)mask), p);
#elif defined(__AVX__)
  return _mm256_maskload_ps(p, (__m256i)mask);
#else
  Vec v{};
  for (int i = 0; i < kLanes && mask[i]; ++i) v[i] = p[i];
  return v;
#endif
}

JRL_INLINE void StoreMasked(float* p, Vec v, Whole mask) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask), v);
#elif defined(__AVX__)
  _mm256_maskstore_ps(p, (__m256i)mask, v);
#else
  for (int i = 0; i < kLanes && mask[i]; ++i) p[i] = v[i];
#endif
}

// f(i, load, store) for each vector of n numbers; load and store have the last one's numbers only.
template <typename F>
JRL_INLINE void ForEach(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    f(i, [](const float* p) { return Load(p); }, [](float* p, Vec v) { Store(p, v); });
  if (i == n) return;
  const Whole mask = MaskOf(n - i);
  f(i, [mask](const float* p) { return LoadMasked(p, mask); }, [mask](float* p, Vec v) { StoreMasked(p, v, mask); });
}

// The smaller and the larger; NaN in x stays.
#if defined(__AVX512F__)
JRL_INLINE Vec Min(Vec bound, Vec x) { return _mm512_min_ps(bound, x); }
JRL_INLINE Vec Max(Vec bound, Vec x) { return _mm512_max_ps(bound, x); }
#elif defined(__AVX__)
JRL_INLINE Vec Min(Vec bound, Vec x) { return _mm256_min_ps(bound, x); }
JRL_INLINE Vec Max(Vec bound, Vec x) { return _mm256_max_ps(bound, x); }
#else
JRL_INLINE Vec Min(Vec bound, Vec x) { return bound < x ? bound : x; }
JRL_INLINE Vec Max(Vec bound, Vec x) { return bound > x ? bound : x; }
#endif

// op over the lanes, halves with halves. Compilers make of the loop a walk through memory.
template <typename Op>
JRL_INLINE float Joined(Vec x, Op op) {
#if defined(__AVX__)
#if defined(__AVX512F__)
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
  const __m256 eight = op(_mm512_castps512_ps256(x), high);
#else
  const __m256 eight = x;
#endif
  __m128 four = op(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = op(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(op(four, _mm_movehdup_ps(four)));
#else
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = op(x[i], x[i + half]);
  return x[0];
#endif
}

JRL_INLINE float Total(Vec x) {
  return Joined(x, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

JRL_INLINE float Largest(Vec x) {
  return Joined(x, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// To rounding; with AVX-512 from an estimate, as the processor's own takes longer.
JRL_INLINE Vec Sqrt(Vec x) {
#if defined(__AVX512F__)
  const Vec estimate = _mm512_rsqrt14_ps(x);
  Vec root = x * estimate, half = 0.5f * estimate;
  const Vec error = Fma(-root, half, Spread(0.5f));
  root = Fma(root, error, root), half = Fma(half, error, half);
  root = Fma(Fma(-root, root, x), half, root);
  return (x >= std::numeric_limits<float>::min()) & (x <= std::numeric_limits<float>::max()) ? root : x;
#elif defined(__AVX__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

constexpr int kMantissa = 23;  // bits of it

// log(x) of a normal x > 0: the exponent, and 2 artanh((m - 1) / (m + 1)) of m in [sqrt(1/2), sqrt(2)).
JRL_INLINE Vec Log(Vec x) {
  const Whole exponent = ((Whole)x - 0x3f3504f3) >> kMantissa;
  const Vec m = (Vec)((Whole)x - (exponent << kMantissa));
  const Vec s = (m - 1.0f) / (m + 1.0f), u = s * s;
  Vec series = Spread(2.0f / 9.0f);
  for (float factor : {2.0f / 7.0f, 2.0f / 5.0f, 2.0f / 3.0f, 2.0f}) series = Fma(series, u, Spread(factor));
  return Fma(__builtin_convertvector(exponent, Vec), Spread(0.69314718f), s * series);
}

// Leave the core's other thread a moment, in a loop that waits.
JRL_INLINE void Pause() {
#if defined(__SSE__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Memory of a thread, kept from call to call.
class Scratch {
 public:
  void Begin(size_t floats) {
    floats += 64;
    if (buffer_.size() < floats) buffer_.resize(floats);
    const auto base = reinterpret_cast<uintptr_t>(buffer_.data());
    next_ = reinterpret_cast<float*>((base + 63) / 64 * 64);
  }
  float* Take(size_t floats) {
    float* out = next_;
    next_ += (floats + 15) / 16 * 16;
    return out;
  }

 private:
  std::vector<float> buffer_;
  float* next_ = nullptr;
};
thread_local Scratch scratch;

}  // namespace

#endif  // JRL_NATIVE_VECTORS_H_
