// Words of JAX's default random number generator.
//
// Compiled and called by threefry.py, which says what the arguments are.

#include <algorithm>
#include <cstdint>

#include "threefry.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Words = ffi::Buffer<ffi::U32>;
using WordsResult = ffi::ResultBuffer<ffi::U32>;

// f(at, block, num) for each vector of the blocks of all keys, in order, from number `at` on. Keys share vectors, as
// few blocks of many keys, of an environment each, would leave most lanes empty.
template <typename F>
JRL_INLINE void ForEachBlock(Words keys, int64_t n, F f) {
  const int64_t batch = keys.element_count() / 2, size = batch * n;
  const uint32_t* key = keys.typed_data();
  int64_t b = 0, i = 0;  // the next block's key, and its number there
  for (int64_t at = 0; at < size; at += kLanes) {
    Word key0{}, key1{}, count{};
    if (i + kLanes <= n) {
      for (int lane = 0; lane < kLanes; ++lane) count[lane] = lane;
      key0 += key[2 * b], key1 += key[2 * b + 1], count += static_cast<uint32_t>(i);
      i += kLanes;
    } else {
      for (int lane = 0; lane < kLanes && at + lane < size; ++lane) {
        if (i == n) ++b, i = 0;
        key0[lane] = key[2 * b], key1[lane] = key[2 * b + 1], count[lane] = static_cast<uint32_t>(i++);
      }
    }
    f(at, Threefry(key0, key1, count), std::min<int64_t>(kLanes, size - at));
  }
}

// keys [..., 2] -> [..., n]
ffi::Error ThreefryBits(Words keys, WordsResult bits) {
  if (keys.element_count() == 0) return ffi::Error::Success();
  uint32_t* out = bits->typed_data();
  ForEachBlock(keys, bits->element_count() / (keys.element_count() / 2), [&](int64_t at, Block block, int64_t num)
                                                                             __attribute__((always_inline)) {
    const Vec joined = (Vec)(block.a ^ block.b);
    float* to = reinterpret_cast<float*>(out + at);
    num == kLanes ? Store(to, joined) : StoreMasked(to, joined, MaskOf(num));
  });
  return ffi::Error::Success();
}

// keys [..., 2] -> [..., n, 2]
ffi::Error ThreefrySplit(Words keys, WordsResult children) {
  if (keys.element_count() == 0) return ffi::Error::Success();
  uint32_t* out = children->typed_data();
  ForEachBlock(keys, children->element_count() / keys.element_count(), [&](int64_t at, Block block, int64_t num)
                                                                           __attribute__((always_inline)) {
    for (int64_t lane = 0; lane < num; ++lane) {
      out[2 * (at + lane)] = block.a[lane];
      out[2 * (at + lane) + 1] = block.b[lane];
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jrl_threefry_bits, ThreefryBits, ffi::Ffi::Bind().Arg<Words>().Ret<Words>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jrl_threefry_split, ThreefrySplit, ffi::Ffi::Bind().Arg<Words>().Ret<Words>());
