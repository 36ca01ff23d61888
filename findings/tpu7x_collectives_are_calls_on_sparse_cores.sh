#!/usr/bin/env bash
# libtpu 0.0.42.1 with jax 0.10.2: a program compiled for tpu7x has no collective instruction where one for v5e has it.
#
# Expected: whoever counts the collectives of a compiled program by their opcode (all-gather, or all-gather-start and -done) counts
# them on every TPU.
# Seen: on tpu7x the entry computation says call-start and call-done on the thread "sparsecore", and the all-gather stands alone in
# the computation that they call. A tool that reads entry computations, loops and fusions finds nothing, and reports a program that
# communicates nothing.
#
# Output seen:
#   v5e:2x2: all-gathers in computations of the main thread 3, of sparse cores 0
#   tpu7x:2x2x1: all-gathers in computations of the main thread 0, of sparse cores 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1
cat > "$folder/gather.py" <<'PYTHON'
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

name = sys.argv[1]
mesh = Mesh(np.array(topologies.get_topology_desc(name, "tpu").devices), ("devices",))
split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("devices",), ()))
x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=split)
y = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=whole)
program = jax.jit(lambda x, y: (jax.lax.with_sharding_constraint(x, whole), y @ y), out_shardings=whole).lower(x, y).compile()
computations = program.as_text().strip().split("\n\n")
gathers = [len(re.findall(r" all-gather(?:-start)?\(", text)) for text in computations]
sparse = [n for n, text in zip(gathers, computations) if 'execution_thread="sparsecore"' in text.strip().splitlines()[-1]]
main = sum(gathers) - sum(sparse)
print(f"{name}: all-gathers in computations of the main thread {main}, of sparse cores {sum(sparse)}")
PYTHON
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5litepod-4 ALLOW_MULTIPLE_LIBTPU_LOAD=1
for name in v5e:2x2 tpu7x:2x2x1; do "$folder/venv/bin/python" "$folder/gather.py" "$name"; done | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   //p' "$0")
