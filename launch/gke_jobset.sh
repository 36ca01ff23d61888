#!/usr/bin/env bash
# Submits a training run to GKE as a JobSet: one TPU pod, one container a host.
#
#   launch/gke_jobset.sh --topology v5e:16x16 --image REGION-docker.pkg.dev/PROJECT/REPOSITORY/spdf_jax -- \
#     --config experiments/gpt2_mst.py:124m --workdir gs://BUCKET/mst
#
# Needs kubectl at a cluster with the JobSet controller (v0.6 or later) and a node pool of that topology, and an image whose
# working folder is this one, installed by pip install -c requirements.lock -e '.[tpu,gcs]'. --workdir must be on storage that
# all containers see. The JobSet restarts whatever ends, but for what you must fix (exit code 2), which fails it. A JobSet that has
# ended is in the way of the next one of its name: kubectl delete jobset NAME.
#
# --topology NAME         the TPU pod, spelled as for --plan_topology; needed
# --image IMAGE           the image; needed
# --chips_per_host N      chips of each host: 4, or all if there are fewer (8 on ct5lp-hightpu-8t)
# --spot                  on nodes that may be taken away
# --service_account NAME  the Kubernetes service account, where the bucket asks for one
# --name NAME             the JobSet's name (spdf-jax)
# --restarts N            how many times to start again, preemptions too (50)
# --dry_run               print the command and run nothing
# -- ...                  flags of spdf_jax.main, or another command

set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

topology='' image='' chips_per_host='' spot='' service_account='' name=spdf-jax restarts=50
parse "topology image chips_per_host service_account name restarts" "spot" "$@"
need topology v5e:16x16
need image europe-docker.pkg.dev/PROJECT/REPOSITORY/spdf_jax
read_topology "$topology"
chips=$((${shape//x/*}))
chips_per_host=${chips_per_host:-$((chips < 4 ? chips : 4))}
number 1 chips_per_host
number 0 restarts
((chips % chips_per_host == 0)) || die "--chips_per_host $chips_per_host: the $chips chips of $topology cannot be divided so"
hosts=$((chips / chips_per_host))

# A string of JSON, which YAML reads too.
json() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "${text//$'\n'/\\n}"
}

manifest() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(json "$name")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: somethingToMend
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: spdf-jax, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
END
  [[ ! $service_account ]] || echo "              serviceAccountName: $(json "$service_account")"
  cat <<END
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $gke_accelerator
                cloud.google.com/gke-tpu-topology: $shape
END
  [[ ! $spot ]] || echo '                cloud.google.com/gke-spot: "true"'
  cat <<END
              containers:
                - name: spdf-jax
                  image: $(json "$image")
                  command:
END
  local word
  for word in "${command[@]}"; do echo "                    - $(json "${word//\$/\$\$}")"; done # Kubernetes expands $(...)
  cat <<END
                  resources:
                    limits:
                      google.com/tpu: $chips_per_host
END
}

have kubectl "install it, and choose the cluster: gcloud container clusters get-credentials"
if [[ $dry_run ]]; then
  printf "kubectl apply -f - <<'EOF'\n%s\nEOF\n" "$(manifest)"
else
  manifest | kubectl apply -f -
fi
