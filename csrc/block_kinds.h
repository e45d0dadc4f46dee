// The kinds of block that kernels are compiled for. Mask, positions, eps and the hidden width are
// settings of a call.
#pragma once

#include "mlp.h"
#include "norm.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

//     x1 = x0 + Wo attn(LN1(x0)) ;  x2 = x1 + Wproj gelu(Wfc LN2(x1)), with biases
//     z' = LNf(x2)
struct Gpt2Block {
  using Norm = LayerNorm;
  using Mlp = Gelu;
  static constexpr bool kNormBefore = true;  // each sublayer and, at a step's end, the state
};

//     x1 = norm(x0 + Wo attn(x0)) ;  x2 = norm(x1 + Wproj (silu(g) u)), g and u = Wfc x1
//     z' = x2
struct TrmBlock {
  using Norm = RmsNorm;
  using Mlp = SwiGlu;
  static constexpr bool kNormBefore = false;
};

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
