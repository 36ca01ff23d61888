#!/usr/bin/env bash
# jaxlib 0.10.2, CPU: the same program on the same machine gives other bits when it may use another number of cores.
#
# Expected: a compiled program is one order of additions; cores only share out its work.
# Seen: sums of many numbers, and products that sum over many rows, are split by the number of cores that the process may use
# (taskset, a container's limit, a cluster's allocation), and the parts are added up afterwards. A run that is stopped on 8 cores
# and resumed on 4 goes on with other last digits, with no other version, seed or flag.
#
# Output seen on 2 cores or more:
#   sum of 65,536: the same bits
#   sum of 262,144: other bits on one core
#   x.T @ y over 1,024 rows: other bits on one core
#   x + y: the same bits
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/bits.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

keys = jax.random.split(jax.random.key(0), 4)
few, many = jax.random.normal(keys[0], (1 << 16,)), jax.random.normal(keys[1], (1 << 18,))
x, y = jax.random.normal(keys[2], (1024, 256)), jax.random.normal(keys[3], (1024, 256))
programs = {
    "sum of 65,536": (jnp.sum, few),
    "sum of 262,144": (jnp.sum, many),
    "x.T @ y over 1,024 rows": (lambda x, y: x.T @ y, x, y),
    "x + y": (lambda x, y: x + y, x, y),
}
for name, (program, *values) in programs.items():
    print(name, np.asarray(jax.jit(program)(*values)).tobytes().hex(), sep="\t")
PYTHON
export JAX_PLATFORMS=cpu
"$folder/venv/bin/python" "$folder/bits.py" > "$folder/all"
taskset -c "$(taskset -cp $$ | grep -o '[0-9]*$')" "$folder/venv/bin/python" "$folder/bits.py" > "$folder/one"
paste "$folder/all" "$folder/one" |
    awk -F '\t' '{ print $1 ": " ($2 == $4 ? "the same bits" : "other bits on one core") }' | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   //p' "$0")
