"""The training step compiles for TPUs that are not there, with splash attention forward and backward."""

import json
import subprocess
import sys

import pytest
from tiny import as_users, needs_libtpu

PROGRAM = """
import json, re
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
import spdf_jax as spdf
from spdf_jax.data import Batch
from spdf_jax.training.phases import make_plan
from spdf_jax.planning.describe import state_bytes
from spdf_jax.sharding import batch_sharding
from spdf_jax.training.state import abstract_state, state_shardings
from spdf_jax.training.programs import make_steps

BATCH, LENGTH = 4, 1024
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(devices).reshape(1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
c = spdf.default_config("tpu", "test", variants=("test",))
m = c.model
m.n_layer, m.n_head, m.d_model, m.vocab_size, m.context, m.dtype = 2, 4, 256, 512, LENGTH, "bfloat16"
c.pretrain.batch_size, c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = BATCH, "static", 0.75
config = spdf.resolve(c)
(plan,) = make_plan(config)
model = spdf.GPT(config.model)
state = abstract_state(model, plan.tx, plan.config.sparsity, plan.filter)
shardings = state_shardings(mesh, plan.tx, state)
state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
of_batch = [((1, BATCH, LENGTH), dtype) for dtype in ("int32", "int32", "float32")]
batch = Batch(*(jax.ShapeDtypeStruct(*like, sharding=batch_sharding(mesh, 3)) for like in of_batch))
steps = make_steps(model, plan.tx, plan.learning_rate, plan.programme.config.topology_rule, shardings)

found = {}
with jax.set_mesh(mesh):
    for pattern in ("causal", "local_strided"):
        compiled = steps.train.lower(state, batch, pattern=pattern, width=256).compile()
        kernels = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
        found[pattern] = {
            "kernels": sorted(re.search(r"%splash_mha_([a-z]+)_", line)[1] for line in kernels),
            "per_device": all("bf16[2,2,1024,64]" in line for line in kernels),  # batch, heads, length, head size
            "state_share": compiled.memory_analysis().argument_size_in_bytes / state_bytes(config, plan),
        }
print(json.dumps(found))
"""


@pytest.mark.slow
@needs_libtpu
def test_the_training_step_of_a_sharded_state_compiles_for_v5e_with_splash_attention():
    # Its own process: libtpu writes to stderr, and stays.
    environment = as_users() | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["causal", "local_strided"]
    for pattern, program in found.items():
        # Forward, gradient of keys and values, gradient of queries: once each, in the loop over layers.
        assert program["kernels"] == ["dkv", "dq", "fwd"], pattern
        assert program["per_device"], f"{pattern}: 4 sequences of 4 heads are 2 of 2 on each of 2 x 2 devices"
        assert 0.25 < program["state_share"] < 0.4, "a device holds its quarter, and what is too small to split"
