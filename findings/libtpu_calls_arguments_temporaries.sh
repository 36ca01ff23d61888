#!/usr/bin/env bash
# libtpu 0.0.42.1 with jax 0.10.2, compiling for a TPU that is not there: what does not fit is all called temporaries.
#
# Expected: a program whose arguments alone are larger than the memory is refused with the size of its arguments; "HLO
# temporaries" are what it needs besides, as `memory_analysis().temp_size_in_bytes` of a program that compiles.
# Seen: "the total memory required for HLO temporaries" is everything, arguments too: a sum over 20 GiB, whose temporaries are some
# kB where it compiles, "requires 20.00G for HLO temporaries". Whoever adds the arguments to it counts them twice.
#
# Output seen:
#   14 GiB of arguments: compiles, temporaries under 1 MB
#   20 GiB of arguments: total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1
cat > "$folder/sum.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental import topologies

device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
place = jax.sharding.SingleDeviceSharding(device)
for gib in (14, 20):
    x = jax.ShapeDtypeStruct((gib, 1 << 18, 1 << 10), jnp.float32, sharding=place)
    try:
        compiled = jax.jit(jnp.sum, out_shardings=place).lower(x).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        print(f"{gib} GiB of arguments: compiles, temporaries {'under 1 MB' if temporaries < 1e6 else temporaries}")
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        print(f"{gib} GiB of arguments: {said[said.index('total memory') :].rstrip('.')}")
PYTHON
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5litepod-4 ALLOW_MULTIPLE_LIBTPU_LOAD=1
"$folder/venv/bin/python" "$folder/sum.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   //p' "$0")
