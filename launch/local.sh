#!/usr/bin/env bash
# Install into .venv, then run a module as N processes on this machine, a trial of what many hosts do:
#   launch/local.sh N experiments.sft --out DIR [FLAGS]
# They meet over the loop-back address. Each line that one prints begins with its number. The status is that of the
# first that fails, after which the others end by themselves; SIGINT and SIGTERM go to all.
#   JAX_PLATFORMS        default cpu, with JAX_NUM_CPU_DEVICES devices (default 1) in each process
#   RTO_START_TIMEOUT    seconds within which all must have started (default here 120)
# shellcheck source=launch/env.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

(($# >= 2)) && [[ $1 =~ ^[1-9][0-9]*$ ]] || die "usage: launch/local.sh N MODULE [FLAGS]"
count=$1
shift
check_module "$1"
install train
cd -- "$ROOT"

# Begins lines with "NUMBER: "; a signal must not end it before what it reads from.
number() {
  trap '' INT TERM
  local line
  while IFS= read -r line || [[ $line ]]; do printf '%s: %s\n' "$1" "$line"; done
}

pids=() readers=() caught=""
pass_on() {
  caught=yes
  kill "-$1" "${pids[@]}" 2>/dev/null || true
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM

port=$("$VENV/bin/python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-1}
export RTO_START_TIMEOUT=${RTO_START_TIMEOUT:-120}
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count
set -m  # without, what is started in the background ignores SIGINT
for ((i = 0; i < count; i++)); do
  exec {out}> >(number "$i")
  readers+=($!)
  exec {err}> >(number "$i" >&2)
  readers+=($!)
  JAX_PROCESS_ID=$i "$VENV/bin/python" -m "$@" >&"$out" 2>&"$err" {out}>&- {err}>&- &
  pids+=($!)
  exec {out}>&- {err}>&-
done

status=0
while code=0; wait -n || code=$?; ((code != 127)); do
  # 127: there is none left. A signal ends the wait too, without one that has ended.
  [[ $caught ]] || ((status)) || status=$code
  caught=""
done
wait "${readers[@]}" || true
exit "$status"
