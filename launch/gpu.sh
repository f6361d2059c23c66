#!/usr/bin/env bash
# Trains on this machine's NVIDIA GPUs: one process for all of them.
#
#   launch/gpu.sh [OPTIONS] -- FLAGS
#
# FLAGS are those of python -m abe_jax.main; $PYTHON names another python. Ctrl-C saves
# the state and ends, the same command goes on from there.
# Options:
#   --gpus=0,1   these GPUs instead of all
#   --dry_run    prints the command and does not run it
#   --help       prints this
set -euo pipefail
# shellcheck source=launch/command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"

# abe_jax.main refuses to run where what comes first cannot be used.
environment=('JAX_PLATFORMS=cuda,cpu')
gpus=''
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --gpus=*) take gpus "$1" ;;
    --dry_run) dry_run=1 ;;
    --help) help ;;
    *) unknown "$1" ;;
  esac
  shift
done
(($# > 1)) || fail 'no flags for abe_jax.main; they come after --.'
shift
[[ ! $gpus ]] || environment+=("CUDA_VISIBLE_DEVICES=$gpus")

if [[ ! $dry_run ]]; then
  command -v nvidia-smi >/dev/null || fail 'nvidia-smi is missing: no NVIDIA driver.'
  nvidia-smi --list-gpus
  echo 'launch: a rented machine costs money until you stop or delete it.' >&2
fi
finish env "${environment[@]}" "${PYTHON:-python}" -m abe_jax.main "$@"
