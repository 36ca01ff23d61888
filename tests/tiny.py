"""A run small enough for tests: real loop, real data files, seconds on one core.

As a program it trains such a run and dies by SIGKILL at a named moment:
``python tiny.py WORKDIR DATA save|topology|phase``.
"""

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import spdf_jax as spdf
from spdf_jax.sparsity.programme import SparsityConfig
from spdf_jax.training import phases
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.state import abstract_params, sparse_filter
from spdf_jax.tree import map_named

# XLA's older emitters compile faster, as long as there are any; a flag that it does not know ends the process.
_EMITTERS = "--xla_cpu_use_fusion_emitters=false " if jax.__version_info__ < (0, 11) else ""
#: Of processes that compile for longer than they run, as every test's own (conftest.py): all kernels in one module.
QUICKLY = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": f"{_EMITTERS}--xla_cpu_parallel_codegen_split_count=1",
}
WORDS = ("mask", "weight", "sparse", "dense", "grow", "prune", "step", "layer", "token", "loss")


def as_users() -> dict[str, str]:
    """The environment of a process that compiles as those of users do."""
    return {name: value for name, value in os.environ.items() if name not in QUICKLY}


def write_text(folder: Path) -> Path:
    """A folder of a few documents with some structure to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 30), ("validation", 3)):
        lines = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(1, 90)) for i in range(1, count)]
        (folder / f"{split}.txt").write_text("\n".join(lines))
    return folder


def tiny_config(text: Path, cache: Path):
    """MST with all its phases in 60 steps, then a dense phase of 12.

    Its learning rate knows nothing of its length: runs of all lengths are one program.
    """
    c = spdf.default_config("tiny", "test", variants=("test",), phases=("pretrain", "finetune"))
    c.model.n_layer, c.model.n_head, c.model.d_model, c.model.vocab_size, c.model.context = 2, 2, 16, 300, 32
    c.data.source, c.data.path, c.data.cache_dir, c.data.tokenizer_vocab_size = "text", str(text), str(cache), 280
    c.mesh.data = 1
    c.pretrain.steps, c.finetune.steps = 60, 12
    for phase in (c.pretrain, c.finetune):
        phase.batch_size = 4
        phase.optimizer.warmup_steps = 4 if phase is c.pretrain else 1
        phase.optimizer.peak_learning_rate, phase.optimizer.schedule = 1e-2, "constant"
    s = c.pretrain.sparsity
    s.rule, s.schedule, s.sparsity, s.sparsify_head, s.update_every_steps = "mst", "three_phases", 0.8, True, 6
    s.ramp_end, s.ultra_end, s.restoration_end = 0.2, 0.6, 0.9
    s.attention_pattern, s.attention_width, s.attention_start, s.attention_end = "local_strided", 8, 0.2, 0.6
    c.loop.log_every_steps, c.loop.eval_every_steps, c.loop.checkpoint_every_steps = 1, 20, 10
    c.loop.eval_batch_size, c.loop.keep_checkpoints = 8, 100
    return c


def rows_without_clock(workdir: Path) -> list[dict]:
    """metrics.jsonl but for what is a reading of the clock."""
    clock = ("time", "seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(workdir)]


def slow_but(quick, values):
    """All values of a parameter: those that take a way of their own are quick, what goes the same ways is slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def drawn_params(config: spdf.GPTConfig, seed: int = 0):
    """Parameters such as `spdf_jax.GPT` starts from, drawn by NumPy, where any will do: initialising compiles for longer than
    what most tests then ask of them."""
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        if name.endswith(("kernel", "embedding", "taps")):
            return rng.normal(0, config.init_std, leaf.shape).astype(leaf.dtype)
        return (np.ones if name.endswith("scale") else np.zeros)(leaf.shape, leaf.dtype)

    return jax.device_put(map_named(draw, abstract_params(spdf.GPT(config))))


@contextlib.contextmanager
def few_matrices():
    """Plans whose sparse matrices are the MLP's, and the head where it is to be: whatever moves masks compiles in a third of
    the time, and those of attention are as these."""
    with pytest.MonkeyPatch.context() as patch:
        attention_dense = (r"^blocks/attn_.*kernel$", "dense")
        patch.setattr(phases, "sparse_filter", lambda *how: (attention_dense, *sparse_filter(*how)))
        yield


def empty_figure(_figure, file, **how):
    """In place of `Figure.savefig`, where drawing would take longer than what is drawn."""
    file.write("<svg></svg>" if how["format"] == "svg" else b"a picture")


def set_sparsity(phase, **settings):
    """The section ``sparsity`` of a phase: its defaults, but for these."""
    phase.sparsity.update(dataclasses.asdict(SparsityConfig()) | settings)


#: Of a phase without a window of sparse attention, whose programs are then fewer.
NO_WINDOW = {"attention_pattern": "causal", "attention_width": 128, "attention_start": 0.0, "attention_end": 0.0}
NO_WINDOW_FLAGS = tuple(f"--config.pretrain.sparsity.{name}={value}" for name, value in NO_WINDOW.items())


def _can_mount() -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and not subprocess.run([unshare, "-rm", "true"], check=False).returncode


#: Of tests on a real disk that is full or read-only. Kernels and containers may forbid user namespaces, and nothing else lets
#: a test mount one, or keeps root from writing. What such a disk does is tested everywhere with the error raised by hand:
#: `test_train.py` (no room), `test_tracking.py` (folders that cannot be used), `test_outside.py` (every refusal).
needs_mount = pytest.mark.skipif(not _can_mount(), reason="needs user namespaces, to mount a disk")
#: Of tests that compile for TPUs that are not there. The compiler comes with the extra `tpu` alone, which is no part of `test`
#: and has no wheels beside Linux; CI runs these, since `reference` brings it.
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu: pip install -e '.[tpu]'"
)
#: Of tests that compile for GPUs that are not there, likewise: no extra of CI's brings two gigabytes of CUDA.
needs_plan_gpu = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="compiling for a GPU needs NVIDIA's compiler: pip install -e '.[plan_gpu]'",
)
#: Of tests that interpret the kernels for Hopper GPUs, see `mosaic_fits` of `spdf_jax.ops.block_kernels_gpu`.
needs_mosaic = pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the kernels for Hopper GPUs are for JAX 0.12")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str) -> None:
    """Arms one SIGKILL."""
    from spdf_jax.jobs import train as jobs
    from spdf_jax.training import checkpoint, loop

    if moment == "save":  # while the third save is being written
        save, saves = checkpoint.Checkpoints.save, []

        def saving(self, *args):
            saves.append(1)
            if len(saves) == 3:
                threading.Timer(0.003, die).start()
            save(self, *args)

        checkpoint.Checkpoints.save = saving
    elif moment == "topology":  # with the fourth topology step dispatched, its result not yet seen
        one_step, topology_steps = loop.one_step, []

        def stepping(steps, plan, local, state, batch):
            result = one_step(steps, plan, local, state, batch)
            if plan.programme.topology(local):
                topology_steps.append(1)
            if len(topology_steps) == 4:
                die()
            return result

        loop.one_step = stepping
    elif moment == "phase":  # the first phase is saved, the second not begun
        jobs.enter_phase = lambda *args, **kwargs: die()


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # as in the tests: whose compiled programs are then this process's too
    workdir, text, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    from spdf_jax.jobs.train import train as train_job

    die_at(moment)
    train_job(spdf.resolve(tiny_config(text, text.parent / "cache")), workdir, progress=False)
