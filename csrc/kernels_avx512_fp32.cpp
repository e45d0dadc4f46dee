// Compiled with flags of its own: see ISA_FLAGS in setup.py.
#include "make_engine.h"

namespace looped_fast {

const Engine kEngineAvx512Fp32 = make_engine<float>();

}  // namespace looped_fast
