#!/usr/bin/env bash
# The suite on a GPU machine without network that is lent for minutes, as two commands, and a third
# of speeds that have been measured before:
#
#     benchmarks/gpu_suite/short.sh --act 1 --seconds 540
#     benchmarks/gpu_suite/short.sh --act 2 --seconds 170
#     benchmarks/gpu_suite/short.sh --act 3 --seconds 240
#
# vLLM comes from a folder `.gpu/` in the repository's root (ignored by git) whose bootstrap.sh
# unpacks it and puts it on PYTHONPATH, unless it is installed. Results are written to $OUT if that
# is set (three files), which excludes --record. VLLM_AM_COMMIT names the commit where the checkout
# came without its repository. The time until the first stage counts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export VLLM_AM_GPU_SUITE_STARTED
VLLM_AM_GPU_SUITE_STARTED=$(date +%s)

python=${PYTHON:-python3}
if [ -f .gpu/bootstrap.sh ] && ! "$python" -c 'import vllm' 2>/dev/null; then
  # shellcheck disable=SC1091
  . .gpu/bootstrap.sh
fi
# Where it is not, vLLM would ask for its sampler all the same.
if ! "$python" -c 'import flashinfer' 2>/dev/null; then
  export VLLM_USE_FLASHINFER_SAMPLER=0
fi
# No compiler runs on the device: what csrc/ holds is compiled by NVRTC when it is first used.
export VLLM_AM_BUILD_CSRC=0 PYTHONUNBUFFERED=1

# Installed into a folder of its own, for the plugin's entry points. The code that runs is the
# checkout's, which comes first on the path: it gets the two packages that an installation maps.
if ! "$python" -c 'import importlib.metadata as m; m.distribution("vllm-am")' 2>/dev/null; then
  plugin=${TMPDIR:-/tmp}/vllm-am-plugin
  "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade \
    --target "$plugin" .
  export PYTHONPATH="$plugin${PYTHONPATH:+:$PYTHONPATH}"
  ln -sfn ../kernels vllm_am/kernels
  ln -sfn ../csrc vllm_am/csrc
fi

exec "$python" -m benchmarks.gpu_suite "$@" ${OUT:+--bundle --out "$OUT"}
