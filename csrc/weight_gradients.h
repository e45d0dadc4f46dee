// Gradients of the weights: dW = sum over rows of dy x^T, accumulated per thread.
//
// A thread adds each step's product to its own accumulators; in the end these are summed in the
// order of threads, so that results repeat bit for bit. Accumulators are contiguous tiles of
// 64 x 64: products in the order of the matrix would touch a page per row.
#pragma once

#include <vector>

#include "engine.h"
#include "gemm.h"
#include "pack.h"
#include "workspace.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// A matrix [n_rows, n_columns] of floats in tiles: [n_columns / 64][n_rows / 64][64][64].
struct TiledMatrix {
  static constexpr int64_t kSide = kPanel;

  int64_t n_rows;
  int64_t n_columns;
  float* data;

  TiledMatrix(Arena& arena, int64_t rows, int64_t columns)
      : n_rows(rows), n_columns(columns), data(arena.take<float>(n_tiles() * kSide * kSide)) {}

  int64_t tiles_down() const { return (n_rows + kSide - 1) / kSide; }
  int64_t tiles_across() const { return (n_columns + kSide - 1) / kSide; }
  int64_t n_tiles() const { return tiles_down() * tiles_across(); }
  float* tile(int64_t index) const { return data + index * kSide * kSide; }
  void clear() const { std::fill_n(data, n_tiles() * kSide * kSide, 0.f); }
  Range tile_rows(int64_t index) const { return side(index % tiles_down(), n_rows); }
  Range tile_columns(int64_t index) const { return side(index / tiles_down(), n_columns); }

 private:
  static Range side(int64_t index, int64_t n) {
    return {index * kSide, std::min(n, (index + 1) * kSide)};
  }
};

// sums += left right over `depth` rows, a multiple of kPack. left: [n_rows, .] at stride ld;
// right: [., n_columns] in panels.
template <class T>
inline void add_product(const TiledMatrix& sums, const T* left, int64_t ld,
                        const PackedMatrix<T>& right, int64_t depth) {
  for (int64_t i = 0; i < sums.n_tiles(); ++i) {
    const Range rows = sums.tile_rows(i), columns = sums.tile_columns(i);
    brgemm(rows.size(), columns.size(), depth, left + rows.begin * ld, ld,
           right.panel(columns.begin / kPanel), columns.size(), sums.tile(i), TiledMatrix::kSide,
           true);
  }
}

// One thread's sums for one block. Matrices have the D-wide side first, which is the one that is
// transposed to be the left-hand matrix: two of them are transposes of the weights.
struct BlockSums {
  TiledMatrix c_attn_t;     // [D, 3D]
  TiledMatrix attn_c_proj;  // [D, D]
  TiledMatrix c_fc_t;       // [D, fc_width], in RowOrder
  TiledMatrix mlp_c_proj;   // [D, F]

  BlockSums(Arena& arena, const LoopShape& p)
      : c_attn_t(arena, p.n_embd, 3 * p.n_embd),
        attn_c_proj(arena, p.n_embd, p.n_embd),
        c_fc_t(arena, p.n_embd, p.fc_width),
        mlp_c_proj(arena, p.n_embd, p.n_hidden) {}

  // Clears what is summed: matrices whose gradient is wanted.
  void clear(const Block<float>& gradients) const {
    if (gradients.c_attn_weight) c_attn_t.clear();
    if (gradients.attn_c_proj_weight) attn_c_proj.clear();
    if (gradients.c_fc_weight) c_fc_t.clear();
    if (gradients.mlp_c_proj_weight) mlp_c_proj.clear();
  }
};

// Gradients of the vectors: every block's (9 D floats and fc_width), the final LayerNorm's (2 D),
// and the read-out's, whose matrix has few rows. Unused where a kind of block has none.
struct VectorSums {
  int64_t D;
  int64_t block_size;
  int64_t n_layer;
  int64_t n_outputs;
  float* data;

  VectorSums(Arena& arena, const LoopShape& p)
      : D(p.n_embd),
        block_size(9 * D + p.fc_width),
        n_layer(p.n_layer),
        n_outputs(p.n_outputs),
        data(arena.take<float>(size())) {}

  // A multiple of kVec.
  int64_t size() const {
    const int64_t bias = (n_outputs + kVec - 1) / kVec * kVec;
    return block_size * n_layer + (2 + n_outputs) * D + bias;
  }
  void clear() const { std::fill_n(data, size(), 0.f); }

  Block<float> block(int64_t layer) const {
    float* p = data + layer * block_size;
    Block<float> b{};  // matrices stay null
    b.ln_1_weight = p;
    b.ln_1_bias = p + D;
    b.c_attn_bias = p + 2 * D;
    b.attn_c_proj_bias = p + 5 * D;
    b.ln_2_weight = p + 6 * D;
    b.ln_2_bias = p + 7 * D;
    b.mlp_c_proj_bias = p + 8 * D;
    b.c_fc_bias = p + 9 * D;
    return b;
  }
  float* ln_f_weight() const { return data + n_layer * block_size; }
  float* ln_f_bias() const { return ln_f_weight() + D; }
  float* read_out_weight() const { return ln_f_bias() + D; }
  float* read_out_bias() const { return read_out_weight() + n_outputs * D; }
};

// All sums of one thread. Vectors are summed over an item first: one running sum over all tokens
// would cost accuracy.
struct ThreadSums {
  std::vector<BlockSums> blocks;
  VectorSums vectors;
  VectorSums item_vectors;
  float* positions;  // [S, D]
  int64_t n_positions;

  ThreadSums(Arena& arena, const LoopShape& p)
      : vectors(arena, p), item_vectors(arena, p), n_positions(p.seq_len * p.n_embd) {
    positions = arena.take<float>(n_positions);
    for (int64_t i = 0; i < p.n_layer; ++i) blocks.emplace_back(arena, p);
  }

  void clear(const Gradients& gradients) const {
    vectors.clear();
    item_vectors.clear();
    std::fill_n(positions, n_positions, 0.f);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i].clear(gradients.blocks[i]);
  }

  void end_item() const {
    for (int64_t j = 0; j < vectors.size(); j += kVec) {
      add_to(vectors.data + j, Vec::loadu(item_vectors.data + j));
    }
    item_vectors.clear();
  }
};

// Sums tile `index` over threads, which all hold a matrix of the same shape, and writes it to the
// gradient of a weight [n_rows, n_columns], or of [n_columns, n_rows] where `transposed`, whose rows
// then have an `order`.
inline void reduce_tile(const std::vector<const TiledMatrix*>& threads, int64_t index,
                        bool transposed, RowOrder order, float* grad) {
  const TiledMatrix& first = *threads[0];
  constexpr int64_t kSide = TiledMatrix::kSide;
  float* total = first.tile(index);
  for (size_t t = 1; t < threads.size(); ++t) {
    const float* other = threads[t]->tile(index);
    for (int64_t j = 0; j < kSide * kSide; j += kVec) add_to(total + j, Vec::loadu(other + j));
  }
  const Range rows = first.tile_rows(index), columns = first.tile_columns(index);
  if (transposed) {
    for (int64_t c = columns.begin; c < columns.end; c += RowOrder::kChunk) {
      transpose_words(total + (c - columns.begin), kSide,
                      grad + order(c) * first.n_rows + rows.begin, first.n_rows, rows.size(),
                      RowOrder::kChunk);
    }
    return;
  }
  for (int64_t r = 0; r < rows.size(); ++r) {
    const float* row = total + r * kSide;
    std::copy(row, row + columns.size(),
              grad + (rows.begin + r) * first.n_columns + columns.begin);
  }
}

// This thread's share of summing `sums` of all threads into those gradients that are wanted.
inline void reduce(const std::vector<ThreadSums>& sums, const LoopShape& shape,
                   const Gradients& gradients, int thread, int n_threads) {
  const auto reduce_matrix = [&](int64_t layer, TiledMatrix BlockSums::*matrix, bool transposed,
                                 float* grad, RowOrder order = {}) {
    if (!grad) return;
    std::vector<const TiledMatrix*> threads;
    for (const ThreadSums& s : sums) threads.push_back(&(s.blocks[layer].*matrix));
    const Range tiles = split(threads[0]->n_tiles(), thread, n_threads);
    for (int64_t i = tiles.begin; i < tiles.end; ++i) {
      reduce_tile(threads, i, transposed, order, grad);
    }
  };
  const auto reduce_vector = [&](const float* first, int64_t n, float* grad) {
    if (!grad) return;
    std::fill_n(grad, n, 0.f);
    const int64_t offset = first - sums[0].vectors.data;  // the same in every thread's memory
    for (const ThreadSums& s : sums) {
      const float* from = s.vectors.data + offset;
      for (int64_t j = 0; j < n; ++j) grad[j] += from[j];
    }
  };
  const int64_t D = shape.n_embd;
  for (int64_t layer = 0; layer < shape.n_layer; ++layer) {
    const Block<float>& g = gradients.blocks[layer];
    reduce_matrix(layer, &BlockSums::c_attn_t, true, g.c_attn_weight);
    reduce_matrix(layer, &BlockSums::attn_c_proj, false, g.attn_c_proj_weight);
    reduce_matrix(layer, &BlockSums::c_fc_t, true, g.c_fc_weight, fc_order(shape));
    reduce_matrix(layer, &BlockSums::mlp_c_proj, false, g.mlp_c_proj_weight);
    if (thread != 0) continue;
    const Block<float> v = sums[0].vectors.block(layer);
    reduce_vector(v.ln_1_weight, D, g.ln_1_weight);
    reduce_vector(v.ln_1_bias, D, g.ln_1_bias);
    reduce_vector(v.c_attn_bias, 3 * D, g.c_attn_bias);
    reduce_vector(v.attn_c_proj_bias, D, g.attn_c_proj_bias);
    reduce_vector(v.ln_2_weight, D, g.ln_2_weight);
    reduce_vector(v.ln_2_bias, D, g.ln_2_bias);
    reduce_vector(v.c_fc_bias, shape.fc_width, g.c_fc_bias);
    reduce_vector(v.mlp_c_proj_bias, D, g.mlp_c_proj_bias);
  }
  if (thread != 0) return;
  const VectorSums& v = sums[0].vectors;
  reduce_vector(v.ln_f_weight(), D, gradients.ln_f_weight);
  reduce_vector(v.ln_f_bias(), D, gradients.ln_f_bias);
  reduce_vector(v.read_out_weight(), shape.n_outputs * D, gradients.read_out_weight);
  reduce_vector(v.read_out_bias(), shape.n_outputs, gradients.read_out_bias);
  reduce_vector(sums[0].positions, shape.seq_len * D, gradients.positions);
}

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
