#!/usr/bin/env bash
# optax 0.2.8: tree.map_params, which finds the parameter-like leaves of any optimiser's state, fails on optimisers with a line search.
#
# Expected: a function documented for the state of any gradient transformation works for optax.lbfgs too, or names what it lacks.
# Seen: IndexError from inside, for lbfgs and for each line search by itself; their states hold parameter-like leaves (the history,
# the last gradient), so sharding a state by its parameters, or keeping masked weights' entries at zero, needs another way.
#
# Output seen:
#   adam: ok
#   scale_by_lbfgs: ok
#   lbfgs: IndexError: list index out of range
#   scale_by_zoom_linesearch: IndexError: list index out of range
#   scale_by_backtracking_linesearch: IndexError: list index out of range
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/seen"
import jax.numpy as jnp
import optax

params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
optimisers = {
    "adam": optax.adam(1e-3),
    "scale_by_lbfgs": optax.scale_by_lbfgs(),
    "lbfgs": optax.lbfgs(),
    "scale_by_zoom_linesearch": optax.scale_by_zoom_linesearch(max_linesearch_steps=5),
    "scale_by_backtracking_linesearch": optax.scale_by_backtracking_linesearch(max_backtracking_steps=5),
}
for name, optimiser in optimisers.items():
    try:
        optax.tree.map_params(optimiser, jnp.zeros_like, optimiser.init(params))
        print(f"{name}: ok")
    except IndexError as error:
        print(f"{name}: IndexError: {error}")
PYTHON
diff "$folder/seen" <(sed -n 's/^#   //p' "$0")
