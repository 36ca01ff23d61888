#!/usr/bin/env bash
# Runs a many-process training run on this machine.
#
#   launch/local.sh --processes 2 -- --config experiments/gpt2_mst.py
#
# Each process's lines are marked with its number. When one fails the others are ended, and the worst exit code is returned.
# What was preempted, lost a process (75) or crashed is started again; what you must fix (2) is not.
#
# --processes N            how many processes; needed
# --devices_per_process N  devices of each process (1)
# --platform cpu|gpu       simulated CPU devices, or this machine's GPUs in order (cpu)
# --restarts N             how many times to start again (3)
# --grace_seconds N        how long an ended process may take to save (120)
# --dry_run                print the commands and run nothing
# -- ...                   flags of spdf_jax.main, or another command

set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

processes='' devices_per_process=1 platform=cpu restarts=3 grace_seconds=120
parse "processes devices_per_process platform restarts grace_seconds" "" "$@"
need processes 2
number 1 processes devices_per_process
number 0 restarts grace_seconds
[[ $platform == cpu || $platform == gpu ]] || die "--platform $platform: cpu or gpu is needed"
have "${command[0]}" "activate the environment that it is installed in"

# A port below those that the system gives to outgoing connections, with nobody listening.
pick_port() {
  port=$((10000 + RANDOM % 20000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    port=$((10000 + RANDOM % 20000))
  done
}

# The words of process $1, in the array `words`.
compose() {
  local first=$(($1 * devices_per_process))
  words=(env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$1")
  if [[ $platform == cpu ]]; then
    words+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices_per_process")
  else
    words+=(JAX_PLATFORMS=cuda "CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + devices_per_process - 1)))")
  fi
  words+=("${command[@]}")
}

# Copies lines with a mark; ends with the process that writes them, not with a signal.
mark() {
  trap '' INT TERM
  exec sed -u "s/^/[$1] /"
}

# One run of all processes. Leaves its exit code in `code`.
run_once() {
  local pids=() codes=() ending='' deadline=0 id status
  pick_port
  for ((id = 0; id < processes; id++)); do
    compose "$id"
    "${words[@]}" > >(mark "$id") 2> >(mark "$id" >&2) &
    pids[id]=$!
  done
  while ((${#pids[@]})); do
    sleep 0.2
    for id in "${!pids[@]}"; do
      if kill -0 "${pids[id]}" 2>/dev/null; then continue; fi
      status=0
      wait "${pids[id]}" || status=$?
      unset "pids[id]"
      # One that we ended says nothing of why.
      if [[ $ending && ! $stopped && ($status == 143 || $status == 137) ]]; then continue; fi
      codes+=("$status")
      ((status == 0)) || say "process $id: exit code $status"
    done
    code=$(worst "${codes[@]}")
    if [[ ! $ending && ($stopped || $code != 0) ]]; then
      ending=1 deadline=$((SECONDS + grace_seconds))
      kill -TERM "${pids[@]}" 2>/dev/null || true
    elif [[ $ending ]] && ((SECONDS > deadline)); then
      kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
  done
}

if [[ $dry_run ]]; then
  pick_port
  for ((id = 0; id < processes; id++)); do
    compose "$id"
    printf '%s &\n' "$(quote "${words[@]}")"
  done
  echo wait
  exit
fi
code=0 stopped=''
trap 'stopped=1' INT TERM
for ((restart = 1; ; restart++)); do
  run_once
  if [[ $code == 0 || $code == 2 || $stopped ]]; then exit "$code"; fi
  if ((restart > restarts)); then
    say "exit code $code, and --restarts $restarts is used up"
    exit "$code"
  fi
  say "exit code $code: starting again, restart $restart of $restarts"
done
