#!/usr/bin/env bash
# tpu_worker.sh RUN COMMAND...: what tpu_pod.sh starts on each worker of a pod. Starts COMMAND apart from the connection and
# follows it: called again with the same RUN, as gcloud does when a connection breaks, it goes on following; with
# another, it first ends the run before.

set -euo pipefail
if [[ ${1-} == --help ]]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit
fi
if (($# < 2)); then
  echo "tpu_worker.sh: RUN COMMAND... is missing: launch/tpu_pod.sh starts this" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
folder=.launch/$1
shift
mkdir -p .launch

# Whether process $1 is a run: its number may be another's by now.
runs() { [[ $(tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline") == *" launch/report.sh "* ]]; }

end_runs_before() {
  local file pid second
  for file in .launch/*/pid; do
    [[ -e $file ]] || continue
    pid=$(<"$file")
    if runs "$pid"; then
      kill -TERM -- "-$pid"
      for ((second = 0; second < 120; second++)); do
        runs "$pid" || break
        sleep 1
      done
      kill -KILL -- "-$pid" 2>/dev/null || true
    fi
    rm -r "${file%/pid}"
  done
}

if [[ ! -d $folder ]]; then
  end_runs_before
  mkdir "$folder"
  : >"$folder/log" # there before the process that writes it, for those who follow
  PATH=$PWD/.venv/bin:$PATH setsid bash launch/report.sh "$@" >>"$folder/log" 2>&1 </dev/null &
  echo $! >"$folder/pid"
fi
tail -n +1 --pid="$(<"$folder/pid")" -f "$folder/log" | sed -u "s/^/[${HOSTNAME##*-}] /"
exit "$(sed -n '$s/.*process ended with exit code \([0-9]*\)$/\1/p' "$folder/log" | grep . || echo 137)"
