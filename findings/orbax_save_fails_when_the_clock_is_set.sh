#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: an asynchronous save fails when the machine's clock is set ahead while it is under way.
#
# Expected: how long a save may take is measured by a clock that nobody sets (time.monotonic).
# Seen: futures and signals wait by time.time(). A clock set ahead by more than the 600 seconds of AsyncOptions, as at the first
# synchronisation of a machine that booted with a wrong one or when a laptop wakes up, is a TimeoutError of the save under way.
# The checkpoint is not written, although nothing was slow.
#
# Output seen:
#   TimeoutError, after 0 minutes in all; the step is on disk: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder/checkpoints" <<'PYTHON' | tee "$folder/seen"
import logging
import os
import sys
import time

import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging as absl_logging

absl_logging.set_verbosity(absl_logging.FATAL)
logging.disable(logging.CRITICAL)
true_time, began = time.time, time.monotonic()
manager = ocp.CheckpointManager(sys.argv[1], options=ocp.CheckpointManagerOptions(enable_async_checkpointing=True))
calls = 0


def time_set_ahead():
    """Right for the first calls, an hour ahead from then on: the clock is set once."""
    global calls
    calls += 1
    return true_time() + (3600 if calls > AFTER else 0)


found = None
for AFTER in range(1, 200):  # the moment differs: which call is in the middle of the save depends on the threads
    calls, time.time = 0, time_set_ahead
    try:
        manager.save(AFTER, args=ocp.args.StandardSave({"w": jnp.ones((256, 256))}))
        manager.wait_until_finished()
    except TimeoutError:
        found = AFTER
    finally:
        time.time = true_time
    if found:
        break
assert found, "no save failed"
missing = found not in ocp.utils.checkpoint_steps(sys.argv[1])
print(f"TimeoutError, after {int(time.monotonic() - began) // 60} minutes in all; the step is on disk: {not missing}", flush=True)
os._exit(0)  # threads of the failed save wait on
PYTHON
grep -q '^TimeoutError, after 0 minutes in all; the step is on disk: False$' "$folder/seen"
