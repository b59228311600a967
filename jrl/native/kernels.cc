// All kernels as one library: compiling the headers of XLA takes longer than most of them.

#include "adam.cc"
#include "categorical.cc"
#include "mean.cc"
#include "mlp.cc"
#include "noise.cc"
#include "threefry.cc"
