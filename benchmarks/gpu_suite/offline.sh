#!/usr/bin/env bash
# The suite on a GPU machine without network, in one command:
#
#     benchmarks/gpu_suite/offline.sh [--part NAME ...]
#
# vLLM comes from a folder `.gpu/` in the repository's root (ignored by git) whose bootstrap.sh
# unpacks it and puts it on PYTHONPATH, unless it is installed. Results are written to $OUT if that
# is set, which excludes --record. VLLM_AM_COMMIT names the commit where the checkout came without its repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
if [ -f .gpu/bootstrap.sh ] && ! "$python" -c 'import vllm' 2>/dev/null; then
  # shellcheck disable=SC1091
  . .gpu/bootstrap.sh
fi

# Installed into a folder of its own, for the plugin's entry points. The code that runs is the
# checkout's, which comes first on the path: it gets the two packages that an installation maps.
plugin=${TMPDIR:-/tmp}/vllm-am-plugin
"$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade \
  --target "$plugin" .
ln -sfn ../kernels vllm_am/kernels
ln -sfn ../csrc vllm_am/csrc
cp "$plugin"/vllm_am/kernels/_native*.so kernels/ 2>/dev/null || true # built where nvcc is
export PYTHONPATH="$plugin${PYTHONPATH:+:$PYTHONPATH}"

exec "$python" -m benchmarks.gpu_suite "$@" ${OUT:+--out "$OUT"}
