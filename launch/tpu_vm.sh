#!/usr/bin/env bash
# Trains on a Cloud TPU: makes a TPU VM or a pod slice, prepares, runs, deletes it.
# Tried with a stand-in for gcloud only; that the programs suit a TPU is known by
# compiling them (docs/scaling.md).
#
#   launch/tpu_vm.sh VERB --name=NAME --zone=ZONE [OPTIONS] [-- FLAGS]
#
# Verbs, in the order of a session:
#   create   makes the TPU; needs --type; FLAGS are further ones of gcloud
#   setup    copies the clone's last commit to every worker and installs it there
#   run      starts python -m abe_jax.main FLAGS on every worker, in the background: it
#            goes on when the connection is lost
#   logs     follows the log of worker 0; Ctrl-C leaves the run alone
#   stop     asks the run to save and end, and waits for it
#   delete   deletes the TPU: until then it costs money
# Options:
#   --type=TYPE              create: accelerator, as v6e-8, v5p-16 or v5litepod-32
#   --runtime_version=NAME   create: the VM's software, if not the usual of the type
#   --spot                   create: cheaper, and may be taken away at any time
#   --queued                 create, delete: wait in the queue of TPU requests; the
#                            request has the TPU's name
#   --project=PROJECT        if it is not gcloud's default
#   --worker=N               logs: number of the worker, or all
#   --dry_run                prints the commands and runs none
#   --help                   prints this
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/command.sh
source launch/command.sh

readonly VERBS='create, setup, run, logs, stop or delete'
(($#)) || fail "which verb? $VERBS; --help tells more."
verb=$1
shift
case $verb in
  create | setup | run | logs | stop | delete) ;;
  --help) help ;;
  *) fail "there is no verb $verb; use $VERBS." ;;
esac

name='' zone='' project='' type='' runtime_version='' spot='' queued='' worker=0
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --name=*) take name "$1" ;;
    --zone=*) take zone "$1" ;;
    --project=*) take project "$1" ;;
    --type=*) take type "$1" ;;
    --runtime_version=*) take runtime_version "$1" ;;
    --worker=*) take worker "$1" ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --dry_run) dry_run=1 ;;
    --help) help ;;
    *) unknown "$1" ;;
  esac
  shift
done
(($# == 0)) || shift
[[ $name ]] || fail "$verb needs --name=NAME, of the TPU."
[[ $zone ]] || fail "$verb needs --zone=ZONE, as us-east5-a."
case $verb in
  create) [[ $type ]] || fail 'create needs --type=TYPE, as v6e-8.' ;;
  run) (($#)) || fail 'no flags for abe_jax.main; they come after --.' ;;
  *) (($# == 0)) || fail "$verb takes no flags after --." ;;
esac
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  fail 'gcloud is missing; see https://cloud.google.com/sdk/docs/install.'

tpus=(gcloud compute tpus)
where=("--zone=$zone")
[[ ! $project ]] || where+=("--project=$project")

# Runs a shell command on the workers $1.
on_workers() {
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

# Called on the way out, so that it is said after a failure too.
remind() {
  local status=$? made='' hint=''
  local words=(launch/tpu_vm.sh delete "--name=$name" "${where[@]}")
  if [[ $queued ]]; then
    words+=(--queued)
  elif [[ $verb != create ]]; then
    hint=' (--queued, if it was created so)'
  fi
  if [[ $verb == create ]] && ((status)); then made=', if it was made,'; fi
  echo "launch: $name$made costs money until you delete it:" \
    "$(show "${words[@]}")$hint" >&2
}

# What Google names for JAX on this kind of TPU.
usual_runtime_version() {
  case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  : "${runtime_version:=$(usual_runtime_version)}"
  [[ $runtime_version ]] ||
    fail "no usual software is known for $type; give --runtime_version=NAME."
  trap remind EXIT
  local options=("${where[@]}" "--accelerator-type=$type")
  [[ ! $spot ]] || options+=(--spot)
  if [[ $queued ]]; then
    run "${tpus[@]}" queued-resources create "$name" "--node-id=$name" \
      "${options[@]}" "--runtime-version=$runtime_version" "$@"
    echo "launch: ready when its state is ACTIVE:" \
      "$(show "${tpus[@]}" queued-resources describe "$name" "${where[@]}")" >&2
  else
    run "${tpus[@]}" tpu-vm create "$name" \
      "${options[@]}" "--version=$runtime_version" "$@"
  fi
}

# For the shells of the workers: whether a run is going on, and the guard before what would
# disturb it.
readonly RUNNING="kill -0 \"\$(cat abe_jax/run.pid 2>/dev/null)\" 2>/dev/null"
readonly LEAVE_RUN_ALONE="if $RUNNING; then\
 echo 'launch: a run is going on; stop it first.' >&2; exit 1; fi"

# The VM's own Python is older than what abe_jax needs: uv brings one.
setup() {
  run mkdir -p dist
  run git archive --format=tar.gz --output=dist/abe_jax.tar.gz HEAD
  run "${tpus[@]}" tpu-vm scp dist/abe_jax.tar.gz "$name:" "${where[@]}" --worker=all
  on_workers all "set -e; $LEAVE_RUN_ALONE;\
 mkdir -p abe_jax; rm -rf abe_jax/abe_jax abe_jax/configs;\
 tar -xzf abe_jax.tar.gz -C abe_jax;\
 cd abe_jax; python3 -m pip install --quiet --user uv;\
 python3 -m uv venv --quiet --allow-existing --python=3.12 .venv;\
 python3 -m uv pip install --quiet -e '.[tpu]'"
}

# In a session of its own, without a terminal: it outlives the connection. What is wrong
# with FLAGS shows in a moment, and is told.
start() {
  local program
  program=$(show .venv/bin/python -m abe_jax.main --distributed "$@")
  trap remind EXIT
  on_workers all "set -e; $LEAVE_RUN_ALONE;\
 if [ ! -x abe_jax/.venv/bin/python ]; then\
 echo 'launch: run setup first.' >&2; exit 1; fi;\
 cd abe_jax; rm -f stopped.pid;\
 PYTHONUNBUFFERED=1 JAX_PLATFORMS=tpu,cpu\
 nohup setsid $program >>run.log 2>&1 </dev/null &\
 echo \$! >run.pid;\
 if timeout 5 tail --pid=\$! -f /dev/null; then\
 echo 'launch: the run has ended already; its log ends in:' >&2;\
 tail -n 20 run.log >&2; wait \$!; fi"
}

# A second signal would end a run that is saving, and gcloud gives the command again when
# the connection breaks: stopped.pid says who has the signal.
stop() {
  trap remind EXIT
  on_workers all "set -e; if ! $RUNNING; then\
 echo 'launch: no run is going on.' >&2; exit 0; fi;\
 cd abe_jax; if ! cmp -s run.pid stopped.pid; then\
 cp run.pid stopped.pid; kill -TERM \"\$(cat run.pid)\" || true; fi;\
 timeout 600 tail --pid=\"\$(cat run.pid)\" -f /dev/null || {\
 echo 'launch: the run is still saving; give stop again before delete.' >&2; exit 1; }"
}

case $verb in
  create) create "$@" ;;
  setup) setup ;;
  run) start "$@" ;;
  logs) on_workers "$worker" 'tail -n 100 -F abe_jax/run.log' ;;
  stop) stop ;;
  delete)
    if [[ $queued ]]; then
      run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force
    else
      run "${tpus[@]}" tpu-vm delete "$name" "${where[@]}"
    fi
    ;;
esac
