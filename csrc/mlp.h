// The middle of an MLP, between its two products, as policies: what a tile of the first product
// becomes, and its gradient.
//
// The argument, fc, is kept tile by tile, [width / 64][rows][64]. Where it has gates, 32 columns of
// them lie beside the 32 that they scale, so that a tile has both: see RowOrder in pack.h.
#pragma once

#include "gelu.h"
#include "pack.h"

namespace looped_fast {
inline namespace CPU_CAPABILITY {

// Where a tile's gradient goes. Panels are right-hand matrices of products.
template <class T>
struct MlpGradient {
  T* d_fc;            // [rows, width of fc], from the tile's first row on
  int64_t ld;         // width of fc
  PackedMatrix<T> d_fc_right;    // d_fc as a right-hand matrix
  PackedMatrix<T> hidden_right;  // the second product's input, likewise
  float* bias_sum;    // [width of fc], added to; null without biases
};

// hidden = gelu(fc), fc = tile + bias.
struct Gelu {
  static constexpr int64_t kInputs = 1;  // columns of fc for one of hidden

  // Stores fc [rows][kPanel] unless that is null. hidden: from the tile's first row on.
  template <class T>
  static void forward(const Tile& tile, const float* bias, T* fc, T* hidden, int64_t ld) {
    const float* from = tile.data;
    const float* of_tile = bias + tile.columns.begin;
    T* to = hidden + tile.columns.begin;
    const int64_t m = tile.rows.size();
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t j = 0; j < kPanel; j += kStride) {
        const float* at = from + r * kPanel + j;
        const Vec x_0 = Vec::loadu(at) + Vec::loadu(of_tile + j);
        const Vec x_1 = Vec::loadu(at + kVec) + Vec::loadu(of_tile + j + kVec);
        if (fc) Operand<T>::store(fc + r * kPanel + j, x_0, x_1);
        Operand<T>::store(to + r * ld + j, gelu<T>(x_0), gelu<T>(x_1));
      }
    }
  }

  // d_fc = d_hidden gelu'(fc) as left- and right-hand matrix, and gelu(fc) as right-hand matrix.
  // tile: d_hidden; fc: the tile's rows, of all panels, `fc_panel` elements apart.
  template <class T>
  static void backward(const Tile& tile, const T* fc, int64_t fc_panel, const MlpGradient<T>& to) {
    const int64_t m = tile.rows.size(), column = tile.columns.begin, panel = column / kPanel;
    const int64_t packed = packed_offset<T>(tile.rows.begin, 0, kPanel);
    const T* of_tile = fc + panel * fc_panel;
    T* left = to.d_fc + column;
    T* right = to.d_fc_right.panel(panel) + packed;
    T* hidden_right = to.hidden_right.panel(panel) + packed;
    Vec total[kPanel / kVec];
    for (Vec& t : total) t = Vec(0.f);
    for (int64_t r = 0; r < m; r += 2) {
      for (int64_t j = 0; j < kPanel; j += kVec) {
        Vec d[2] = {Vec(0.f), Vec(0.f)}, hidden[2] = {Vec(0.f), Vec(0.f)};
        for (int64_t e = 0; e < 2 && r + e < m; ++e) {
          const auto gelu = gelu_and_derivative<T>(Operand<T>::load(of_tile + (r + e) * kPanel + j));
          hidden[e] = gelu.value;
          d[e] = gelu.derivative * Vec::loadu(tile.data + (r + e) * kPanel + j);
        }
        total[j / kVec] = total[j / kVec] + (d[0] + d[1]);
        const int64_t at = packed_offset<T>(r, j, kPanel);
        Operand<T>::store_rows(right + at, kPanel, left + r * to.ld + j, to.ld, d[0], d[1]);
        Operand<T>::store_rows(hidden_right + at, kPanel, hidden[0], hidden[1]);
      }
    }
    for (int64_t j = 0; j < kPanel; j += kVec) add_to(to.bias_sum + column + j, total[j / kVec]);
  }
};

// hidden = silu(gate) up, where fc has 32 gates, then what they scale, in each panel. No bias.
struct SwiGlu {
  static constexpr int64_t kInputs = 2;
  static constexpr int64_t kHalf = kPanel / 2;

  template <class T>
  static Vec sigmoid(Vec x) {
    return quotient<T>(Vec(1.f), exp2<T>(x * Vec(-kLog2E)) + Vec(1.f));
  }

  template <class T>
  static void forward(const Tile& tile, const float* /*bias*/, T* fc, T* hidden, int64_t ld) {
    const float* from = tile.data;
    T* to = hidden + tile.columns.begin / kInputs;
    const int64_t m = tile.rows.size();
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t j = 0; j < kHalf; j += kStride) {
        const float* at = from + r * kPanel + j;
        const Vec g_0 = Vec::loadu(at), g_1 = Vec::loadu(at + kVec);
        const Vec u_0 = Vec::loadu(at + kHalf), u_1 = Vec::loadu(at + kHalf + kVec);
        if (fc) {
          Operand<T>::store(fc + r * kPanel + j, g_0, g_1);
          Operand<T>::store(fc + r * kPanel + kHalf + j, u_0, u_1);
        }
        Operand<T>::store(to + r * ld + j, g_0 * sigmoid<T>(g_0) * u_0,
                          g_1 * sigmoid<T>(g_1) * u_1);
      }
    }
  }

  template <class T>
  static void backward(const Tile& tile, const T* fc, int64_t fc_panel, const MlpGradient<T>& to) {
    const int64_t m = tile.rows.size(), width = tile.columns.size();
    const int64_t packed = packed_offset<T>(tile.rows.begin, 0, kPanel);
    const int64_t first = tile.columns.begin / kHalf;  // panel of fc
    // The last panel of hidden is half as wide if its width is no multiple of kPanel.
    T* hidden_right = to.hidden_right.panel(tile.columns.begin / kPanel) +
                      packed_offset<T>(tile.rows.begin, 0, width);
    for (int64_t half = 0; half < width / kHalf; ++half) {
      const T* of_half = fc + (first + half) * fc_panel;
      T* left = to.d_fc + (first + half) * kPanel;
      T* right = to.d_fc_right.panel(first + half) + packed;
      for (int64_t r = 0; r < m; r += 2) {
        for (int64_t j = 0; j < kHalf; j += kVec) {
          Vec d_gate[2] = {Vec(0.f), Vec(0.f)}, d_up[2] = {Vec(0.f), Vec(0.f)};
          Vec hidden[2] = {Vec(0.f), Vec(0.f)};
          for (int64_t e = 0; e < 2 && r + e < m; ++e) {
            const T* at = of_half + (r + e) * kPanel + j;
            const Vec gate = Operand<T>::load(at), up = Operand<T>::load(at + kHalf);
            const Vec d = Vec::loadu(tile.data + (r + e) * kPanel + half * kHalf + j);
            const Vec s = sigmoid<T>(gate), silu = gate * s;
            hidden[e] = silu * up;
            d_up[e] = d * silu;
            d_gate[e] = d * up * at::vec::fmadd(silu, Vec(1.f) - s, s);
          }
          const auto put = [&](int64_t column, const Vec(&d)[2]) {
            Operand<T>::store_rows(right + packed_offset<T>(r, column, kPanel), kPanel,
                                   left + r * to.ld + column, to.ld, d[0], d[1]);
          };
          put(j, d_gate);
          put(kHalf + j, d_up);
          Operand<T>::store_rows(hidden_right + packed_offset<T>(r, half * kHalf + j, width), width,
                                 hidden[0], hidden[1]);
        }
      }
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace looped_fast
