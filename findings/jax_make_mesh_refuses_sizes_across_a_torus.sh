#!/usr/bin/env bash
# jax 0.12.0.1 with libtpu 0.0.50.1, meshes over a TPU pod that is not there: whether sizes are a mesh hangs on the pod's shape.
# (NotImplementedError is JAX's own exception and what this is about: nothing here is left to do.)
#
# Expected: jax.make_mesh takes any sizes whose product is the number of devices, as it does on CPUs and GPUs.
# Seen: on a v5p of 4x4x4 (64 devices) 32 x 2 raises NotImplementedError, while 16 x 4 is a mesh: each size must be a product of
# whole axes of the torus. jax.experimental.mesh_utils.create_device_mesh(..., allow_split_physical_axes=True) takes 32 x 2;
# jax.make_mesh has no such argument. On a v6e of 4x8, 2 x 16 raises too; on a v5e of the same shape it is a mesh.
#
# Output seen:
#   cpu: 32 x 2 is a mesh
#   v5p:4x4x4: 64 x 1 is a mesh
#   v5p:4x4x4: 16 x 4 is a mesh
#   v5p:4x4x4: 32 x 2 NotImplementedError; split axes allowed: (32, 2)
#   v5e:4x8: 2 x 16 is a mesh
#   v6e:4x8: 2 x 16 NotImplementedError; split axes allowed: (2, 16)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1 libtpu==0.0.50.1
cat > "$folder/meshes.py" <<'PYTHON'
import jax
from jax.experimental import mesh_utils, topologies


def try_mesh(name, devices, *sizes):
    """Says whether the sizes are a mesh over these devices."""
    asked = " x ".join(map(str, sizes))
    try:
        jax.make_mesh(sizes, ("a", "b"), devices=devices)
        print(f"{name}: {asked} is a mesh")
    except NotImplementedError:  # what jax itself raises, and this script is about
        split = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        print(f"{name}: {asked} NotImplementedError; split axes allowed: {split.shape}")


jax.config.update("jax_num_cpu_devices", 64)
try_mesh("cpu", jax.devices(), 32, 2)
for sizes in ((64, 1), (16, 4), (32, 2)):
    try_mesh("v5p:4x4x4", topologies.get_topology_desc("v5p:4x4x4", "tpu").devices, *sizes)
for name in ("v5e:4x8", "v6e:4x8"):
    try_mesh(name, topologies.get_topology_desc(name, "tpu").devices, 2, 16)
PYTHON
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5litepod-4 ALLOW_MULTIPLE_LIBTPU_LOAD=1
"$folder/venv/bin/python" "$folder/meshes.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   //p' "$0")
