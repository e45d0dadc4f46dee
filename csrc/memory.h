// Large buffers that are used again by the next call.
//
// The C library gives memory of this size back to the system when it is freed, and a training
// step would spend a tenth of its time on faulting hundreds of megabytes of pages in again.
#pragma once

#include <ATen/core/Tensor.h>

namespace looped_fast {

// An uninitialised CPU tensor (filled with NaN when torch is asked to fill such memory). When it
// dies its memory is kept for the next one of the same size in bytes; a few such are kept, until
// a size near theirs is asked for.
at::Tensor empty_recycled(at::IntArrayRef sizes, at::ScalarType dtype);

// Frees what is kept.
void free_recycled();

}  // namespace looped_fast
