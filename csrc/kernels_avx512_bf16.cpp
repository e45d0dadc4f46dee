// Compiled with flags of its own: see ISA_FLAGS in setup.py.
#include "make_engine.h"

namespace looped_fast {

const Engine kEnginesAvx512Bf16[2] = {make_engine<at::BFloat16, Gpt2Block>(), make_engine<at::BFloat16, TrmBlock>()};

}  // namespace looped_fast
