// A multilayer perceptron, forward and backward, a block of rows through all layers while it is in the cache.
//
// Large products have one form: one operand is read number by number and spread over a vector, the other is read as
// vectors, and a tile of sums stays in the registers. Activations of hidden layers are padded with zeros to whole
// vectors. What a row comes to does not depend on how many there are.
//
// Compiled and called by native.py, which says what the arguments are.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTile = 12;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTile = 6;
#else
constexpr int kLanes = 4, kTile = 6;
#endif
constexpr int kBlock = 48;    // rows: of 64 units, with the weights of one such layer, they fit 32 KB
constexpr int kFewRows = 32;  // below, reordering the weights would cost as much as the product
constexpr int kMaxLayers = 8;
constexpr int kPanel = 2 * kLanes;

// Compilers give up inlining somewhere in so many tiles, and a call there costs half as much again.
#define JRL_INLINE inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
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

// The smaller and the larger; NaN in x stays.
#if defined(__AVX__) && !defined(__AVX512F__)
JRL_INLINE Vec Min(Vec bound, Vec x) { return _mm256_min_ps(bound, x); }
JRL_INLINE Vec Max(Vec bound, Vec x) { return _mm256_max_ps(bound, x); }
#else
JRL_INLINE Vec Min(Vec bound, Vec x) { return bound < x ? bound : x; }
JRL_INLINE Vec Max(Vec bound, Vec x) { return bound > x ? bound : x; }
#endif

// x P(x^2) / Q(x^2), fitted for the smallest relative error up to 7.9, 2e-8 before rounding, where tanh is 1 - 3e-7.
JRL_INLINE Vec Tanh(Vec x) {
  const Vec bound = Spread(7.9f);
  x = Max(-bound, Min(bound, x));
  const Vec u = x * x;
  Vec p = Fma(Spread(2.410557935e-11f), u, Spread(-1.490642313e-08f));
  p = Fma(p, u, Spread(9.939255738e-06f));
  p = Fma(p, u, Spread(2.992105325e-03f));
  p = Fma(p, u, Spread(1.298491755e-01f));
  p = Fma(p, u, Spread(1.0f));
  Vec q = Fma(Spread(2.380879349e-04f), u, Spread(2.405312780e-02f));
  q = Fma(q, u, Spread(4.631823550e-01f));
  q = Fma(q, u, Spread(1.0f));
  return x * p / q;
}

enum Activation : int64_t { kTanh = 0, kRelu = 1 };

template <int A>
JRL_INLINE Vec Act(Vec x) {
  if constexpr (A == kTanh) return Tanh(x);
  return Max(Vec{}, x);
}

// The derivative, from the activation's value.
template <int A>
JRL_INLINE Vec Slope(Vec y) {
  if constexpr (A == kTanh) return Fma(-y, y, Spread(1.0f));
  return y > 0.0f ? Spread(1.0f) : Vec{};
}

// Sums over the columns of a: out[m, :] = bias + sum_f a[m, f] w[f, :].
template <int M, int V, typename Finish>
JRL_INLINE void RowsTile(const float* __restrict a, int64_t lda, int64_t size, const float* __restrict w, int64_t ldw,
                         const float* bias, Finish finish) {
  Vec sum[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) sum[m][v] = bias ? Load(bias + v * kLanes) : Vec{};
  for (int64_t f = 0; f < size; ++f) {
    Vec column[V];
    for (int v = 0; v < V; ++v) column[v] = Load(w + f * ldw + v * kLanes);
    for (int m = 0; m < M; ++m) {
      const Vec x = Spread(a[m * lda + f]);
      for (int v = 0; v < V; ++v) sum[m][v] = Fma(x, column[v], sum[m][v]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) finish(m, v, sum[m][v]);
}

template <int V, int M = kTile, typename Finish>
JRL_INLINE void RowsTail(int64_t rows, const float* a, int64_t lda, int64_t size, const float* w, int64_t ldw,
                         const float* bias, Finish finish) {
  if constexpr (M > 0) {
    if (rows == M) return RowsTile<M, V>(a, lda, size, w, ldw, bias, finish);
    RowsTail<V, M - 1>(rows, a, lda, size, w, ldw, bias, finish);
  }
}

// finish(row, first column, sums) is called for each vector of a W + bias; W as Pack orders it if packed.
template <typename Finish>
inline void Product(int64_t rows, const float* a, int64_t lda, int64_t size, const float* weights, bool packed,
                    int64_t columns, const float* bias, Finish finish) {
  for (int64_t c = 0; c < columns; c += kPanel) {
    const bool whole = c + kPanel <= columns;
    const int64_t ldw = !packed ? columns : whole ? kPanel : kLanes;
    const float* w = weights + (packed ? c * size : c);
    const float* b = bias ? bias + c : nullptr;
    int64_t r = 0;
    for (; r + kTile <= rows; r += kTile) {
      auto at = [&](int m, int v, Vec sum) __attribute__((always_inline)) { finish(r + m, c + v * kLanes, sum); };
      if (whole)
        RowsTile<kTile, 2>(a + r * lda, lda, size, w, ldw, b, at);
      else
        RowsTile<kTile, 1>(a + r * lda, lda, size, w, ldw, b, at);
    }
    auto at = [&](int m, int v, Vec sum) __attribute__((always_inline)) { finish(r + m, c + v * kLanes, sum); };
    if (whole)
      RowsTail<2>(rows - r, a + r * lda, lda, size, w, ldw, b, at);
    else
      RowsTail<1>(rows - r, a + r * lda, lda, size, w, ldw, b, at);
  }
}

// Sums over rows: out[m, :] += sum_r a[r, m] b[r, :].
template <int M, int V>
JRL_INLINE void OuterTile(int64_t rows, const float* __restrict a, int64_t lda, const float* __restrict b, int64_t ldb,
                          float* __restrict out, int64_t ldo) {
  Vec sum[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) sum[m][v] = Load(out + m * ldo + v * kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    Vec column[V];
    for (int v = 0; v < V; ++v) column[v] = Load(b + r * ldb + v * kLanes);
    for (int m = 0; m < M; ++m) {
      const Vec x = Spread(a[r * lda + m]);
      for (int v = 0; v < V; ++v) sum[m][v] = Fma(x, column[v], sum[m][v]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) Store(out + m * ldo + v * kLanes, sum[m][v]);
}

template <int V, int M = kTile>
JRL_INLINE void OuterTail(int64_t left, int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb,
                          float* out, int64_t ldo) {
  if constexpr (M > 0) {
    if (left == M) return OuterTile<M, V>(rows, a, lda, b, ldb, out, ldo);
    OuterTail<V, M - 1>(left, rows, a, lda, b, ldb, out, ldo);
  }
}

// out [size, columns] += a^T b, of a [rows, size] and b [rows, columns].
inline void Outer(int64_t rows, const float* a, int64_t lda, int64_t size, const float* b, int64_t ldb, int64_t columns,
                  float* out, int64_t ldo) {
  for (int64_t f = 0; f < size; f += kTile) {
    const int64_t left = std::min<int64_t>(kTile, size - f);
    for (int64_t c = 0; c < columns; c += kPanel) {
      float* o = out + f * ldo + c;
      if (c + kPanel <= columns)
        left == kTile ? OuterTile<kTile, 2>(rows, a + f, lda, b + c, ldb, o, ldo)
                      : OuterTail<2>(left, rows, a + f, lda, b + c, ldb, o, ldo);
      else
        left == kTile ? OuterTile<kTile, 1>(rows, a + f, lda, b + c, ldb, o, ldo)
                      : OuterTail<1>(left, rows, a + f, lda, b + c, ldb, o, ldo);
    }
  }
}

// out [columns] += the sum of the rows of a [rows, columns]; several columns at a time, as one sum waits for itself.
template <int V>
JRL_INLINE void AddRowsTile(int64_t rows, const float* __restrict a, int64_t lda, float* __restrict out) {
  Vec sum[V];
  for (int v = 0; v < V; ++v) sum[v] = Load(out + v * kLanes);
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < V; ++v) sum[v] += Load(a + r * lda + v * kLanes);
  for (int v = 0; v < V; ++v) Store(out + v * kLanes, sum[v]);
}

inline void AddRows(int64_t rows, const float* a, int64_t columns, float* out) {
  int64_t c = 0;
  for (; c + 8 * kLanes <= columns; c += 8 * kLanes) AddRowsTile<8>(rows, a + c, columns, out + c);
  for (; c < columns; c += kLanes) AddRowsTile<1>(rows, a + c, columns, out + c);
}

JRL_INLINE float Total(Vec x) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// As Product, for fewer columns than a vector has lanes: a is padded with zeros, w [columns, size] transposed,
// likewise.
template <int M>
JRL_INLINE void NarrowTile(const float* __restrict a, int64_t size, const float* __restrict w, int64_t columns,
                           const float* bias, float* y) {
  for (int64_t c = 0; c < columns; ++c) {
    Vec sum[M] = {};
    for (int64_t f = 0; f < size; f += kLanes) {
      const Vec column = Load(w + c * size + f);
      for (int m = 0; m < M; ++m) sum[m] = Fma(Load(a + m * size + f), column, sum[m]);
    }
    for (int m = 0; m < M; ++m) y[m * columns + c] = bias[c] + Total(sum[m]);
  }
}

inline void Narrow(int64_t rows, const float* a, int64_t size, const float* w, int64_t columns, const float* bias,
                   float* y) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) NarrowTile<4>(a + r * size, size, w, columns, bias, y + r * columns);
  for (; r < rows; ++r) NarrowTile<1>(a + r * size, size, w, columns, bias, y + r * columns);
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

// w [size, columns] as panels [size, kPanel] side by side, the last one [size, kLanes] if that is enough.
void Pack(const float* w, int64_t size, int64_t columns, float* panels) {
  const int64_t padded = Padded(columns);
  for (int64_t c = 0; c < padded; c += kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, padded - c), real = std::min<int64_t>(width, columns - c);
    for (int64_t f = 0; f < size; ++f, panels += width) {
      std::memcpy(panels, w + f * columns + c, real * sizeof(float));
      std::fill(panels + real, panels + width, 0.0f);
    }
  }
}

// The same of w's transpose: w [columns, size].
void PackTransposed(const float* w, int64_t size, int64_t columns, float* panels) {
  const int64_t padded = Padded(columns);
  for (int64_t c = 0; c < padded; c += kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, padded - c), real = std::min<int64_t>(width, columns - c);
    int64_t f = 0;
#if defined(__SSE__)
    for (; f + 4 <= size && real == width; f += 4, panels += 4 * width)
      for (int64_t i = 0; i < width; i += 4) {
        const float* from = w + (c + i) * size + f;
        __m128 r0 = _mm_loadu_ps(from), r1 = _mm_loadu_ps(from + size);
        __m128 r2 = _mm_loadu_ps(from + 2 * size), r3 = _mm_loadu_ps(from + 3 * size);
        _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
        _mm_storeu_ps(panels + i, r0), _mm_storeu_ps(panels + width + i, r1);
        _mm_storeu_ps(panels + 2 * width + i, r2), _mm_storeu_ps(panels + 3 * width + i, r3);
      }
#endif
    for (; f < size; ++f, panels += width) {
      for (int64_t i = 0; i < real; ++i) panels[i] = w[(c + i) * size + f];
      std::fill(panels + real, panels + width, 0.0f);
    }
  }
}

struct Shape {
  int64_t batch, rows, layers;
  int64_t sizes[kMaxLayers + 1];  // of x, hidden layers, output
};

template <int A>
void ForwardOne(const Shape& s, const float* x, const float* const* kernels, const float* const* biases, float* y,
                float* const* kept) {
  const int64_t layers = s.layers, outputs = s.sizes[layers];
  const bool narrow = outputs < kLanes;
  size_t need = 0;
  for (int64_t l = 0; l < layers; ++l) need += (Padded(s.sizes[l]) + 1 + kBlock) * Padded(s.sizes[l + 1]) + 48;
  scratch.Begin(need);
  const float *weights[kMaxLayers], *bias[kMaxLayers];
  float* hidden[kMaxLayers];
  bool packed[kMaxLayers];
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t size = s.sizes[l], columns = s.sizes[l + 1], padded = Padded(columns);
    weights[l] = kernels[l], bias[l] = biases[l];
    if (narrow && l + 1 == layers) {
      float* space = scratch.Take(columns * Padded(size));
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t f = 0; f < size; ++f) space[c * Padded(size) + f] = kernels[l][f * columns + c];
        std::fill(space + c * Padded(size) + size, space + (c + 1) * Padded(size), 0.0f);
      }
      weights[l] = space;
      break;
    }
    packed[l] = padded != columns || s.rows >= kFewRows;
    if (packed[l]) {
      float* space = scratch.Take(size * padded);
      Pack(kernels[l], size, columns, space);
      weights[l] = space;
    }
    if (padded != columns) {
      float* space = scratch.Take(padded);
      Pack(biases[l], 1, columns, space);
      bias[l] = space;
    }
    hidden[l] = l + 1 < layers && kept[l] ? kept[l] : scratch.Take(kBlock * padded);
  }
  for (int64_t first = 0; first < s.rows; first += kBlock) {
    const int64_t rows = std::min<int64_t>(kBlock, s.rows - first);
    const float* in = x + first * s.sizes[0];
    int64_t ld = s.sizes[0];
    for (int64_t l = 0; l + 1 < layers; ++l) {
      const int64_t columns = s.sizes[l + 1], padded = Padded(columns);
      float* out = hidden[l] + (kept[l] ? first * padded : 0);
      Product(rows, in, ld, s.sizes[l], weights[l], packed[l], padded, bias[l],
              [&](int64_t r, int64_t c, Vec sum) __attribute__((always_inline)) {
                // What pads must be 0 even where an input is infinite.
                Store(out + r * padded + c, Act<A>(c + kLanes <= columns ? sum : First(sum, columns - c)));
              });
      in = out;
      ld = padded;
    }
    const int64_t l = layers - 1, padded = Padded(outputs);
    float* out = y + first * outputs;
    if (narrow) {
      Narrow(rows, in, ld, weights[l], outputs, bias[l], out);
      continue;
    }
    Product(rows, in, ld, s.sizes[l], weights[l], packed[l], padded, bias[l],
            [&](int64_t r, int64_t c, Vec sum)
                __attribute__((always_inline)) { Store(hidden[l] + r * padded + c, sum); });
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * outputs, hidden[l] + r * padded, outputs * sizeof(float));
  }
}

template <int A>
void BackwardOne(const Shape& s, const float* x, const float* const* kernels, const float* const* kept, const float* dy,
                 float* const* kernel_grads, float* const* bias_grads) {
  const int64_t layers = s.layers;
  const bool narrow = s.sizes[layers] < kLanes;
  size_t need = 0;
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t in = Padded(s.sizes[l]), out = Padded(s.sizes[l + 1]);
    need += 2 * in * out + (1 + kBlock) * out + 96;
  }
  scratch.Begin(need);
  float *panels[kMaxLayers], *grads[kMaxLayers], *biases[kMaxLayers], *delta[kMaxLayers];
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t size = s.sizes[l], columns = s.sizes[l + 1], padded = Padded(columns);
    if (l > 0) PackTransposed(kernels[l], columns, size, panels[l] = scratch.Take(Padded(size) * columns));
    const bool transposed = narrow && l + 1 == layers;
    const int64_t count = transposed ? columns * Padded(size) : size * padded;
    grads[l] = !transposed && padded == columns ? kernel_grads[l] : scratch.Take(count);
    std::fill_n(grads[l], count, 0.0f);
    std::fill_n(biases[l] = scratch.Take(padded), padded, 0.0f);
    delta[l] = scratch.Take(kBlock * padded);
  }
  for (int64_t first = 0; first < s.rows; first += kBlock) {
    const int64_t rows = std::min<int64_t>(kBlock, s.rows - first);
    const int64_t outputs = s.sizes[layers], padded_outputs = Padded(outputs);
    float* last = delta[layers - 1];
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(last + r * padded_outputs, dy + (first + r) * outputs, outputs * sizeof(float));
      std::fill(last + r * padded_outputs + outputs, last + (r + 1) * padded_outputs, 0.0f);
    }
    for (int64_t l = layers - 1; l >= 0; --l) {
      const int64_t size = s.sizes[l], columns = s.sizes[l + 1], padded = Padded(columns);
      const int64_t ld = l > 0 ? Padded(size) : size;
      const float* in = l > 0 ? kept[l - 1] + first * ld : x + first * size;
      if (narrow && l + 1 == layers)
        Outer(rows, delta[l], padded, columns, in, ld, ld, grads[l], ld);
      else
        Outer(rows, in, ld, size, delta[l], padded, padded, grads[l], padded);
      AddRows(rows, delta[l], padded, biases[l]);
      if (l > 0) {
        float* out = delta[l - 1];
        Product(rows, delta[l], padded, columns, panels[l], true, ld, nullptr,
                [&](int64_t r, int64_t c, Vec sum)
                    __attribute__((always_inline)) { Store(out + r * ld + c, sum * Slope<A>(Load(in + r * ld + c))); });
      }
    }
  }
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t size = s.sizes[l], columns = s.sizes[l + 1], padded = Padded(columns);
    std::memcpy(bias_grads[l], biases[l], columns * sizeof(float));
    if (narrow && l + 1 == layers) {
      for (int64_t f = 0; f < size; ++f)
        for (int64_t c = 0; c < columns; ++c) kernel_grads[l][f * columns + c] = grads[l][c * Padded(size) + f];
    } else if (grads[l] != kernel_grads[l]) {
      for (int64_t f = 0; f < size; ++f)
        std::memcpy(kernel_grads[l] + f * columns, grads[l] + f * padded, columns * sizeof(float));
    }
  }
}

// The sizes by the leading dimensions of x, which all arguments have, and by the last of each kernel.
Shape ShapeOf(const ffi::AnyBuffer& x, ffi::RemainingArgs weights, size_t first_kernel, size_t step, size_t layers) {
  Shape s;
  const auto dims = x.dimensions();
  s.batch = 1;
  for (size_t i = 0; i + 2 < dims.size(); ++i) s.batch *= dims[i];
  s.rows = dims[dims.size() - 2];
  s.layers = layers;
  s.sizes[0] = dims[dims.size() - 1];
  for (size_t l = 0; l < layers; ++l)
    s.sizes[l + 1] = weights.get<ffi::AnyBuffer>(first_kernel + l * step)->dimensions().back();
  return s;
}

// x, then kernel and bias of each layer -> y, then, if asked for, the activations of each hidden layer.
ffi::Error Forward(int64_t activation, ffi::AnyBuffer x, ffi::RemainingArgs weights, ffi::RemainingRets outs) {
  const size_t layers = weights.size() / 2;
  const Shape s = ShapeOf(x, weights, 0, 2, layers);
  const float *kernels[kMaxLayers], *biases[kMaxLayers];
  float* kept[kMaxLayers];
  for (int64_t b = 0; b < s.batch; ++b) {
    for (size_t l = 0; l < layers; ++l) {
      kernels[l] = weights.get<ffi::AnyBuffer>(2 * l)->typed_data<float>() + b * s.sizes[l] * s.sizes[l + 1];
      biases[l] = weights.get<ffi::AnyBuffer>(2 * l + 1)->typed_data<float>() + b * s.sizes[l + 1];
      kept[l] = nullptr;
      if (outs.size() > 1 && l + 1 < layers)
        kept[l] = (*outs.get<ffi::AnyBuffer>(1 + l))->typed_data<float>() + b * s.rows * Padded(s.sizes[l + 1]);
    }
    float* y = (*outs.get<ffi::AnyBuffer>(0))->typed_data<float>() + b * s.rows * s.sizes[layers];
    const float* rows = x.typed_data<float>() + b * s.rows * s.sizes[0];
    if (activation == kTanh)
      ForwardOne<kTanh>(s, rows, kernels, biases, y, kept);
    else
      ForwardOne<kRelu>(s, rows, kernels, biases, y, kept);
  }
  return ffi::Error::Success();
}

// x, dy, kernels, activations of the hidden layers -> gradients of kernel and bias of each layer.
ffi::Error Backward(int64_t activation, ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::RemainingArgs rest,
                    ffi::RemainingRets outs) {
  const size_t layers = outs.size() / 2;
  const Shape s = ShapeOf(x, rest, 0, 1, layers);
  const float *kernels[kMaxLayers], *kept[kMaxLayers];
  float *kernel_grads[kMaxLayers], *bias_grads[kMaxLayers];
  for (int64_t b = 0; b < s.batch; ++b) {
    for (size_t l = 0; l < layers; ++l) {
      const int64_t count = s.sizes[l] * s.sizes[l + 1];
      kernels[l] = rest.get<ffi::AnyBuffer>(l)->typed_data<float>() + b * count;
      if (l + 1 < layers)
        kept[l] = rest.get<ffi::AnyBuffer>(layers + l)->typed_data<float>() + b * s.rows * Padded(s.sizes[l + 1]);
      kernel_grads[l] = (*outs.get<ffi::AnyBuffer>(2 * l))->typed_data<float>() + b * count;
      bias_grads[l] = (*outs.get<ffi::AnyBuffer>(2 * l + 1))->typed_data<float>() + b * s.sizes[l + 1];
    }
    const float* rows = x.typed_data<float>() + b * s.rows * s.sizes[0];
    const float* grad = dy.typed_data<float>() + b * s.rows * s.sizes[layers];
    if (activation == kTanh)
      BackwardOne<kTanh>(s, rows, kernels, kept, grad, kernel_grads, bias_grads);
    else
      BackwardOne<kRelu>(s, rows, kernels, kept, grad, kernel_grads, bias_grads);
  }
  return ffi::Error::Success();
}

}  // namespace

extern "C" int jrl_lanes() { return kLanes; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jrl_mlp_forward, Forward,
    ffi::Ffi::Bind().Attr<int64_t>("activation").Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jrl_mlp_backward, Backward,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("activation")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());
