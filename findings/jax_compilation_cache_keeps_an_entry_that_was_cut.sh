#!/usr/bin/env bash
# jax 0.12.0.1: an entry of the persistent compilation cache that was cut short while it was written is never written anew.
#
# Expected: an entry is written beside its place and renamed, so that it is whole or not there; or one that cannot be read is
# replaced by what is then compiled.
# Seen: it is written in place. After a disk that was full (here: a limit on the size of files), or a kill meanwhile, its first
# part stays. Every later start warns that it cannot be read, compiles the program again, finds that there is an entry, and leaves
# that as it is. A cluster that shares the folder compiles at every start, until the file is removed by hand.
#
# Output seen:
#   start 1, room for 4 KiB: compiled; warned: Error writing; entries: 1
#   start 2: compiled; warned: Error reading; entry as it was: True
#   start 3: compiled; warned: Error reading; entry as it was: True
#   start 4, the entry removed by hand: compiled; warned: nothing; entries: 1
#   start 5: read; warned: nothing; entry as it was: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1
cat > "$folder/start.py" <<'PYTHON'
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

folder, label, what = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_compilation_cache_dir", str(folder))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))


def entries():
    return sorted((file.name, file.read_bytes()) for file in folder.glob("*-cache"))


@jax.jit
def step(x):
    for _ in range(8):
        x = jnp.tanh(x @ x) + jnp.sin(x).sum(0)
    return x


before = entries()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    step.lower(np.ones((8, 8), "float32")).compile()
how = "read" if "/jax/compilation_cache/cache_hits" in events else "compiled"
said = {" ".join(str(one.message).split()[:2]) for one in seen if "persistent compilation cache" in str(one.message)}
after = f"entries: {len(entries())}" if what == "count" else f"entry as it was: {before == entries()}"
print(f"{label}: {how}; warned: {', '.join(sorted(said)) or 'nothing'}; {after}")
PYTHON
mkdir "$folder/cache"
start() { JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/start.py" "$folder/cache" "$@"; }
{
  (ulimit -f 4; start "start 1, room for 4 KiB" count)
  start "start 2" compare
  start "start 3" compare
  rm "$folder"/cache/*-cache
  start "start 4, the entry removed by hand" count
  start "start 5" compare
} | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   //p' "$0")
