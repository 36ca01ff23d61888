"""Plans for GPUs: names, the words of the compiler, times, refusals; slowly, real ones for a small model."""

import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
from test_pod_plan import ROOT, plans, refusal, refusals, tiny
from tiny import as_users, needs_plan_gpu

import spdf_jax as spdf
from spdf_jax.planning.gpu import CUDNN_SHARE, KINDS, PRODUCT_SHARE, START_SECONDS, GpuPod, gpu_pod, target_config
from spdf_jax.planning.hlo import Collective, Instruction, executed, executed_collectives, matrix_flops, read_program
from spdf_jax.planning.pod import GIB, Layout, Need, estimate, suggest
from spdf_jax.planning.pod_plan import describe_pod

HOST = GpuPod("h100:4", (0, 0, 0, 0))
HOSTS = GpuPod("h100:2x4", (0, 0, 0, 0, 1, 1, 1, 1))

PROGRAM = """HloModule jit_step, is_scheduled=true

%product (p0: bf16[64,32], p1: bf16[8,16,32]) -> bf16[64,8,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[8,16,32]{2,1,0} parameter(1)
  ROOT %dot.1 = bf16[64,8,16]{2,1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={2}
}

%layer (t: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %shard = bf16[8,16]{1,0} parameter(0)
  %all-gather-start = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%shard), channel_id=1, replica_groups=[1,4]<=[4]
  %fusion.1 = bf16[64,8,16]{2,1,0} fusion(%a, %b), kind=kCustom, calls=%product, backend_config={"reification_cost":[\
{"end_to_end_cycles":9,"exec_time_us":900.5,"compute_time_us":900,"memory_access_time_us":2.5,"name":""},\
{"end_to_end_cycles":0,"exec_time_us":700,"compute_time_us":0,"memory_access_time_us":0,"name":"sol"}]}
  %fusion.2 = f32[8]{0} fusion(%x), kind=kLoop, calls=%none, backend_config={"reification_cost":[\
{"end_to_end_cycles":9,"exec_time_us":8,"compute_time_us":7,"memory_access_time_us":2,"name":""},\
{"end_to_end_cycles":0,"exec_time_us":4e+01,"compute_time_us":0,"memory_access_time_us":0,"name":"sol"}]}
  %all-gather-done = bf16[32,16]{1,0} all-gather-done(%all-gather-start)
  %forward.3 = (bf16[2,2,256,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", \
operand_layout_constraints={bf16[2,256,2,128]{3,2,1,0}, bf16[2,256,2,128]{3,2,1,0}}, backend_config={"fmha_scale": 0.1}
}

%none (x: f32[8]) -> f32[8] {
  %x.2 = f32[8]{0} parameter(0)
}

%condition (t: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[] constant(12)
  ROOT %lt.2 = pred[] compare(%index, %limit), direction=LT
}

ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %while.1 = (s32[], bf16[8,16]) while(%t1), condition=%condition, body=%layer, \
backend_config={"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"2"}}
}
"""


def test_a_program_for_gpus_is_read():
    items = read_program(PROGRAM)
    assert matrix_flops(items) == 6 * 2 * 64 * 32 * 8 * 16, (
        "a loop unrolled in two runs half as often as its condition says"
    )
    assert [(times, c.kind, c.bytes) for times, c in executed_collectives(items)] == [(6, "all-gather", 2 * 32 * 16)]
    assert [(times, i.kernel, i.operands[0]) for times, i in executed(items) if i.kernel] == [
        (6, "__cudnn$fmhaSoftmax", (2, 256, 2, 128))
    ]
    # Of a product the time to move its data, of anything else the time that could be reached.
    assert [i.seconds for _, i in executed(items) if i.seconds] == pytest.approx([2.5e-6, 40e-6])


def kernel(result: str, left: str, right: str) -> str:
    """A program of one of our kernels, as it is compiled for Hopper."""
    return f"""ENTRY %main (p0: {left}, p1: {right}, p2: s32[6]) -> {result} {{
  %p0 = {left}{{1,0}} parameter(0)
  %p1 = {right}{{2,1,0}} parameter(1)
  %p2 = s32[6]{{0}} parameter(2)
  ROOT %mpmd_map.1 = {result} custom-call(%p0, %p1, %p2), custom_call_target="mosaic_gpu_v2", \
operand_layout_constraints={{{left}{{1,0}}, {right}{{2,1,0}}, s32[6]{{0}}}}, backend_config={{module = "ML\\0A"}}
}}
"""


@pytest.mark.parametrize(
    "program",
    [
        kernel("bf16[256,192]", "bf16[256,128]", "bf16[6,64,64]"),  # the product, and the input gradient
        kernel("bf16[6,64,64]", "bf16[256,128]", "bf16[256,192]"),  # the weight gradient
    ],
)
def test_our_kernels_for_hopper_are_counted_as_products_of_live_blocks(program):
    (item,) = read_program(program)
    assert (item.flops, item.kernel) == (2 * 256 * 6 * 64 * 64, "")
    assert HOST.compute_seconds(item) == item.flops / (PRODUCT_SHARE * 989e12)


def test_times_of_a_program_for_gpus():
    times = estimate(read_program(PROGRAM), HOST, lambda kernel: HOST.attention_seconds(kernel, "causal", 1))
    attention = 2 * 2 * 2 * 2 * 128 * (256 * 257 // 2) / (CUDNN_SHARE * 989e12)
    assert times.computing == pytest.approx(6 * 42.5e-6)
    assert times.kernels == pytest.approx(6 * attention)
    assert times.collectives == pytest.approx(6 * (START_SECONDS + 0.75 * 1024 / 450e9))
    assert times.total == pytest.approx(times.computing + times.kernels), (
        "the gather is done before what runs beside it"
    )


def test_large_products_take_as_long_as_their_flops():
    flops = 10**12
    assert HOST.compute_seconds(Instruction(flops=flops, seconds=1e-6)) == flops / (PRODUCT_SHARE * 989e12)


@pytest.mark.parametrize(
    ("kernel", "pattern", "products", "positions"),
    [
        ("__cudnn$fmhaSoftmax", "causal", 2, 256 * 257 // 2),
        ("__cudnn$fmhaScaleBiasSoftmaxBackward", "causal", 5, 256 * 257 // 2),
        ("__cudnn$fmhaSoftmax", "local", 2, 256 * 257 // 2 - 192 * 193 // 2),
        ("__cub$DeviceRadixSort", "causal", 0, 0),
    ],
)
def test_flops_of_attention(kernel, pattern, products, positions):
    found = HOST.attention_flops(Instruction(kernel=kernel, operands=((2, 256, 4, 64),)), pattern, 64)
    assert found == products * 2 * 2 * 4 * 64 * positions


@pytest.mark.parametrize(
    ("kind", "devices", "seconds"),
    [
        ("all-gather", (0, 1, 2, 3), 0.75 / 450),
        ("all-reduce", (0, 1), 2 * 0.5 / 450),
        ("reduce-scatter", (), 7 / 8 / 200),  # all eight: four network cards a host
        ("all-reduce", (0, 4), 2 * 0.5 / 50),
        ("all-to-all", (0, 1, 4, 5), 0.75 / 100),
        ("collective-permute", (0, 1), 1 / 450),
        ("collective-permute", (0, 4), 1 / 50),
    ],
)
def test_collectives_within_a_host_and_between_hosts(kind, devices, seconds):
    assert HOSTS.seconds(Collective(kind, 10**9, devices, "")) == pytest.approx(seconds + START_SECONDS)


@pytest.mark.parametrize(
    "name", ["h100", "h100:", "h100:0", "h100:9", "h100:0x8", "h100:2x16", "h100:2x8x1", "k80:8", "h100-8"]
)
def test_an_unknown_pod_is_refused_with_examples(name):
    with pytest.raises(spdf.InputError, match=re.escape(f"--plan_topology: {name!r} is no pod; for example v5e:4x4")):
        describe_pod(spdf.resolve(tiny()), name)


def test_without_the_compiler_the_message_says_what_to_install(monkeypatch):
    def version(package):
        if package == "jax-cuda13-plugin":
            return "0.12"
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    message = (
        "--plan_topology: to compile for a GPU takes jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-cudnn-cu13 (and no GPU), "
        "not installed: pip install -c requirements.lock -e '.[plan_gpu]'"
    )
    with pytest.raises(spdf.InputError, match=re.escape(message)):
        describe_pod(spdf.resolve(tiny()), "h100:8")


def fields(text: str) -> dict[str, str]:
    """The scalars of a message in text format by their path; an assertion where the text is none."""
    tokens = re.findall(r'\w+(?=\s*\{)|[{}]|\w+: (?:"[^"]*"|[\w.]+)', text)
    assert "".join("".join(tokens).split()) == "".join(text.split()), "nothing else is in it"
    found, inside = {}, []
    for token in tokens:
        name, colon, value = token.partition(": ")
        if colon:
            path = ".".join([part for part in inside if part != "{"] + [name])
            assert path not in found, "no field is there twice"
            found[path] = value.strip('"')
        elif token == "}":
            assert inside.pop() == "{"
            inside.pop()
        else:
            inside.append(token)
    assert not inside
    return found


@pytest.mark.parametrize("name", KINDS)
def test_a_gpu_in_the_words_of_the_compiler(name):
    found = fields(target_config(name, "9.28.1.4"))
    info = "gpu_device_info."
    assert found["dnn_version_info.minor"] == "28"
    assert found[f"{info}dnn_version"] == "9.28.1"
    # All that a GPU has, of which programs get three quarters.
    assert 0.75 * int(found[f"{info}device_memory_size"]) == pytest.approx(KINDS[name].hbm_bytes)
    # The peak again, from its parts.
    clock, cores = float(found[f"{info}clock_rate_ghz"]), int(found[f"{info}core_count"])
    assert clock * 1e9 * cores * KINDS[name].core_flops == pytest.approx(KINDS[name].peak_flops, rel=1e-3)
    assert int(found[f"{info}shared_memory_per_block_optin"]) < int(found[f"{info}shared_memory_per_core"])


def test_suggestions_are_hosts_of_eight():
    pod = gpu_pod("h100:4")
    # 800 GiB in all, and 2 GiB of one sequence.
    need = Need(pod, Layout("h100:4", 1, 4, 1, 1, "dots"), 64, 1024, 200 * GIB, 202 * GIB)
    assert suggest(need) == Layout("h100:2x8", 1, 16, 1, 1, "dots")


@pytest.mark.slow
@needs_plan_gpu
def test_a_small_model_is_planned_for_gpus_that_are_not_there():
    dense = {"pretrain.sparsity.rule": "dense", "pretrain.sparsity.sparsity": 0.0, "data.separate_documents": False}
    blocks = {"pretrain.sparsity.pattern": "block64", "pretrain.sparsity.sparse_compute": "blocks"}
    masked, plain, stored, hosts, old = plans(
        ("h100:4", {}), ("h100:4", dense), ("h100:4", blocks | {"pretrain.sparsity.rule": "static"}),
        ("h100:2x2", dense), ("a100:4", dense),
    )  # fmt: skip
    held = {"h100": KINDS["h100"].hbm_bytes / GIB, "a100": KINDS["a100"].hbm_bytes / GIB}
    for said, name in ((masked, "h100"), (plain, "h100"), (stored, "h100"), (hosts, "h100"), (old, "a100")):
        assert "attention             causal by cudnn" in said
        assert re.search(
            rf"4 devices of \d+ TFLOP/s and {held[name]:.2f} GiB \(75% of a GPU's, as JAX takes by itself\), mesh", said
        )
        assert re.search(rf"memory a device +0\.\d+ GiB of {held[name]:.2f} GiB: fits", said)
    weights, head = 3 * 12 * 256**2, 512 * 256
    # Two products, again in the backward pass, and five there; each GPU has its share, with documents kept apart or without.
    attention = 3 * 9 * 2 * 8 * 256 * (256 * 257 // 2)
    for said, active in ((masked, 1), (plain, 1), (stored, 0.5), (hosts, 1), (old, 1)):
        flops = float(re.search(r"matrix FLOPs a device +(\S+)", said)[1])
        products = 6 * 8 * 256 * (active * weights + head) + attention
        assert flops == pytest.approx(products / 4, rel=0.05)
    assert len(re.findall(r"time, estimated +\d+\.\d ms: computing \d+\.\d, cuDNN's attention 0\.", masked)) == 3
    assert "held against no GPU yet" in masked
    assert "time, estimated" not in old
    assert "times                 none: XLA makes no statistics for this GPU" in old
    waited = [float(re.search(r"of the (\S+) that they take", said)[1]) for said in (plain, hosts)]
    assert waited[0] < waited[1], "between hosts it takes longer"


KERNELS = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from spdf_jax.ops.block_linear import block_linear
from spdf_jax.planning.gpu import gpu_pod


def both_ways(x_BTP, data_JKbb, idx_JK, dy_BTQ):
    y_BTQ, pullback = jax.vjp(lambda x, data: block_linear(x, data, idx_JK), x_BTP, data_JKbb)
    return y_BTQ, *pullback(dy_BTQ)


texts = []
for pod, b in json.loads(sys.argv[1]):
    devices = np.array(gpu_pod(pod).devices())
    mesh = Mesh(devices.reshape(-1, min(2, devices.size)), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shapes = {(2, 192, 3 * b): jnp.bfloat16, (4, 2, b, b): jnp.bfloat16, (4, 2): jnp.int32, (2, 192, 4 * b): jnp.bfloat16}
    placed = NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for shape, dtype in shapes.items()]
    with jax.set_mesh(mesh):
        texts.append(jax.jit(both_ways).lower(*args).compile().as_text())
print(json.dumps(texts))
"""


@pytest.mark.slow
@needs_plan_gpu
def test_live_blocks_are_compiled_by_our_kernels_for_hopper_and_gathered_elsewhere():
    asked = [("h100:1", 64), ("h100:1", 128), ("h200:1", 192), ("h100:4", 64), ("a100:1", 64), ("b200:1", 64)]
    command = [sys.executable, "-c", KERNELS, json.dumps(asked)]
    environment = as_users() | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = ["block_input_gradient", "block_product", "block_weight_gradient"]
    for (pod, b), text in zip(asked, json.loads(done.stdout), strict=True):
        found = sorted(re.findall(r'custom_call_target="mosaic_gpu.*op_name="[^"]*/(block_\w+)/', text))
        products = re.search(r" dot\(|__cublas", text)
        if pod.startswith("h"):
            assert (found, products) == (kernels, None), (pod, b)
            devices = HOST.size if pod == "h100:4" else 1
            assert matrix_flops(read_program(text)) == 3 * 2 * 384 * 4 * 2 * b * b // devices
        else:
            assert (found, bool(products)) == ([], True), (pod, b)


@pytest.mark.slow
@needs_plan_gpu
def test_a_model_too_large_for_each_kind_is_refused_in_the_same_sentence():
    pods = {f"{name}:2": kind for name, kind in KINDS.items()}
    assert refusals(pods) == [refusal(pod, kind) for pod, kind in pods.items()]
