// Compiled with flags of its own: see ISA_FLAGS in setup.py.
#include "make_engine.h"

namespace looped_fast {

const Engine kEngineAvx512Bf16 = make_engine<at::BFloat16>();

}  // namespace looped_fast
