// A multilayer perceptron, forward and backward, a block of rows through all layers while it is in the cache.
//
// Large products have one form: one operand is read number by number and spread over a vector, the other is read as
// vectors, and a tile of sums stays in the registers. Activations of hidden layers are padded with zeros to whole
// vectors. What a row comes to does not depend on how many there are.
//
// Boards and one-hot vectors are nearly all zeros: a block of such rows goes through the first layer by the entries
// that are none. (A weight that is infinite or NaN then shows in the rows that use it, where 0 times it would be NaN.)
//
// Compiled and called by jrl/networks/native.py, which says what the arguments are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kTile = kLanes == 16 ? 12 : 6;  // rows of a tile of sums, which has all registers but a few
constexpr int kBlock = 48;                    // rows: of 64 units, with the weights of one such layer, they fit 32 KB
constexpr int kFewRows = 32;                  // below, reordering the weights would cost as much as the product
constexpr int kMaxLayers = 8;
constexpr int kPanel = 2 * kLanes;
constexpr int kSparseFrom = 64;    // columns, below which looking for zeros costs what it saves
constexpr int kSparse = 4;         // a block is sparse if at most one entry in so many is not 0
constexpr float kEpsilon = 1e-6f;  // of layer norm, flax's

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

enum Activation : int64_t { kTanh = 0, kRelu = 1, kNone = 2 };

template <int A>
JRL_INLINE Vec Act(Vec x) {
  if constexpr (A == kTanh) return Tanh(x);
  if constexpr (A == kRelu) return Max(Vec{}, x);
  return x;
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

// out [rows, columns] = act(a W + bias), no bias if null, in whole vectors; what pads the last one is 0 even where an
// input is infinite.
template <int A>
__attribute__((noinline)) void Layer(int64_t rows, const float* a, int64_t lda, int64_t size, const float* weights,
                                     bool packed, int64_t columns, const float* bias, float* out) {
  const int64_t padded = Padded(columns);
  Product(rows, a, lda, size, weights, packed, padded, bias,
          [&](int64_t r, int64_t c, Vec sum) __attribute__((always_inline)) {
            Store(out + r * padded + c, Act<A>(c + kLanes <= columns ? sum : First(sum, columns - c)));
          });
}

// out [rows, size] = (delta W^T) act'(y), of delta [rows, padded columns] and y as out.
template <int A>
__attribute__((noinline)) void LayerBack(int64_t rows, const float* delta, int64_t ld, int64_t columns,
                                         const float* panels, int64_t size, const float* y, float* out) {
  Product(rows, delta, ld, columns, panels, true, size, nullptr,
          [&](int64_t r, int64_t c, Vec sum)
              __attribute__((always_inline)) { Store(out + r * size + c, sum * Slope<A>(Load(y + r * size + c))); });
}

// Where the entries of a block of rows are that are not 0.
typedef int32_t __attribute__((may_alias)) Index;
struct Entries {
  Index* columns;              // of all rows, one after the other
  int64_t starts[kBlock + 1];  // of each row in them
};

inline size_t EntriesFloats(int64_t size) { return kBlock * size / kSparse + size + kLanes; }

// The columns from f on whose entries are not 0, written after n; returns how many there are then.
JRL_INLINE int64_t Find(const float* x, int64_t size, Index* columns, int64_t n) {
  int64_t f = 0;
#if defined(__AVX512F__)
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (; f + 16 <= size; f += 16) {
    const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + f), _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(f)));
    // Compressed in a register: into memory it is slow on some processors. What is written too much is written over.
    _mm512_storeu_si512(columns + n, _mm512_maskz_compress_epi32(mask, at));
    n += __builtin_popcount(mask);
  }
#elif defined(__AVX__)
  for (; f + 8 <= size; f += 8) {
    const __m256 differs = _mm256_cmp_ps(_mm256_loadu_ps(x + f), _mm256_setzero_ps(), _CMP_NEQ_UQ);
    for (uint32_t mask = _mm256_movemask_ps(differs); mask; mask &= mask - 1)
      columns[n++] = static_cast<Index>(f + __builtin_ctz(mask));
  }
#endif
  for (; f < size; ++f) {
    columns[n] = static_cast<Index>(f);
    n += x[f] != 0.0f;
  }
  return n;
}

// False where there are so many that products with all of x are faster.
inline bool FindEntries(int64_t rows, const float* x, int64_t size, Entries* entries) {
  if (size < kSparseFrom) return false;
  int64_t n = 0;
  for (int64_t r = 0; r < rows; ++r) {
    entries->starts[r] = n;
    n = Find(x + r * size, size, entries->columns, n);
    if (n * kSparse > (r + 1) * size) return false;
  }
  entries->starts[rows] = n;
  return true;
}

// As RowsTile, of one row's entries and P panels side by side.
template <int P, int V>
JRL_INLINE void EntriesTile(const float* x, const Index* columns, int64_t n, const float* w, int64_t panel, int64_t ldw,
                            const float* bias, float* out) {
  Vec sum[P][V];
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) sum[p][v] = Load(bias + p * kPanel + v * kLanes);
  for (int64_t i = 0; i < n; ++i) {
    const Vec value = Spread(x[columns[i]]);
    const float* row = w + columns[i] * ldw;
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < V; ++v) sum[p][v] = Fma(value, Load(row + p * panel + v * kLanes), sum[p][v]);
  }
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) Store(out + p * kPanel + v * kLanes, sum[p][v]);
}

// As Layer<kNone>, by the entries of a [rows, size].
inline void EntriesLayer(int64_t rows, const float* a, int64_t size, const Entries& entries, const float* weights,
                         bool packed, int64_t columns, const float* bias, float* out) {
  const int64_t padded = Padded(columns);
  for (int64_t r = 0; r < rows; ++r) {
    const Index* at = entries.columns + entries.starts[r];
    const int64_t n = entries.starts[r + 1] - entries.starts[r], panel = packed ? kPanel * size : kPanel;
    const float* x = a + r * size;
    float* o = out + r * padded;
    int64_t c = 0;
    auto w = [&] { return weights + (packed ? c * size : c); };
    for (; c + 4 * kPanel <= padded; c += 4 * kPanel)
      EntriesTile<4, 2>(x, at, n, w(), panel, packed ? kPanel : columns, bias + c, o + c);
    for (; c + 2 * kPanel <= padded; c += 2 * kPanel)
      EntriesTile<2, 2>(x, at, n, w(), panel, packed ? kPanel : columns, bias + c, o + c);
    for (; c + kPanel <= padded; c += kPanel)
      EntriesTile<1, 2>(x, at, n, w(), panel, packed ? kPanel : columns, bias + c, o + c);
    if (c < padded) EntriesTile<1, 1>(x, at, n, w(), panel, packed ? kLanes : columns, bias + c, o + c);
    Store(o + padded - kLanes, First(Load(o + padded - kLanes), columns - padded + kLanes));
  }
}

// As Outer, by the entries of a.
template <int V>
JRL_INLINE void EntriesOuterTile(int64_t rows, const float* a, int64_t size, const Entries& entries, const float* b,
                                 int64_t ldb, float* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    Vec row[V];
    for (int v = 0; v < V; ++v) row[v] = Load(b + r * ldb + v * kLanes);
    for (int64_t i = entries.starts[r]; i < entries.starts[r + 1]; ++i) {
      const Vec value = Spread(a[r * size + entries.columns[i]]);
      float* o = out + entries.columns[i] * ldo;
      for (int v = 0; v < V; ++v) Store(o + v * kLanes, Fma(value, row[v], Load(o + v * kLanes)));
    }
  }
}

inline void EntriesOuter(int64_t rows, const float* a, int64_t size, const Entries& entries, const float* b,
                         int64_t padded, float* out) {
  int64_t c = 0;
  for (; c + 8 * kLanes <= padded; c += 8 * kLanes)
    EntriesOuterTile<8>(rows, a, size, entries, b + c, padded, out + c, padded);
  for (; c + 4 * kLanes <= padded; c += 4 * kLanes)
    EntriesOuterTile<4>(rows, a, size, entries, b + c, padded, out + c, padded);
  for (; c < padded; c += kLanes) EntriesOuterTile<1>(rows, a, size, entries, b + c, padded, out + c, padded);
}

// y = act(x), in place.
template <int A>
void Activate(int64_t count, float* x) {
  for (int64_t i = 0; i < count; i += kLanes) Store(x + i, Act<A>(Load(x + i)));
}

// Layer norm of one layer: parameters in whole vectors, and of each row what the backward pass needs.
struct Norm {
  const float *scale, *shift;
  float* normal;      // (z - mean) / deviation, [rows, padded]
  float* reciprocal;  // of the deviation, [rows]
};

// y = act(normal scale + shift).
template <int A>
JRL_INLINE Vec Scaled(const Norm& norm, int64_t c, Vec normal) {
  return Act<A>(Fma(normal, Load(norm.scale + c), Load(norm.shift + c)));
}

// z [R, columns] becomes y, in place; norm's rows are these. Several rows at once, as one sum waits for itself.
template <int A, int R>
JRL_INLINE void NormalizeTile(int64_t columns, const Norm& norm, float* z) {
  const int64_t padded = Padded(columns), last = padded - kLanes;
  const Whole mask = MaskOf(columns - last);
  Vec sum[R] = {}, mean[R], reciprocal[R];
  for (int64_t c = 0; c < padded; c += kLanes)
    for (int r = 0; r < R; ++r) sum[r] += Load(z + r * padded + c);
  Vec squares[R] = {};
  for (int r = 0; r < R; ++r) mean[r] = Spread(Total(sum[r]) / static_cast<float>(columns));
  for (int64_t c = 0; c < padded; c += kLanes)
    for (int r = 0; r < R; ++r) {
      Vec centred = Load(z + r * padded + c) - mean[r];
      if (c == last) centred = mask ? centred : Vec{};
      squares[r] = Fma(centred, centred, squares[r]);
    }
  for (int r = 0; r < R; ++r) {
    const float one = 1.0f / std::sqrt(Total(squares[r]) / static_cast<float>(columns) + kEpsilon);
    if (norm.reciprocal) norm.reciprocal[r] = one;
    reciprocal[r] = Spread(one);
  }
  for (int64_t c = 0; c < padded; c += kLanes)
    for (int r = 0; r < R; ++r) {
      Vec normal = (Load(z + r * padded + c) - mean[r]) * reciprocal[r];
      if (c == last) normal = mask ? normal : Vec{};
      if (norm.normal) Store(norm.normal + r * padded + c, normal);
      Store(z + r * padded + c, Scaled<A>(norm, c, normal));
    }
}

template <int A>
void Normalize(int64_t rows, int64_t columns, Norm norm, float* z) {
  const int64_t padded = Padded(columns);
  auto some = [&](auto tile, int64_t count) __attribute__((always_inline)) {
    tile(columns, norm, z);
    z += count * padded;
    if (norm.normal) norm.normal += count * padded, norm.reciprocal += count;
  };
  for (; rows >= 4; rows -= 4) some(NormalizeTile<A, 4>, 4);
  for (; rows > 0; --rows) some(NormalizeTile<A, 1>, 1);
}

// y again, of what was kept.
template <int A>
void Rescale(int64_t rows, int64_t padded, const Norm& norm, float* y) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < padded; c += kLanes)
      Store(y + r * padded + c, Scaled<A>(norm, c, Load(norm.normal + r * padded + c)));
}

// The gradient of normal scale + shift becomes that of z [R, columns], in place; those of scale and
// shift are added to.
template <int R>
JRL_INLINE void NormalizeBackTile(int64_t columns, const Norm& norm, float* delta, float* scale_grad,
                                  float* shift_grad) {
  const int64_t padded = Padded(columns), last = padded - kLanes;
  const Whole mask = MaskOf(columns - last);
  Vec sum[R] = {}, products[R] = {}, mean[R], slope[R], reciprocal[R];
  for (int64_t c = 0; c < padded; c += kLanes) {
    const Vec scale = Load(norm.scale + c);
    Vec total = Load(scale_grad + c), shift = Load(shift_grad + c);
    for (int r = 0; r < R; ++r) {
      const Vec grad = Load(delta + r * padded + c), normal = Load(norm.normal + r * padded + c), scaled = grad * scale;
      sum[r] += scaled;
      products[r] = Fma(scaled, normal, products[r]);
      total = Fma(grad, normal, total);
      shift += grad;
    }
    Store(scale_grad + c, total);
    Store(shift_grad + c, shift);
  }
  for (int r = 0; r < R; ++r) {
    mean[r] = Spread(Total(sum[r]) / static_cast<float>(columns));
    slope[r] = Spread(Total(products[r]) / static_cast<float>(columns));
    reciprocal[r] = Spread(norm.reciprocal[r]);
  }
  for (int64_t c = 0; c < padded; c += kLanes)
    for (int r = 0; r < R; ++r) {
      const Vec scaled = Load(delta + r * padded + c) * Load(norm.scale + c);
      const Vec grad = reciprocal[r] * (scaled - mean[r] - Load(norm.normal + r * padded + c) * slope[r]);
      Store(delta + r * padded + c, c == last ? (mask ? grad : Vec{}) : grad);
    }
}

// The same of all rows.
void NormalizeBack(int64_t rows, int64_t columns, Norm norm, float* delta, float* scale_grad, float* shift_grad) {
  const int64_t padded = Padded(columns);
  auto some = [&](auto tile, int64_t count) __attribute__((always_inline)) {
    tile(columns, norm, delta, scale_grad, shift_grad);
    delta += count * padded, norm.normal += count * padded, norm.reciprocal += count;
  };
  for (; rows >= 4; rows -= 4) some(NormalizeBackTile<4>, 4);
  for (; rows > 0; --rows) some(NormalizeBackTile<1>, 1);
}

// w [size, columns] as panels [size, kPanel] side by side, the last one [size, kLanes] if that is enough.
void Pack(const float* w, int64_t size, int64_t columns, float* panels) {
  const int64_t padded = Padded(columns);
  for (int64_t c = 0; c < padded; c += kPanel) {
    const bool whole = c + kPanel <= columns;
    const int64_t width = std::min<int64_t>(kPanel, padded - c);
    const Whole mask = MaskOf(columns - (padded - kLanes));
    for (int64_t f = 0; f < size; ++f, panels += width) {
      const float* from = w + f * columns + c;
      if (whole || width > kLanes) Store(panels, Load(from));
      Store(panels + width - kLanes, whole ? Load(from + kLanes) : LoadMasked(from + width - kLanes, mask));
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
    for (; f + 4 <= size; f += 4, panels += 4 * width) {
      int64_t i = 0;
      for (; i + 4 <= real; i += 4) {
        const float* from = w + (c + i) * size + f;
        __m128 r0 = _mm_loadu_ps(from), r1 = _mm_loadu_ps(from + size);
        __m128 r2 = _mm_loadu_ps(from + 2 * size), r3 = _mm_loadu_ps(from + 3 * size);
        _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
        _mm_storeu_ps(panels + i, r0), _mm_storeu_ps(panels + width + i, r1);
        _mm_storeu_ps(panels + 2 * width + i, r2), _mm_storeu_ps(panels + 3 * width + i, r3);
      }
      for (; i < width; ++i)
        for (int64_t j = 0; j < 4; ++j) panels[j * width + i] = i < real ? w[(c + i) * size + f + j] : 0.0f;
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
  bool norm;
  int64_t sizes[kMaxLayers + 1];  // of x, hidden layers, output
};

// What a call reads and writes, of each layer; null where there is none.
struct Arrays {
  const float *kernel[kMaxLayers], *bias[kMaxLayers];
  float* kept[kMaxLayers];  // activations, or with layer norm what they are made of
  Norm norm[kMaxLayers];
  float *kernel_grad[kMaxLayers], *bias_grad[kMaxLayers], *scale_grad[kMaxLayers], *shift_grad[kMaxLayers];
};

// v [columns] in whole vectors.
inline const float* PadVector(const float* v, int64_t columns) {
  if (Padded(columns) == columns) return v;
  float* space = scratch.Take(Padded(columns));
  Pack(v, 1, columns, space);
  return space;
}

void ForwardOne(const Shape& s, int64_t activation, const float* x, Arrays arrays, float* y) {
  const int64_t layers = s.layers, outputs = s.sizes[layers];
  const bool narrow = outputs < kLanes;
  size_t need = EntriesFloats(s.sizes[0]);
  for (int64_t l = 0; l < layers; ++l) need += (Padded(s.sizes[l]) + 3 + kBlock) * Padded(s.sizes[l + 1]) + 80;
  scratch.Begin(need);
  float* hidden[kMaxLayers];
  bool packed[kMaxLayers];
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t size = s.sizes[l], columns = s.sizes[l + 1], padded = Padded(columns);
    if (narrow && l + 1 == layers) {
      float* space = scratch.Take(columns * Padded(size));
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t f = 0; f < size; ++f) space[c * Padded(size) + f] = arrays.kernel[l][f * columns + c];
        std::fill(space + c * Padded(size) + size, space + (c + 1) * Padded(size), 0.0f);
      }
      arrays.kernel[l] = space;
      break;
    }
    packed[l] = padded != columns || s.rows >= kFewRows;
    if (packed[l]) {
      float* space = scratch.Take(size * padded);
      Pack(arrays.kernel[l], size, columns, space);
      arrays.kernel[l] = space;
    }
    arrays.bias[l] = PadVector(arrays.bias[l], columns);
    if (s.norm && l + 1 < layers) {
      arrays.norm[l].scale = PadVector(arrays.norm[l].scale, columns);
      arrays.norm[l].shift = PadVector(arrays.norm[l].shift, columns);
    }
    hidden[l] = arrays.kept[l] ? arrays.kept[l] : scratch.Take(kBlock * padded);
  }
  Entries entries;
  entries.columns = reinterpret_cast<Index*>(scratch.Take(EntriesFloats(s.sizes[0])));
  for (int64_t first = 0; first < s.rows; first += kBlock) {
    const int64_t rows = std::min<int64_t>(kBlock, s.rows - first);
    const float* in = x + first * s.sizes[0];
    int64_t ld = s.sizes[0];
    const bool sparse = FindEntries(rows, in, ld, &entries);
    for (int64_t l = 0; l + 1 < layers; ++l) {
      const int64_t size = s.sizes[l], columns = s.sizes[l + 1], padded = Padded(columns);
      float* out = hidden[l] + (arrays.kept[l] ? first * padded : 0);
      if (l == 0 && sparse) {
        EntriesLayer(rows, in, size, entries, arrays.kernel[l], packed[l], columns, arrays.bias[l], out);
        if (!s.norm) (activation == kTanh ? Activate<kTanh> : Activate<kRelu>)(rows * padded, out);
      } else {
        auto layer = s.norm ? Layer<kNone> : activation == kTanh ? Layer<kTanh> : Layer<kRelu>;
        layer(rows, in, ld, size, arrays.kernel[l], packed[l], columns, arrays.bias[l], out);
      }
      if (s.norm) {
        Norm norm = arrays.norm[l];
        if (norm.normal) norm.normal += first * padded, norm.reciprocal += first;
        (activation == kTanh ? Normalize<kTanh> : Normalize<kRelu>)(rows, columns, norm, out);
      }
      in = out;
      ld = padded;
    }
    const int64_t l = layers - 1, padded = Padded(outputs);
    float* out = y + first * outputs;
    if (narrow) {
      Narrow(rows, in, ld, arrays.kernel[l], outputs, arrays.bias[l], out);
      continue;
    }
    Layer<kNone>(rows, in, ld, s.sizes[l], arrays.kernel[l], packed[l], outputs, arrays.bias[l], hidden[l]);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * outputs, hidden[l] + r * padded, outputs * sizeof(float));
  }
}

// The gradients of the parameters, unless there is no place for them, and of x, unless dx is null.
void BackwardOne(const Shape& s, int64_t activation, const float* x, const float* dy, Arrays arrays, float* dx) {
  const int64_t layers = s.layers, padded_inputs = Padded(s.sizes[0]);
  const bool narrow = s.sizes[layers] < kLanes, of_parameters = arrays.kernel_grad[0] != nullptr;
  size_t need = EntriesFloats(s.sizes[0]) + kBlock * padded_inputs + 16;
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t in = Padded(s.sizes[l]), out = Padded(s.sizes[l + 1]);
    need += 2 * in * out + (5 + 2 * kBlock) * out + 160;
  }
  scratch.Begin(need);
  float *panels[kMaxLayers], *grads[kMaxLayers], *biases[kMaxLayers], *delta[kMaxLayers], *again[kMaxLayers];
  float *scales[kMaxLayers], *shifts[kMaxLayers];
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t size = s.sizes[l], columns = s.sizes[l + 1], padded = Padded(columns);
    if (l > 0 || dx) PackTransposed(arrays.kernel[l], columns, size, panels[l] = scratch.Take(Padded(size) * columns));
    if (of_parameters) {
      const bool transposed = narrow && l + 1 == layers;
      const int64_t count = transposed ? columns * Padded(size) : size * padded;
      grads[l] = !transposed && padded == columns ? arrays.kernel_grad[l] : scratch.Take(count);
      std::fill_n(grads[l], count, 0.0f);
      std::fill_n(biases[l] = scratch.Take(padded), padded, 0.0f);
    }
    delta[l] = scratch.Take(kBlock * padded);
    if (s.norm && l + 1 < layers) {
      std::fill_n(scales[l] = scratch.Take(padded), padded, 0.0f);
      std::fill_n(shifts[l] = scratch.Take(padded), padded, 0.0f);
      again[l] = scratch.Take(kBlock * padded);
      arrays.norm[l].scale = PadVector(arrays.norm[l].scale, columns);
      arrays.norm[l].shift = PadVector(arrays.norm[l].shift, columns);
    }
  }
  Entries entries;
  entries.columns = reinterpret_cast<Index*>(scratch.Take(EntriesFloats(s.sizes[0])));
  float* inputs = scratch.Take(kBlock * padded_inputs);
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
      if (s.norm && l + 1 < layers) {
        Norm norm = arrays.norm[l];
        norm.normal += first * padded, norm.reciprocal += first;
        NormalizeBack(rows, columns, norm, delta[l], scales[l], shifts[l]);
      }
      const float* in = x + first * size;
      if (l > 0 && s.norm) {
        Norm norm = arrays.norm[l - 1];
        norm.normal += first * ld;
        (activation == kTanh ? Rescale<kTanh> : Rescale<kRelu>)(rows, ld, norm, again[l - 1]);
        in = again[l - 1];
      } else if (l > 0) {
        in = arrays.kept[l - 1] + first * ld;
      }
      if (of_parameters) {
        if (narrow && l + 1 == layers)
          Outer(rows, delta[l], padded, columns, in, ld, ld, grads[l], ld);
        else if (l == 0 && FindEntries(rows, in, size, &entries))
          EntriesOuter(rows, in, size, entries, delta[l], padded, grads[l]);
        else
          Outer(rows, in, ld, size, delta[l], padded, padded, grads[l], padded);
        AddRows(rows, delta[l], padded, biases[l]);
      }
      if (l > 0) {
        auto back = activation == kTanh ? LayerBack<kTanh> : LayerBack<kRelu>;
        back(rows, delta[l], padded, columns, panels[l], ld, in, delta[l - 1]);
      } else if (dx) {
        Layer<kNone>(rows, delta[l], padded, columns, panels[l], true, size, nullptr, inputs);
        for (int64_t r = 0; r < rows; ++r)
          std::memcpy(dx + (first + r) * size, inputs + r * padded_inputs, size * sizeof(float));
      }
    }
  }
  for (int64_t l = 0; l < layers && of_parameters; ++l) {
    const int64_t size = s.sizes[l], columns = s.sizes[l + 1], padded = Padded(columns);
    std::memcpy(arrays.bias_grad[l], biases[l], columns * sizeof(float));
    if (s.norm && l + 1 < layers) {
      std::memcpy(arrays.scale_grad[l], scales[l], columns * sizeof(float));
      std::memcpy(arrays.shift_grad[l], shifts[l], columns * sizeof(float));
    }
    if (narrow && l + 1 == layers) {
      for (int64_t f = 0; f < size; ++f)
        for (int64_t c = 0; c < columns; ++c) arrays.kernel_grad[l][f * columns + c] = grads[l][c * Padded(size) + f];
    } else if (grads[l] != arrays.kernel_grad[l]) {
      for (int64_t f = 0; f < size; ++f)
        std::memcpy(arrays.kernel_grad[l] + f * columns, grads[l] + f * padded, columns * sizeof(float));
    }
  }
}

// The sizes by the leading dimensions of x, which all arguments have, and by the last of each kernel.
Shape ShapeOf(const ffi::AnyBuffer& x, ffi::RemainingArgs weights, size_t step, size_t layers, bool norm) {
  Shape s;
  const auto dims = x.dimensions();
  s.batch = 1;
  for (size_t i = 0; i + 2 < dims.size(); ++i) s.batch *= dims[i];
  s.rows = dims[dims.size() - 2];
  s.layers = layers;
  s.norm = norm;
  s.sizes[0] = dims[dims.size() - 1];
  for (size_t l = 0; l < layers; ++l) s.sizes[l + 1] = weights.get<ffi::AnyBuffer>(l * step)->dimensions().back();
  return s;
}

// x, then kernel and bias of each layer, then with layer norm scale and shift of each hidden layer -> y, then, if asked
// for, what is kept of each hidden layer, then with layer norm the reciprocals of its rows' deviations.
ffi::Error MlpForward(int64_t activation, int64_t norm, ffi::AnyBuffer x, ffi::RemainingArgs weights,
                      ffi::RemainingRets outs) {
  const size_t layers = norm ? (weights.size() + 2) / 4 : weights.size() / 2;
  const Shape s = ShapeOf(x, weights, 2, layers, norm);
  for (int64_t b = 0; b < s.batch; ++b) {
    auto in = [&](size_t i, int64_t count) { return weights.get<ffi::AnyBuffer>(i)->typed_data<float>() + b * count; };
    auto out = [&](size_t i, int64_t count) { return (*outs.get<ffi::AnyBuffer>(i))->typed_data<float>() + b * count; };
    Arrays arrays = {};
    for (size_t l = 0; l < layers; ++l) {
      const int64_t columns = s.sizes[l + 1], count = s.rows * Padded(columns);
      arrays.kernel[l] = in(2 * l, s.sizes[l] * columns);
      arrays.bias[l] = in(2 * l + 1, columns);
      if (l + 1 == layers) break;
      const bool keep = outs.size() > 1;
      if (norm) {
        arrays.norm[l].scale = in(2 * layers + 2 * l, columns);
        arrays.norm[l].shift = in(2 * layers + 2 * l + 1, columns);
        if (keep) arrays.norm[l].normal = out(1 + l, count);
        if (keep) arrays.norm[l].reciprocal = out(layers + l, s.rows);
      } else if (keep) {
        arrays.kept[l] = out(1 + l, count);
      }
    }
    ForwardOne(s, activation, x.typed_data<float>() + b * s.rows * s.sizes[0], arrays,
               out(0, s.rows * s.sizes[layers]));
  }
  return ffi::Error::Success();
}

// x, dy, the kernels, what was kept of the hidden layers, then with layer norm their scale and shift, and their rows'
// reciprocals -> if asked for, gradients of kernel and bias of each layer, then of scale and shift of each hidden
// layer; then, if asked for, the gradient of x.
ffi::Error MlpBackward(int64_t activation, int64_t norm, int64_t parameters, int64_t input, ffi::AnyBuffer x,
                       ffi::AnyBuffer dy, ffi::RemainingArgs rest, ffi::RemainingRets outs) {
  const size_t layers = norm ? (rest.size() + 4) / 5 : (rest.size() + 1) / 2;
  const Shape s = ShapeOf(x, rest, 1, layers, norm);
  for (int64_t b = 0; b < s.batch; ++b) {
    auto in = [&](size_t i, int64_t count) { return rest.get<ffi::AnyBuffer>(i)->typed_data<float>() + b * count; };
    auto out = [&](size_t i, int64_t count) { return (*outs.get<ffi::AnyBuffer>(i))->typed_data<float>() + b * count; };
    Arrays arrays = {};
    for (size_t l = 0; l < layers; ++l) {
      const int64_t columns = s.sizes[l + 1], size = s.sizes[l] * columns;
      arrays.kernel[l] = in(l, size);
      if (parameters) {
        arrays.kernel_grad[l] = out(2 * l, size);
        arrays.bias_grad[l] = out(2 * l + 1, columns);
      }
      if (l + 1 == layers) break;
      float* kept = in(layers + l, s.rows * Padded(columns));
      if (norm) {
        const size_t first = 2 * layers - 1;
        arrays.norm[l] = {in(first + 2 * l, columns), in(first + 2 * l + 1, columns), kept,
                          in(first + 2 * (layers - 1) + l, s.rows)};
        if (parameters) {
          arrays.scale_grad[l] = out(2 * layers + 2 * l, columns);
          arrays.shift_grad[l] = out(2 * layers + 2 * l + 1, columns);
        }
      } else {
        arrays.kept[l] = kept;
      }
    }
    BackwardOne(s, activation, x.typed_data<float>() + b * s.rows * s.sizes[0],
                dy.typed_data<float>() + b * s.rows * s.sizes[layers], arrays,
                input ? out(outs.size() - 1, s.rows * s.sizes[0]) : nullptr);
  }
  return ffi::Error::Success();
}

}  // namespace

extern "C" int jrl_lanes() { return kLanes; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(jrl_mlp_forward, MlpForward,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("activation")
                                  .Attr<int64_t>("norm")
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jrl_mlp_backward, MlpBackward,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("activation")
                                  .Attr<int64_t>("norm")
                                  .Attr<int64_t>("parameters")
                                  .Attr<int64_t>("input")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());
