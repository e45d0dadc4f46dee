// Which kernels run: by the instruction set that torch uses, the operand type and the kind of block.
#pragma once

#include <string>

#include "engine.h"

namespace looped_fast {

// Why no kernels here multiply in that precision; empty if some do.
std::string unsupported(const std::string& precision);

// Throws if there are none.
const Engine& engine_for(const std::string& precision, BlockKind kind = BlockKind::kGpt2);

}  // namespace looped_fast
