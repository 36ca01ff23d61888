#!/usr/bin/env bash
# jaxlib 0.12.0.1, CPU with AVX-512 BF16: the transpose of a bfloat16 product with float32 sums compiles, and fails as it runs.
#
# Expected: where jnp.matmul(a, b, preferred_element_type=jnp.float32) works, so does its .T.
# Seen: XLA folds the transposition into the product, after it decided that a library multiplies this product; the library does not
# take the new form, and nothing converts its factors. A batched product does the same; with an optimization barrier between
# the two, or with a bfloat16 result, it works. jaxlib 0.10.2 fails alike.
#
# Output seen:
#   product: 64.0
#   transposed: UNIMPLEMENTED: Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32
#   transposed behind a barrier: 64.0
#   transposed, in bfloat16: 64.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1
cat > "$folder/products.py" <<'PYTHON'
import jax
import jax.numpy as jnp

a = b = jnp.ones((64, 64), jnp.bfloat16)


def wide(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


forms = {
    "product": wide,
    "transposed": lambda a, b: wide(a, b).T,
    "transposed behind a barrier": lambda a, b: jax.lax.optimization_barrier(wide(a, b)).T,
    "transposed, in bfloat16": lambda a, b: (a @ b).T,
}
for name, form in forms.items():
    try:
        print(f"{name}: {float(jax.block_until_ready(jax.jit(form)(a, b))[0, 0])}")
    except jax.errors.JaxRuntimeError as error:
        print(f"{name}: {error}")
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/products.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   //p' "$0")
