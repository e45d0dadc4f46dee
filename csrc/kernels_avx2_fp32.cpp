// Compiled with flags of its own: see ISA_FLAGS in setup.py.
#include "make_engine.h"

namespace looped_fast {

const Engine kEnginesAvx2Fp32[2] = {make_engine<float, Gpt2Block>(), make_engine<float, TrmBlock>()};

}  // namespace looped_fast
