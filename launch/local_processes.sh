#!/usr/bin/env bash
# Tries several processes out on this machine, as several hosts would run them.
#
#   launch/local_processes.sh --processes=N [OPTIONS] -- FLAGS
#
# FLAGS are those of python -m abe_jax.main; $PYTHON names another python. Every line of
# output begins with the number of its process. When a process fails the others are
# stopped, and the script ends with its status. Ctrl-C and SIGTERM are passed on, so
# that each process saves its state and ends; the same command goes on from there.
# Options:
#   --platform=cpu|gpu   cpu by default
#   --devices=N          devices of each process: fake ones on the CPU (1 by default),
#                        GPUs (an equal share by default)
#   --port=PORT          of the coordinator on 127.0.0.1; a free one by default
#   --grace_seconds=N    after a failure, until processes that do not end, or children
#                        that they left, are killed; 30
#   --dry_run            prints the commands and runs none
#   --help               prints this
set -euo pipefail
# shellcheck source=launch/command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"

processes='' platform=cpu devices='' port='' grace_seconds=30
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --processes=*) take_number processes "$1" ;;
    --platform=cpu | --platform=gpu) platform=${1#*=} ;;
    --platform=*) fail "$1: it must be cpu or gpu." ;;
    --devices=*) take_number devices "$1" ;;
    --port=*) take_number port "$1" ;;
    --grace_seconds=*) take_number grace_seconds "$1" ;;
    --dry_run) dry_run=1 ;;
    --help) help ;;
    *) unknown "$1" ;;
  esac
  shift
done
[[ $processes ]] || fail '--processes is missing; say how many: --processes=2.'
(($# > 1)) || fail 'no flags for abe_jax.main; they come after --.'
shift

gpus=()
if [[ $platform == gpu ]]; then
  if [[ ${CUDA_VISIBLE_DEVICES-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null; then
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
  fi
  : "${devices:=$((${#gpus[@]} / processes))}"
  ((devices > 0 && devices * processes <= ${#gpus[@]})) ||
    fail "${#gpus[@]} GPUs are too few for $processes processes."
fi

while [[ ! $port ]]; do
  port=$((20000 + RANDOM % 12000)) # below those that the system hands out
  # Somebody listens there: try another.
  if (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then port=''; fi
done

# Puts the command of process number $1 into the array `words`; the rest are FLAGS.
compose() {
  local process=$1
  shift
  if [[ $platform == cpu ]]; then
    words=(env PYTHONUNBUFFERED=1 JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=${devices:-1}")
  else
    local share=("${gpus[@]:process * devices:devices}")
    words=(env PYTHONUNBUFFERED=1 'JAX_PLATFORMS=cuda,cpu'
      "CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${share[*]}")")
  fi
  words+=("${PYTHON:-python}" -m abe_jax.main "$@"
    --coordinator_address="127.0.0.1:$port" --num_processes="$processes"
    --process_id="$process")
}

if [[ $dry_run ]]; then
  for ((process = 0; process < processes; process++)); do
    compose "$process" "$@"
    show "${words[@]}"
  done
  exit
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
declare -A running=() # process number to process id
declare -A told=()    # process numbers that have the signal that came
groups=()             # all that were started, each with its children
printers=()
passed_on=''
tell() {
  told[$1]=1
  kill -"$passed_on" "${running[$1]}" 2>/dev/null || true
}
# shellcheck disable=SC2329 # the traps call it
pass_on() {
  local process
  passed_on=$1
  for process in "${!running[@]}"; do tell "$process"; done
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM
# A lost connection may send it twice; a second TERM would end them before they save.
trap 'trap "" HUP; pass_on TERM' HUP

# Job control gives each process its own group: Ctrl-C reaches it once, through us, and
# does not reach the printers at all.
set -m
for ((process = 0; process < processes; process++)); do
  [[ ! $passed_on ]] || break
  compose "$process" "$@"
  mkfifo "$scratch/$process"
  sed -u "s/^/[$process] /" <"$scratch/$process" &
  printers+=($!)
  "${words[@]}" >"$scratch/$process" 2>&1 </dev/null &
  running[$process]=$!
  groups+=("-$!")
done
set +m

status=0 deadline=''
# After a failure, children may be left that hold a printer.
while ((${#running[@]})) || { [[ $deadline ]] && kill -0 "${printers[@]}"; } 2>/dev/null; do
  sleep 0.2 || true # Ctrl-C ends it
  for process in "${!running[@]}"; do
    if kill -0 "${running[$process]}" 2>/dev/null; then
      # It was being started when the signal came.
      if [[ $passed_on && ! ${told[$process]:-} ]]; then tell "$process"; fi
      continue
    fi
    ended=0
    wait "${running[$process]}" 2>/dev/null || ended=$?
    unset "running[$process]"
    if ((ended == 0)); then continue; fi
    ((status)) || status=$ended
    # Asked to end it saved, and the others do so too, in their own time.
    if [[ $passed_on ]] && ((ended > 128)); then continue; fi
    if [[ $deadline ]]; then continue; fi
    echo "launch: process $process ended with status $ended; stopping all" >&2
    deadline=$((SECONDS + grace_seconds))
    if ((${#running[@]})); then kill -TERM "${running[@]}" 2>/dev/null || true; fi
  done
  if [[ $deadline ]] && ((SECONDS > deadline)); then
    kill -KILL -- "${groups[@]}" 2>/dev/null || true
  fi
done
wait "${printers[@]}"
exit "$status"
