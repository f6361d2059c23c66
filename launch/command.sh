#!/usr/bin/env bash
# Sourced by the scripts beside it: how they help, fail, and print or run a command.

dry_run=''

# Prints the comment at the top of the script.
help() {
  local folder
  folder=$(dirname "${BASH_SOURCE[0]}") # not that of $0: the script may have left it
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$folder/${0##*/}"
  exit 0
}

fail() {
  echo "launch: $*" >&2
  exit 2
}

# Puts the value of --NAME=VALUE, which must not be empty, into the variable $1.
take() {
  [[ $2 == *=?* ]] || fail "${2%%=*} needs a value: ${2%%=*}=VALUE."
  printf -v "$1" %s "${2#*=}"
}

# The same for a number.
take_number() {
  take "$@"
  [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "$2: it must be a whole number, 1 or more."
}

unknown() {
  fail "$1 is not an option here; --help lists them, and flags of abe_jax.main" \
    "come after --."
}

# Prints a command so that it can be pasted.
show() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

# Prints the command where --dry_run was given, and runs it otherwise.
run() {
  if [[ $dry_run ]]; then show "$@"; else "$@"; fi
}

# The same for the last command, which takes the place of the script.
finish() {
  if [[ $dry_run ]]; then show "$@"; else exec "$@"; fi
}
