#include "select.h"

#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <exception>
#include <vector>

namespace looped_fast {
namespace {

// torch's own choice, so that ATEN_CPU_CAPABILITY governs this engine too.
bool torch_uses(const char* capability) { return at::get_cpu_capability() == capability; }

// Why bf16 products can't run here; empty if they can. A small product is tried: without the
// instructions brgemm throws, or is wrong unless operands are converted.
std::string try_bf16() {
  constexpr int64_t n = 32;
  std::vector<at::BFloat16> a(n * n, at::BFloat16(1.f)), b(n * n, at::BFloat16(0.5f));
  std::vector<float> c(n * n, -1.f);
  try {
    at::native::cpublas::brgemm(n, n, n, n, n, n, false, a.data(), b.data(), c.data(), true);
    at::native::cpublas::brgemm_release(true);
  } catch (const std::exception& error) {
    return std::string("a trial bf16 product failed: ") + error.what();
  }
  for (float x : c) {
    if (x != n * 0.5f) return "a trial bf16 product is wrong";
  }
  return "";
}

struct Selection {
  const Engine* engines;    // in the order of BlockKind
  std::string unsupported;  // why `engines` is null
};

Selection select_engines(const std::string& precision) {
  const bool avx512 = torch_uses("AVX512");
  if (precision == "fp32") {
    if (avx512) return {kEnginesAvx512Fp32, ""};
    if (torch_uses("AVX2")) return {kEnginesAvx2Fp32, ""};
    return {nullptr, "it needs AVX2, and torch runs at " + at::get_cpu_capability()};
  }
  if (precision == "bf16") {
    if (!avx512 || !__builtin_cpu_supports("avx512bf16")) {
      return {nullptr, "bf16 needs a CPU with AVX512_BF16; precision fp32 runs"};
    }
    static const std::string trial = try_bf16();
    if (!trial.empty()) return {nullptr, trial};
    return {kEnginesAvx512Bf16, ""};
  }
  return {nullptr, "it computes in fp32 and bf16, not " + precision};
}

}  // namespace

std::string unsupported(const std::string& precision) {
  return select_engines(precision).unsupported;
}

const Engine& engine_for(const std::string& precision, BlockKind kind) {
  const Selection selection = select_engines(precision);
  TORCH_CHECK(selection.engines, "the CPU engine can't run: ", selection.unsupported);
  return selection.engines[static_cast<int>(kind)];
}

}  // namespace looped_fast
