#!/usr/bin/env bash
# Submits a training run to SLURM: GPUs of several nodes. Give the command again when a run is to go on.
#
#   SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=24:00:00 launch/slurm.sh --nodes 4 --gpus_per_node 8 -- \
#     --config experiments/gpt2_mst.py:124m --workdir /shared/runs/mst
#
# The folder in which it is given, Python's environment and --workdir must be on storage that all nodes see. sbatch reads
# the rest (partition, account, time limit, memory) from its own variables, SBATCH_PARTITION and so on. Two minutes before the
# time limit, and when SLURM preempts, the processes save and end with 75, and the job is queued again. A crash
# is started again inside the job; what you must fix (2) ends it.
#
# --nodes N               how many nodes; needed
# --gpus_per_node N       GPUs of each node; needed
# --process_per gpu|node  one process a GPU or one a node (gpu)
# --cpus_per_process N    CPU cores of each process (what the cluster gives)
# --name NAME             the job's name (spdf-jax)
# --restarts N            how many times to start again after a crash (3)
# --dry_run               print the command and run nothing
# -- ...                  flags of spdf_jax.main, or another command

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

nodes='' gpus_per_node='' process_per=gpu cpus_per_process='' name=spdf-jax restarts=3
parse "nodes gpus_per_node process_per cpus_per_process name restarts" "" "$@"
need nodes 4
need gpus_per_node 8
number 1 nodes gpus_per_node ${cpus_per_process:+cpus_per_process}
number 0 restarts
have sbatch "start this on a login node of a SLURM cluster"

case $process_per in
  # JAX takes the GPU of its local number, so each process must see all that the job has of its node: SLURM's default. Not
  # --gpu-bind=none, which leaves CUDA_VISIBLE_DEVICES unset (22.05): where nothing else forbids it, other jobs' GPUs are taken.
  gpu) processes_per_node=$gpus_per_node ;;
  node)
    processes_per_node=1
    command=(env "JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus_per_node - 1)))" "${command[@]}")
    ;;
  *) die "--process_per $process_per: gpu or node is needed" ;;
esac
cpus=()
if [[ $cpus_per_process ]]; then cpus=("--cpus-per-task=$cpus_per_process"); fi

# srun answers TERM with KILL, so the notice goes to the steps (no B:), which pass it on to the processes. --wait outlasts
# the time that processes take to notice a lost one and to stop by themselves.
run sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$processes_per_node" "--gpus-per-node=$gpus_per_node" \
  "${cpus[@]}" --requeue --open-mode=append --signal=TERM@120 \
  "$here/slurm_job.sh" "$here" "$restarts" srun "${cpus[@]}" --label --kill-on-bad-exit=0 --wait=300 \
  "$here/report.sh" "${command[@]}"
