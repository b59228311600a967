// JAX's default random number generator, on vectors of counters.

#ifndef JRL_NATIVE_THREEFRY_H_
#define JRL_NATIVE_THREEFRY_H_

#include <cstdint>

#include "vectors.h"

namespace {

typedef uint32_t Word __attribute__((vector_size(kLanes * sizeof(uint32_t))));

struct Block {
  Word a, b;
};

// Threefry-2x32 with 20 rounds (Salmon et al., 2011), of the counters (0, count).
JRL_INLINE Block Threefry(Word key0, Word key1, Word count) {
  const Word keys[3] = {key0, key1, key0 ^ key1 ^ 0x1BD11BDA};
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  Word a = key0, b = count + key1;
  for (uint32_t i = 0; i < 5; ++i) {
    for (int rotation : kRotations[i % 2]) {
      a += b;
      b = a ^ ((b << rotation) | (b >> (32 - rotation)));
    }
    a += keys[(i + 1) % 3];
    b += keys[(i + 2) % 3] + i + 1;
  }
  return {a, b};
}

}  // namespace

#endif  // JRL_NATIVE_THREEFRY_H_
