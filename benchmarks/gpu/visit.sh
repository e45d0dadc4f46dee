#!/usr/bin/env bash
# Run on a machine with a GPU and without a network, in a copy of the source tree with .gpu/ in it:
#   bash benchmarks/gpu/visit.sh [PART ...]
# Results go to $OUT, or to benchmarks/results. Nothing is installed outside of /tmp.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} site=/tmp/looped_fast_site cache=/tmp/looped_fast_triton
if [ ! -d $site ] && compgen -G '.gpu/wheels/*.whl' >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target $site \
    .gpu/wheels/*.whl
fi
if [ ! -d $cache ] && [ -f .gpu/cache.tgz ]; then tar xzf .gpu/cache.tgz -C /; fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} TRITON_CACHE_DIR=$cache XDG_CACHE_HOME=/tmp/looped_fast_cache
nvidia-smi --query-gpu=name,clocks.sm,memory.total --format=csv,noheader || true
export LOOPED_FAST_NO_ENGINE=1 # the CPU engine would be compiled first, and it is not what is measured
exec "$python" -m benchmarks.gpu "$@"
