#!/usr/bin/env bash
# slurm_job.sh LAUNCH_FOLDER RESTARTS SRUN...: the job that slurm.sh submits.

set -euo pipefail
if [[ ${1-} == --help ]]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit
fi
if (($# < 3)); then
  echo "slurm_job.sh: LAUNCH_FOLDER RESTARTS SRUN... is missing: launch/slurm.sh submits this" >&2
  exit 2
fi
# shellcheck source=launch/common.sh
. "$1/common.sh"
restarts=$2 dry_run=''
shift 2
have "$1" "launch/slurm.sh submits this to a SLURM cluster, on whose nodes it is"

for ((restart = 1; ; restart++)); do
  run_reported "$@"
  case $code in
    0 | 2) exit "$code" ;;
    75)
      say "exit code 75: queueing job $SLURM_JOB_ID again"
      # Incomplete: a job that was cancelled stays so.
      scontrol requeue Incomplete "$SLURM_JOB_ID"
      exit 75
      ;;
  esac
  if ((restart > restarts)); then
    say "exit code $code, and --restarts $restarts is used up"
    exit "$code"
  fi
  say "exit code $code: starting again, restart $restart of $restarts"
done
