#!/usr/bin/env bash
# report.sh COMMAND...: runs a process of a job and says its exit code in a line that slurm_job.sh reads, because srun and
# ssh hand on one code for all processes.

set -uo pipefail
if [[ ${1-} == --help ]]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit
fi
if (($# == 0)); then
  echo "report.sh: what to run is missing: report.sh COMMAND..." >&2
  exit 2
fi
# The command gets the signal too, and this waits for it.
trap : INT TERM
"$@"
code=$?
# Ended by the notice, before it could answer: the same command goes on.
if ((code == 143)); then code=75; fi
echo "process ended with exit code $code"
exit "$code"
