// What the CPU engine computes, in plain C++: no torch types, so that kernels compile fast.
//
// The engine runs `states = loop(embeddings, positions, state, weights)` (see
// looped_fast/ops/reference.py), then a read-out of the states if there is one, and their gradient.
// Its kernels are templates over the operand type of matrix products (float or at::BFloat16) and
// the kind of block (block_kinds.h), compiled once per instruction set (kernels_*.cpp) and reached
// through the function tables `Engine`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace looped_fast {

enum class Injection : int64_t { kAdd, kMul, kNone, kEveryBlock };  // order of config.INJECTIONS

enum class Mask : int64_t { kCausal, kFull };

struct LoopShape {
  int64_t batch;     // B
  int64_t seq_len;   // S
  int64_t n_embd;    // D, a multiple of 32
  int64_t n_heads;   // H
  int64_t n_layer;   // L, blocks in one loop step
  int64_t n_loops;   // b
  int64_t window;    // W, last steps, which are returned and differentiated
  Injection injection;
  Mask mask;
  float norm_eps;
  int64_t n_hidden;   // F, of the MLP; a multiple of 32, and of 64 without gates
  int64_t fc_width;   // outputs of the MLP's first Linear: F, or 2 F with gates
  int64_t n_outputs;  // of the read-out; 0 without one: states are returned
  int64_t n_queries;  // last tokens of a sequence, which see tokens before them all, and themselves
  bool is_packed;     // Inputs::packed is given

  int64_t head_dim() const { return n_embd / n_heads; }
  bool has_gates() const { return fc_width > n_hidden; }
  int64_t n_tokens() const { return batch * seq_len; }
  int64_t n_x() const { return (seq_len + 1) / 2; }  // x tokens, the even ones of a sequence
};

// One block's tensors, parameters or their gradients; null where the kind of block has none.
template <class Float>
struct Block {
  Float* ln_1_weight;         // [D]
  Float* ln_1_bias;           // [D]
  Float* c_attn_weight;       // [3D, D], rows are q, k, v
  Float* c_attn_bias;         // [3D]
  Float* attn_c_proj_weight;  // [D, D]
  Float* attn_c_proj_bias;    // [D]
  Float* ln_2_weight;         // [D]
  Float* ln_2_bias;           // [D]
  Float* c_fc_weight;         // [fc_width, D]; rows of gates come first
  Float* c_fc_bias;           // [fc_width]
  Float* mlp_c_proj_weight;   // [D, F]
  Float* mlp_c_proj_bias;     // [D]
};

struct Inputs {
  const float* embeddings;            // [B, S, D]
  const float* positions;             // [S, D]
  const float* rotation;              // [2, S, head_dim], cosines and sines, or null
  const float* state;                 // [B, S, D], z before the first step
  const Block<const float>* blocks;   // [L]
  const float* ln_f_weight;           // [D]
  const float* ln_f_bias;             // [D]
  const float* read_out_weight;       // [n_outputs, D]
  const float* read_out_bias;         // [n_outputs]
  const int64_t* seen;                // [n_queries], number of first tokens that a query sees
  void* packed;                       // matrices as the forward multiplies them, of Engine::pack
};

// What the forward saves for the backward. Layouts: activations.h.
struct SavedActivations {
  void* operands;  // operand type, [W, n, B S]; null: recompute from states
  float* floats;   // [W, n, B S]; null with operands
  float* start;    // [B, S, D], z before the window; null if that is `state`
};

struct ForwardOutputs {
  float* states;       // [W, B, S, D]; null: not wanted
  float* predictions;  // [W, B, S, n_outputs]; null without a read-out
  SavedActivations saved;  // all null if no gradient is needed
};

struct BackwardInputs {
  const float* grad;    // of states [W, B, S, D], or of predictions [W, B, S, n_outputs]
  const float* states;  // [W, B, S, D]; null with saved activations
  SavedActivations saved;
};

// Targets of the predictions at x tokens.
struct Targets {
  const float* ys;  // [B, n_x, n_outputs]
  int64_t n_supervised;  // last steps of the window whose predictions count
};

// Null where a gradient is not wanted. Those of matrices, half of the work, are then not computed.
struct Gradients {
  float* embeddings;           // [B, S, D]
  float* positions;            // [S, D]
  float* state;                // [B, S, D]; null unless the window covers every step
  const Block<float>* blocks;  // [L]
  float* ln_f_weight;          // [D]
  float* ln_f_bias;            // [D]
  float* read_out_weight;      // [n_outputs, D]
  float* read_out_bias;        // [n_outputs]
};

// When sequences stop, and what they are then.
struct Until {
  float tolerance;     // a step that moves every prediction by less is a sequence's last
  float* predictions;  // [B, S, n_outputs]
  int64_t* n_loops;    // [B], steps run; n_loops of the shape at most
};

// Prompts of n_points points in all, to be embedded.
struct ReadIn {
  const float* xs;      // [n_points, n_dims]
  const float* ys;      // [n_points]
  const float* weight;  // [D, n_dims]
  const float* bias;    // [D]
  float* weight_t;      // [n_dims, D], scratch
  float* embeddings;    // [2 n_points, D], output
  int64_t n_points;
  int64_t n_dims;  // d
  int64_t n_embd;  // D, a multiple of 32
};

// Columns of the activations that a step saves; `operands` and `floats` of SavedActivations.
struct SavedColumns {
  int64_t operands;
  int64_t floats;
};

// Kernels for one instruction set, operand type and kind of block. `workspace` is 64-byte aligned memory, of the
// size in bytes that the matching *_workspace or *_size function returns.
struct Engine {
  void (*read_in)(const ReadIn&, int n_threads);
  SavedColumns (*saved_columns)(const LoopShape&);
  size_t (*packed_size)(const LoopShape&);
  void (*pack)(const LoopShape&, const Inputs&, int n_threads);  // fills Inputs::packed
  size_t (*forward_workspace)(const LoopShape&, int n_threads);
  void (*forward)(const LoopShape&, const Inputs&, const ForwardOutputs&, void* workspace,
                  int n_threads);
  size_t (*until_workspace)(const LoopShape&, int n_threads);
  void (*until)(const LoopShape&, const Inputs&, const Until&, void* workspace, int n_threads);
  size_t (*backward_workspace)(const LoopShape&, bool recompute, int n_threads);
  void (*backward)(const LoopShape&, const Inputs&, const BackwardInputs&, const Gradients&,
                   void* workspace, int n_threads);
  size_t (*mse_workspace)(const LoopShape&, int n_threads);
  float (*mse)(const LoopShape&, const Inputs&, const Targets&, const Gradients&, void* workspace,
               int n_threads);
};

// In the order of the kinds.
enum class BlockKind { kGpt2, kTrm };
extern const Engine kEnginesAvx2Fp32[2];
extern const Engine kEnginesAvx512Fp32[2];
extern const Engine kEnginesAvx512Bf16[2];

}  // namespace looped_fast
