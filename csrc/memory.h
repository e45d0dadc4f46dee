// Large buffers that the next call reuses.
//
// The C library gives memory of this size back to the system when it is freed, and a training
// step would spend a tenth of its time on faulting hundreds of megabytes of pages in again.
#pragma once

#include <ATen/core/Tensor.h>

namespace looped_fast {

// An uninitialised CPU tensor (filled with NaN if torch is set to fill such memory). When it dies
// its memory is kept for the next one of as many bytes. A few are kept, 1 GiB at most, each until
// another size near its own is requested.
at::Tensor empty_recycled(at::IntArrayRef sizes, at::ScalarType dtype);

// Frees the memory that is kept.
void free_recycled();

}  // namespace looped_fast
