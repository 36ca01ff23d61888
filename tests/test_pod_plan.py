"""Plans for TPU pods: reading programs, timing them, suggestions and errors; slowly, a real one for a small model."""

import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import as_users, drawn_params, few_matrices, needs_libtpu

import spdf_jax as spdf
from spdf_jax.config.read import load_config
from spdf_jax.planning import search as searching
from spdf_jax.planning.hlo import (
    Collective,
    Instruction,
    Loop,
    executed,
    executed_collectives,
    matrix_flops,
    read_program,
)
from spdf_jax.planning.pod import GIB, Kind, Layout, Need, estimate, suggest
from spdf_jax.planning.pod_plan import collective_table, describe_pod, flags, lower_steps
from spdf_jax.planning.search import search
from spdf_jax.planning.tpu import GENERATIONS, TpuPod, tpu_name
from spdf_jax.sharding import MeshConfig, batch_sharding, make_mesh, replicated
from spdf_jax.training.phases import make_plan

ROOT = Path(__file__).parent.parent

PROGRAM = """HloModule jit_step, is_scheduled=true

%sparsecore (p9: bf16[8,16], p10: token[]) -> bf16[32,16] {
  %p9 = bf16[8,16]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[32,16]{1,0} all-gather(%p9), channel_id=11, replica_groups=[1,4]<=[4], dimensions={0}
}, execution_thread="sparsecore"

%fused_start (p0: bf16[8,16]) -> bf16[32,16] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

%async_collective_fusion (p1: bf16[8,16], p2: bf16[64,32]) -> bf16[64,16] {
  %p1 = bf16[8,16]{1,0} parameter(0)
  %all-gather.2 = bf16[32,16]{1,0} all-gather(%p1), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  %p2 = bf16[64,32]{1,0} parameter(1)
  %w = bf16[32,16]{1,0} parameter(2)
  ROOT %convolution.1 = bf16[64,16]{1,0} convolution(%p2, %w), dim_labels=bf_io->bf
}

%all-reduce-scatter.3 (p3: bf16[32,16]) -> bf16[8,16] {
  %p3 = bf16[32,16]{1,0} parameter(0)
  %all-reduce.3 = bf16[32,16]{1,0} all-reduce(%p3), channel_id=9, replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[8,16]{1,0} dynamic-slice(%all-reduce.3, %i, %j)
}

%inner (t: (s32[], f32[])) -> (s32[], f32[]) {
  %permute = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%v), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %v = f32[4]{0} parameter(0)
  %permute-done = f32[4]{0} collective-permute-done(%permute)
}

%inner_condition (t: (s32[], f32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %lt.1 = pred[] compare(%i, %n), direction=LT
}

%layer (t: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %shard = bf16[8,16]{1,0} parameter(0)
  %async-collective-start = (bf16[8,16], bf16[32,16]) fusion(%shard), kind=kCustom, calls=%fused_start
  %fusion.1 = (bf16[64,16]) fusion(%a, %b), kind=kOutput, calls=%async_collective_fusion, \
backend_config={"window_config":{"estimated_cycles":"1500000"}}
  %async-collective-done = bf16[32,16] fusion(%c), kind=kCustom, calls=%fused_start
  %fusion.2 = bf16[8,16]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %while.2 = (s32[], f32[]) while(%t2), condition=%inner_condition, body=%inner
  %copy.1 = f32[8]{0} copy(%x), backend_config={"estimated_cycles":"30"}
  %gather.call-start = ((bf16[8,16], token[]), bf16[32,16]) call-start(%shard, %t3), \
async_execution_thread="sparsecore", to_apply=%sparsecore
  %fusion.3 = f32[8]{0} fusion(%x), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"70"}
  %gather.call-done = bf16[32,16]{1,0} call-done(%gather.call-start)
}

%none (x: f32[8]) -> f32[8] {
  %x.2 = f32[8]{0} parameter(0)
}

%layer_condition (t: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[] constant(12)
  %index = s32[] get-tuple-element(%t), index=0
  ROOT %lt.2 = pred[] compare(%index, %limit), direction=LT
}

ENTRY %main (a: bf16[8,16]) -> f32[] {
  %a = bf16[8,16]{1,0} parameter(0)
  %loss = f32[]{:T(128)} parameter(1)
  %pair = (f32[8]{0}, /*index=1*/f32[2,2]{1,0}) all-reduce(%y, %z), channel_id=2, \
replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, to_apply=%add
  %y = f32[8]{0} parameter(2)
  %z = f32[2,2]{1,0} parameter(3)
  %while.1 = (s32[], bf16[8,16]) while(%t1), condition=%layer_condition, body=%layer
  %splash_mha_fwd_residuals.3 = (f32[1,64,64]{2,1,0}) custom-call(%m, %q), custom_call_target="tpu_custom_call", \
operand_layout_constraints={s8[1,4,4]{2,1,0}, bf16[2,16,2048,128]{3,2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, backend_config={"flag_configs":[]}
  ROOT %sum = f32[] all-reduce(%loss), channel_id=3, replica_groups=mesh['axis_0'=4] {'axis_0'}, to_apply=%add
}
"""


def test_collectives_count_as_often_as_they_run_and_once_for_all_fusions_that_they_run_beside():
    found = [(times, c.kind, c.bytes, c.devices) for times, c in executed_collectives(read_program(PROGRAM))]
    assert found == [
        (1, "all-reduce", 4 * (8 + 4), (0, 2)),
        (12, "all-gather", 2 * 32 * 16, (0, 1, 2, 3)),
        (12, "reduce-scatter", 2 * 32 * 16, (0, 2)),
        (36, "collective-permute", 4 * 4, (0, 1)),
        (12, "all-gather", 2 * 32 * 16, (0, 1, 2, 3)),
        (1, "all-reduce", 4, (0, 1, 2, 3)),
    ]
    assert collective_table(read_program(PROGRAM)) == [
        "  all-gather            24 times, 24.6 kB in all, at most 1.02 kB",
        "  all-reduce            2 times, 52 bytes in all, at most 48 bytes",
        "  collective-permute    36 times, 576 bytes in all, at most 16 bytes",
        "  reduce-scatter        12 times, 12.3 kB in all, at most 1.02 kB",
    ]


def test_flops_cycles_and_kernels_are_multiplied_by_their_loops():
    items = read_program(PROGRAM)
    assert matrix_flops(items) == 12 * 2 * 64 * 32 * 16
    assert sum(times * i.cycles for times, i in executed(items)) == 12 * (1_500_000 + 30 + 70)
    assert [(times, i.kernel, i.operands[-1]) for times, i in executed(items) if i.kernel] == [
        (1, "splash_mha_fwd_residuals", (2, 16, 2048, 128))
    ]
    assert [item.times for item in items if isinstance(item, Loop)] == [12]


@pytest.mark.parametrize(
    ("instruction", "products"),
    [
        # Batched products come as windows that slide over padding or holes: only what is there counts.
        ("bf16[8,128,64] convolution(%l, %r), window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=bf0_0oi->0bf", 8),
        ("bf16[8,128,64] convolution(%l, %r), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf", 8),
    ],
)
def test_flops_of_products_written_as_sliding_windows(instruction, products):
    left = "bf16[128,32,1]" if "pad" in instruction else "bf16[8,128,32]"
    lines = (f"%l = {left} parameter(0)", "%r = bf16[8,64,32] parameter(1)", f"%c = {instruction}")
    text = "\n  ".join(["ENTRY %main (a: f32[]) -> f32[] {", *lines]) + "\n}"
    assert matrix_flops(read_program(text)) == products * 2 * 128 * 64 * 32


def test_a_collective_of_a_sparse_core_runs_beside_what_computes_until_it_is_waited_for():
    (layer,) = (item for item in read_program(PROGRAM) if isinstance(item, Loop))
    start, between, done = layer.body[-3:]
    assert start.collectives == done.collectives == (Collective("all-gather", 1024, (0, 1, 2, 3), "all-gather 11"),)
    assert between == Instruction(cycles=70)


SQUARE = TpuPod("v5e:4x4", tuple((x, y, 0) for x in range(4) for y in range(4)))
TORUS = TpuPod("v5e:16x16", tuple((x, y, 0) for x in range(16) for y in range(16)))


def test_a_closed_ring_has_twice_the_bandwidth_of_a_line():
    hops = 1e-6
    line = SQUARE.seconds(Collective("all-gather", 45_000_000, (0, 1, 2, 3), ""))
    assert line == pytest.approx(0.75e-3 + 4 * hops)
    assert SQUARE.seconds(Collective("all-reduce", 45_000_000, (0, 1, 2, 3), "")) == pytest.approx(1.5e-3 + 4 * hops)
    assert SQUARE.seconds(Collective("all-gather", 90_000_000, (), "")) == pytest.approx(15 / 16 * 1e-3 + 8 * hops)
    ring = TORUS.seconds(Collective("all-gather", 90_000_000, tuple(range(16)), ""))
    assert ring == pytest.approx(15 / 16 * 1e-3 + 16 * hops)
    assert TORUS.seconds(Collective("collective-permute", 45_000_000, (0, 1), "")) == pytest.approx(1e-3 + hops)
    # Sixteen on a ring are four links apart on average, and each has two links.
    assert TORUS.seconds(Collective("all-to-all", 45_000_000, tuple(range(16)), "")) == pytest.approx(2e-3 + 16 * hops)


def block(generation: str, sizes: tuple[int, int, int], devices_per_chip: int = 1) -> TpuPod:
    places = [(x, y, z) for x in range(sizes[0]) for y in range(sizes[1]) for z in range(sizes[2])]
    name = f"{generation}:{'x'.join(map(str, sizes))}"
    return TpuPod(name, tuple(place for place in places for _ in range(devices_per_chip)))


def test_only_blocks_of_whole_cubes_have_links_around():
    line = Collective("all-gather", 90_000_000, (0, 1, 2, 3), "")  # along the last axis
    assert block("v5p", (2, 2, 4)).seconds(line) == pytest.approx(0.75e-3 + 4e-6)
    assert block("v5p", (4, 4, 4)).seconds(line) == pytest.approx(0.75e-3 / 2 + 4e-6)


def test_two_devices_of_a_chip_share_its_links():
    pod = block("tpu7x", (2, 2, 4), devices_per_chip=2)
    both = pod.seconds(Collective("all-gather", 90_000_000, tuple(range(8)), ""))
    assert both == pytest.approx(7 / 8 * 1e-3 + 4e-6)
    # Two groups, of the first and of the second cores, at once over the same links.
    alternate = pod.seconds(Collective("all-gather", 90_000_000, (0, 2, 4, 6), ""))
    assert alternate == pytest.approx(2 * 3 / 4 * 1e-3 + 4e-6)
    assert pod.seconds(Collective("all-gather", 90_000_000, (0, 1), "")) == pytest.approx(0.5e-3 + 1e-6)


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("v6e-256", "v6e:16x16"),  # chips
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-8", "v5e:2x4"),
        ("v4-32", "v4:2x2x4"),  # cores, two a chip
        ("v5p-128", "v5p:4x4x4"),
        ("tpu7x-16", "tpu7x:2x2x2"),
        ("v5p:2x4x4", "v5p:2x4x4"),
        ("v5p-6", None),
    ],
)
def test_a_pod_by_its_number(name, known_as):
    assert tpu_name(name) == known_as


def test_asynchronous_collectives_run_beside_what_computes_until_they_are_waited_for():
    gather = Instruction(collectives=(Collective("all-gather", 45_000_000, (0, 1, 2, 3), "a"),))  # 0.754 ms
    reduce = Instruction(
        collectives=(Collective("all-reduce", 45_000_000, (0, 1, 2, 3), "b"),)
    )  # 1.504 ms, beside nothing
    half_ms = Instruction(cycles=750_000)
    times = estimate((Loop(10, (gather, half_ms, gather, reduce)), half_ms), SQUARE, lambda _: 0.0)
    assert times.computing == pytest.approx(5.5e-3)
    assert times.collectives == pytest.approx(10 * (0.754e-3 + 1.504e-3))
    assert times.total == pytest.approx(10 * (0.754e-3 + 1.504e-3) + 0.5e-3)
    one_ms = (gather, half_ms, half_ms, gather)
    assert estimate(one_ms, SQUARE, lambda _: 0.0).total == pytest.approx(1e-3)
    assert estimate(one_ms, SQUARE, lambda i: 1e-3 * bool(i.cycles)).kernels == pytest.approx(2e-3)


def test_splash_attention_counts_the_blocks_that_it_visits():
    kernel = Instruction(kernel="splash_mha_dkv_no_residuals", operands=((1, 4, 4), (2, 16, 2048, 128)))
    assert (
        SQUARE.attention_flops(kernel, "causal", 128) == 4 * 2 * 2 * 16 * 128 * 512**2 * 10
    )  # of 4 x 4, the lower half
    assert (
        SQUARE.attention_flops(kernel, "local", 128) == 4 * 2 * 2 * 16 * 128 * 512**2 * 7
    )  # the diagonal and the one beside
    assert SQUARE.attention_flops(kernel._replace(kernel="mine"), "causal", 1) == 0
    narrow = kernel._replace(operands=((1, 4, 4), (2, 16, 2048, 64)))
    assert SQUARE.attention_seconds(narrow, "causal", 128) == pytest.approx(
        SQUARE.attention_seconds(kernel, "causal", 128)
    )


FITS = Need(SQUARE, Layout("v5e:4x4", 1, 16, 1, 1, "dots"), 64, 1024, 8 * GIB, 12 * GIB)


@pytest.mark.parametrize(
    ("changes", "suggested"),
    [
        ({}, None),
        ({"split_bytes": 4 * GIB, "device_bytes": 7.75 * GIB}, ("v5e:2x4", 1, 8, 1, 1)),  # 8 + 7.5 GiB on 8 devices
        ({"device_bytes": 17 * GIB}, ("v5e:4x4", 1, 16, 1, 2)),  # 8 + 9 GiB, in two micro-batches 8 + 4.5
        ({"split_bytes": 30 * GIB, "device_bytes": 31 * GIB}, ("v5e:4x8", 1, 32, 1, 1)),  # 15 + 0.5 GiB on 32 devices
        ({"d_model": 16, "split_bytes": 30 * GIB, "device_bytes": 31 * GIB}, None),  # nothing more to split
        (
            {"pod": TpuPod("tpu7x:2x2x2"), "split_bytes": 60 * GIB, "device_bytes": 100 * GIB},
            ("tpu7x:2x2x2", 1, 16, 1, 2),  # two devices a chip
        ),
    ],
)
def test_suggestions(changes, suggested):
    assert suggest(dataclasses.replace(FITS, **changes)) == (suggested and Layout(*suggested, "dots"))


@pytest.mark.parametrize(
    ("size", "fsdp", "mesh"),
    [
        ("4x4", 4, None),  # 16 + 4 GiB do not fit, nor would they in more micro-batches
        ("4x4", 8, (2, 8, 1, 1)),
        ("4x4", 3, None),
        ("4x8", 16, (2, 16, 1, 1)),
    ],
)
def test_the_fewest_micro_batches_that_should_fit_a_mesh(size, fsdp, mesh):
    need = dataclasses.replace(FITS, split_bytes=4 * GIB, device_bytes=8 * GIB)
    assert need.on(size, fsdp) == (mesh and Layout(f"v5e:{size}", *mesh, "dots"))


def test_flags_of_a_layout_say_all_that_must_change_with_the_mesh():
    config = spdf.resolve(tiny())
    layout = Layout("v5e:8x8", 8, 8, 1, 1, "mlp")
    said = flags(config, "pretrain", layout)
    assert said == f"{layout.flags('pretrain')} --config.loop.eval_batch_size=64", "32 sequences are not for 64 devices"
    assert flags(config, "pretrain", layout._replace(data=1)) == layout._replace(data=1).flags("pretrain")


def tiny():
    c = spdf.default_config("tiny", "test", variants=("test",))
    m = c.model
    m.n_layer, m.n_head, m.d_model, m.vocab_size, m.context, m.dtype, m.remat = 3, 2, 256, 512, 256, "bfloat16", "dots"
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.pretrain.batch_size = 8
    c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = "rigl", 0.5
    return c


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v9:4x4", "v5e:4x4x", "4x4", "v6e-3", "v9-16", "v5p-1"])
def test_an_unknown_pod_is_refused_with_examples(name):
    message = f"--plan_topology: {name!r} is no pod; for example v5e:4x4, v5e-256"
    with pytest.raises(spdf.InputError, match=re.escape(message)):
        describe_pod(spdf.resolve(tiny()), name)


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(spdf.InputError, match=re.escape("libtpu (and no TPU), not installed: pip install -c")):
        describe_pod(spdf.resolve(tiny()), "v5e:4x4")


def test_remat_is_a_choice_and_runs_from_when_it_was_a_boolean_stay_usable(tmp_path):
    c = tiny()
    c.model.remat = "all"
    with pytest.raises(spdf.InputError, match=r"model.remat: 'all' is not one of 'none', 'dots', 'mlp', 'block'"):
        spdf.resolve(c)
    values = spdf.resolve(tiny()).as_dict()
    for was, now in ((True, "block"), (False, "none")):
        values["model"]["remat"] = was
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert load_config(tmp_path / "config.json").model.remat == now


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_prune_and_grow_sends_counts_of_rows_and_columns_and_no_weights(sizes):
    c = tiny()
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = sizes
    c.pretrain.sparsity.rule = "mst"
    config = spdf.resolve(c)
    with few_matrices():
        (plan,) = make_plan(config)
    steps = dict(lower_steps(config, plan, make_mesh(config.mesh)))
    items = read_program(steps["prune and grow alone"].compile().as_text())
    sent = [collective.bytes for _, collective in executed_collectives(items)]
    assert sent, "counts do cross devices"
    assert max(sent) <= 4 * 4 * 256, "at most an integer for each row or column of the widest matrix"


@pytest.mark.slow
def test_the_planned_topology_step_moves_live_blocks_where_kernels_are_stored_so():
    c = tiny()
    c.mesh.data = 1
    c.model.n_layer, c.model.n_head, c.model.d_model, c.model.vocab_size = 1, 1, 16, 32
    c.pretrain.sparsity.update({"rule": "rigl", "sparsity": 0.5, "pattern": "block8", "sparse_compute": "blocks"})
    config = spdf.resolve(c)
    (plan,), mesh = make_plan(config), make_mesh(config.mesh)
    moved = dict(lower_steps(config, plan, mesh))["prune and grow alone"]
    assert "stablehlo.while" in moved.as_text(), "blocks are exchanged in turns"
    assert moved.out_info.topology.keys() == {"blocks"}


def test_logits_split_over_tensor_even_where_the_vocabulary_does_not_divide():
    model = spdf.GPT(spdf.GPTConfig(n_layer=1, n_head=4, d_model=32, vocab_size=1009, context=16))
    tokens_BT = jax.random.randint(jax.random.key(0), (4, 16), 0, 1009)
    params = {"params": drawn_params(model.config)}
    found, flops = {}, {}
    for tensor in (1, 4):
        mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=tensor))
        with jax.set_mesh(mesh):
            place = (replicated(mesh), batch_sharding(mesh, 2))
            program = jax.jit(model.apply, in_shardings=place).lower(params, tokens_BT).compile()
            found[tensor] = np.asarray(program(*jax.device_put((params, tokens_BT), place)))
            flops[tensor] = program.cost_analysis()["flops"]
    np.testing.assert_allclose(found[4], found[1], rtol=1e-5, atol=1e-6)
    assert flops[4] < flops[1] / 2, "each device has a quarter of the vocabulary"


JOB = """
import json, sys
from pathlib import Path
sys.path.insert(0, str(Path("tests").resolve()))
from test_pod_plan import tiny
import spdf_jax as spdf
from spdf_jax.planning.pod_plan import describe_pod
from spdf_jax.planning import search as searching
said = []
for pod, changes in json.loads(sys.argv[1]):
    c = tiny()
    searched = searching.REMATS = changes.pop("search", ())
    c.update_from_flattened_dict(changes)
    try:
        said.append("\\n".join(searching.search(spdf.resolve(c), pod)) if searched else describe_pod(spdf.resolve(c), pod))
    except spdf.InputError as error:
        said.append(f"refused: {error}")
print(json.dumps(said))
"""


def plans(*pods: tuple[str, dict[str, object]]) -> list[str]:
    """What is said of `tiny` with changes on each pod."""
    # Its own process: the compiler stays. Simulated CPU devices are not what it compiles for.
    environment = as_users() | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", JOB, json.dumps(pods)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == "", "the compiler stays silent"
    return json.loads(done.stdout)


@pytest.mark.slow
@needs_libtpu
def test_a_small_model_is_planned_for_a_pod_that_is_not_there():
    (said,) = plans(("v5e:2x2", {}))
    train, topology, alone = re.split(r"pretrain: (?:topology step|prune and grow alone), compiled", said)
    assert "attention             causal by splash" in train
    assert "4 devices of 197 TFLOP/s and 15.75 GiB, mesh data 1 x fsdp 4 x tensor 1, remat dots" in train
    for step in (train, topology):
        assert re.search(r"memory a device +0\.\d+ GiB of 15\.75 GiB: fits", step)
        assert "splash attention 0." in step
        # Three products of every weight of the layers, the head, and attention: counted once a layer, not once.
        flops = float(re.search(r"matrix FLOPs a device +(\S+)", step)[1])
        products = 6 * 8 * 256 * (3 * 12 * 256**2 + 512 * 256) + 3 * 9 * 2 * 8 * 256**2 * 256
        assert flops == pytest.approx(products / 4, rel=0.1)
        gathers = int(re.search(r"all-gather +(\d+) times", step)[1])
        assert gathers >= 2 * 3, "weights, layer by layer, forward and backward"
    assert "matrix FLOPs a device 0" in alone
    largest = re.search(r"all-gather .* at most (\S+) (bytes|kB)", alone)
    assert largest is None or float(largest[1]) * {"bytes": 1, "kB": 1000}[largest[2]] < 256**2, "no matrix is gathered"
    assert "suggestion            no smaller pod does" in alone


@pytest.mark.slow
@needs_libtpu
def test_what_libtpu_does_not_know_and_what_does_not_fit_is_said_and_following_suggestions_ends_in_what_does():
    static = {"pretrain.sparsity.rule": "static"}
    large = static | {"pretrain.batch_size": 65536}
    odd, indivisible, too_large, one_sequence, across = plans(
        ("v5e:3x3", {}),
        ("v5e:4x4", {}),
        ("v5e-4", large),
        ("v5e:2x4", static),
        ("v5p:4x4x4", static | {"mesh.data": 32, "mesh.fsdp": 2, "pretrain.batch_size": 64}),
    )
    assert across == (
        "refused: mesh: MeshConfig(data=32, fsdp=2, tensor=1) does not lie along the axes of the pod ([4, 4, 4] are left of "
        "it): each size must be a product of some of them"
    )
    assert odd.startswith("refused: --plan_topology: 'v5e:3x3' is no pod (INVALID_ARGUMENT")
    assert indivisible.startswith(
        "refused: config.pretrain.batch_size: 8 sequences a micro-batch are not divisible by 16 devices"
    )
    needed, missing = re.search(r"([\d.]+) GiB of 15\.75 GiB: DOES NOT FIT, by ([\d.]+) GiB", too_large).groups()
    assert float(needed) - float(missing) == pytest.approx(15.75, abs=0.011)
    assert re.search(
        # What the compiler gave up at is less than it takes where it need not recompute: 8 were tried and are too few.
        r"suggestion +it fits with --config\.mesh\.data=1 --config\.mesh\.fsdp=4 --config\.mesh\.tensor=1 "
        r"--config\.model\.remat=dots --config\.pretrain\.grad_accumulation_steps=16 \([\d.]+ GiB a device\)",
        too_large,
    )
    assert "splash attention 0." in one_sequence


def refusals(pods: dict[str, Kind]) -> list[tuple[float, str]]:
    """Of what no pod of its kind holds: the GiB that a device of each has, which it needs and lacks, and the suggestion."""
    large = {"pretrain.sparsity.rule": "static", "model.d_model": 16384, "model.n_layer": 32}
    asked = [(pod, large | {"pretrain.batch_size": kind.devices(pod.partition(":")[2])}) for pod, kind in pods.items()]
    sentence = r"([\d.]+) GiB of [\d.]+ GiB: DOES NOT FIT, by ([\d.]+) GiB\n(?:.*\n)*  suggestion +(.*)"
    found = [re.search(sentence, said) for said in plans(*asked)]
    return [(float(one[1]) - float(one[2]), one[3]) for one in found]


def refusal(pod: str, kind: Kind) -> tuple[object, str]:
    """What `refusals` are to be."""
    fix = "set --config.model.remat=block, or a larger --config.mesh.tensor"
    return pytest.approx(kind.hbm_bytes / GIB, abs=0.011), f"no {pod.partition(':')[0]} pod does: {fix}"


@pytest.mark.slow
@needs_libtpu
def test_a_model_too_large_for_each_generation_is_refused_in_the_same_sentence():
    pods = {f"{name}:{generation.sizes[0]}": generation for name, generation in GENERATIONS.items()}
    assert refusals(pods) == [refusal(pod, kind) for pod, kind in pods.items()]


@pytest.mark.slow
@needs_libtpu
def test_every_generation_is_planned():
    pods = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
    for pod, said in zip(pods, plans(*((pod, {"pretrain.sparsity.rule": "static"}) for pod in pods)), strict=True):
        assert re.search(rf"^{pod} .* devices of \d+ TFLOP/s", said, re.MULTILINE), said
        assert re.search(r"time, estimated +\d", said), said


@pytest.mark.slow
@needs_libtpu
def test_a_search_compiles_every_layout_and_prints_the_frontier():
    (said,) = plans(("v5e:2x2", {"search": ("block", "none"), "pretrain.sparsity.rule": "static", "mesh.tensor": 2}))
    row = r"^  (\d) x (\d) x 2 +(block|none) +1 +([\d.]+) +([\d.]+) +[\d.]+%$"
    rows = re.findall(row, said, re.MULTILINE)
    assert [row[:3] for row in rows] == [(*mesh, remat) for mesh in ("21", "12") for remat in ("block", "none")]
    best = re.findall(
        r"^  ([\d.]+) ms, ([\d.]+) GiB: --config.mesh.data=(\d) --config.mesh.fsdp=(\d)", said, re.MULTILINE
    )
    milliseconds = [float(row[0]) for row in best]
    assert milliseconds[0] == min(float(row[4]) for row in rows)
    assert milliseconds == sorted(milliseconds)


def test_a_search_takes_the_fewest_micro_batches_that_fit_and_leaves_out_what_cannot(monkeypatch):
    """Compiled by a stand-in: a state of 12 GiB, 4 GiB for each sequence at once, a quarter of that with remat."""
    c = tiny()
    c.pretrain.batch_size, c.pretrain.sparsity.rule = 64, "static"
    config, tried = spdf.resolve(c), []

    def compiled(config, phase, layout):
        tried.append(layout)
        sequences = 64 / layout.accumulate / (layout.data * layout.fsdp)
        device_bytes = 12 * GIB / layout.fsdp + sequences * GIB * (1 if layout.remat == "block" else 4)
        seconds = 1 + (layout.remat == "block") + 0.01 * layout.accumulate + 0.1 * layout.fsdp
        program = types.SimpleNamespace(times=types.SimpleNamespace(total=seconds))
        return [program], Need(SQUARE, layout, 64, 256, 12 * GIB / layout.fsdp, device_bytes)

    def pod(mesh, name):
        if mesh.fsdp == 2:
            raise spdf.InputError("not along the axes of its torus")
        return SQUARE, types.SimpleNamespace(shape={"data": 16})

    monkeypatch.setattr(searching, "compile_layout", compiled)
    monkeypatch.setattr(searching, "make_pod", pod)
    monkeypatch.setattr(searching, "state_bytes", lambda *_: 16 * GIB)
    said = list(search(config, "v5e:4x4"))
    assert {layout.fsdp for layout in tried} == {4, 8, 16}, "1: more state than a device has; 2: no such mesh"
    rows = [line.split() for line in said if line.startswith("  ") and " x " in line][1:]
    fits = {(row[2], row[5]): int(row[6]) for row in rows if "DOES" not in row}
    assert fits == {
        (fsdp, remat): 1 if remat == "block" else 2  # four sequences at once need 16 GiB without it
        for fsdp in ("4", "8", "16")
        for remat in ("block", "mlp", "dots", "none")
    }
    frontier = [line.split()[:3:2] for line in said[said.index("  the frontier, by time") + 1 :]]
    assert frontier == [
        ["1420.0", "11.00"],
        ["1820.0", "9.50"],
        ["2410.0", "7.00"],
        ["2810.0", "5.50"],
        ["3610.0", "4.75"],
    ]
