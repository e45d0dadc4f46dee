#!/usr/bin/env bash
# Prepare a visit to a GPU without a network: run this in the checkout, on a machine with one. It
# makes .gpu/ (ignored by git), to be copied along with the source tree: wheels of pure Python that
# the machine lacks, compiled kernels for sm_90, and the commit. Takes minutes. The environment is
# that of `make test-versions`: its Python, PyTorch and Triton must be those of the machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
environment=${OTHER_VENV:-.venv-versions} cache=/tmp/looped_fast_triton
make --quiet "OTHER_VENV=$environment" "$environment/.ready"
mkdir -p .gpu/wheels
python=$(realpath -s "$environment/bin/python")
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest .gpu/wheels \
  tyro==1.0.17 docstring-parser==0.18.0 typeguard==4.6.1
echo "$(git rev-parse HEAD)$([ -z "$(git status --porcelain)" ] || echo +changes)" >.gpu/commit
"$python" -m benchmarks.gpu.rehearsal # up to the first launch, as on an H100
rm -rf "$cache"
TRITON_CACHE_DIR=$cache TRITON_STORE_BINARY_ONLY=1 "$python" -m benchmarks.gpu.compile_cache
tar czf .gpu/cache.tgz -C / "${cache#/}" # paths inside are absolute
du -sh .gpu
