#!/usr/bin/env bash
# Trains on a Cloud TPU pod: asks for it, installs this folder on all its workers, runs, and gives it back.
#
#   launch/tpu_pod.sh --topology v5e:16x16 --zone europe-west4-b --spot -- \
#     --config experiments/gpt2_mst.py:124m --workdir gs://BUCKET/mst
#
# Needs gcloud, logged in, with a project and TPU quota. --workdir must be on storage that all workers see, as a
# bucket is. A pod that is taken away is asked for again, and the run goes on. What was preempted or lost a process (75) or
# crashed is started again on the pod; what you must fix (2) is not. When this script is interrupted, pod and run stay; the same command takes over.
#
# --topology NAME         the pod, spelled as for --plan_topology; needed
# --zone ZONE             where; needed
# --spot                  a pod that may be taken away, at a lower price
# --name NAME             the name of the queued resource and its node (spdf-jax)
# --runtime_version NAME  software of the workers (the one for that generation)
# --restarts N            how many times to start again after a crash (3)
# --keep                  leave the pod there at the end
# --dry_run               print the commands and run nothing
# -- ...                  flags of spdf_jax.main, or another command

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
# shellcheck source=launch/common.sh
. "$here/common.sh"

topology='' zone='' spot='' name=spdf-jax runtime_version='' restarts=3 keep=''
parse "topology zone name runtime_version restarts" "spot keep" "$@"
need topology v5e:16x16
need zone europe-west4-b
number 0 restarts
have gcloud "install the Google Cloud CLI and log in"
read_topology "$topology"
[[ $gcloud_type ]] || die "--topology $topology: such a pod is had through GKE: launch/gke_jobset.sh"

queue=(gcloud compute tpus queued-resources)
on_workers=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all --ssh-flag=-oServerAliveInterval=30)
delete=("${queue[@]}" delete "$name" "--zone=$zone" --force --quiet)

create() {
  run "${queue[@]}" create "$name" "--node-id=$name" "--zone=$zone" "--type=$gcloud_type" "--topology=$shape" \
    "--runtime-version=${runtime_version:-$gcloud_runtime}" ${spot:+--spot}
}

state() { run "${queue[@]}" describe "$name" "--zone=$zone" '--format=value(state.state)'; }

# The workers' own Python is older than this package wants; uv brings one.
install() {
  run "${on_workers[@]}" --command='rm -rf spdf_jax/spdf_jax spdf_jax/experiments && mkdir -p spdf_jax' &&
    run gcloud compute tpus tpu-vm scp --recurse "$root"/{spdf_jax,experiments,launch,pyproject.toml,requirements.lock,README.md,LICENSE} \
      "$name:spdf_jax/" "--zone=$zone" --worker=all &&
    run "${on_workers[@]}" --command="cd spdf_jax && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv && \
python3 -m uv venv --quiet --allow-existing --python 3.13 && python3 -m uv pip install --quiet -c requirements.lock -e '.[tpu,gcs]'"
}

# Leaves the exit code in `code`. The number names the run, so that a connection which breaks finds it again.
train() {
  run_reported "${on_workers[@]}" "--command=$(quote bash spdf_jax/launch/tpu_worker.sh "$(date +%s)" "${command[@]}")"
}

finish() {
  if [[ ! $keep ]]; then run "${delete[@]}"; fi
  exit "$code"
}

# again WHY: counts a failure, and ends when there were too many.
again() {
  failures=$((failures + 1))
  if ((failures > restarts)); then
    say "$1, and --restarts $restarts is used up"
    finish
  fi
  say "$1: starting again, restart $failures of $restarts"
  sleep 30
}

code=0
if [[ $dry_run ]]; then
  create && state && install && train
  finish
fi
scratch=$(mktemp)
trap 'rm -f "$scratch"' EXIT
trap 'say "interrupted; the pod is still there, and this ends it: $(quote "${delete[@]}")"; exit 130' INT
failures=0 ready='' seen=''
while :; do
  if ! now=$(state 2>"$scratch" </dev/null); then # who cannot see a question is not asked one
    now=UNKNOWN
    if grep -q NOT_FOUND "$scratch"; then now=ABSENT; fi
    # Of a pod that was known once, gcloud will tell again.
    if [[ $now == UNKNOWN && ! $seen ]]; then
      die "gcloud cannot be asked for $name: $(tr -s '[:space:]' ' ' <"$scratch" | sed 's/ $//')"
    fi
  fi
  [[ $now == "$seen" ]] || say "queued resource $name: $now"
  seen=$now
  code=1
  case $now in
    ABSENT) create || again "the pod cannot be asked for" ;;
    ACTIVE)
      if [[ ! $ready ]] && ! install; then
        again "the workers cannot be set up"
        continue
      fi
      ready=1
      train
      case $code in
        0 | 2) finish ;;
        75) say "exit code 75: starting again" && sleep 30 ;;
        *) again "exit code $code" ;;
      esac
      ;;
    FAILED | SUSPENDED)
      if [[ $ready ]]; then failures=0 ready=''; else again "no pod (gcloud compute tpus queued-resources describe $name --zone=$zone says why)"; fi
      "${delete[@]}" || true
      ;;
    *) sleep 30 ;;
  esac
done
