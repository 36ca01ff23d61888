"""The command line: jobs, overrides, and every bad input with its message, exit code 2, and nothing touched."""

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from forks import command
from tiny import NO_WINDOW_FLAGS, needs_mount, set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax import processes
from spdf_jax.config.reference import END, PLACES, START, keys, table
from spdf_jax.config.run import flat
from spdf_jax.config.saved import get_config
from spdf_jax.data import DataConfig
from spdf_jax.errors import Restart, end_interrupted
from spdf_jax.jobs import Request, keep_compiled, report
from spdf_jax.jobs import train as jobs
from spdf_jax.main import main
from spdf_jax.sharding import make_mesh
from spdf_jax.training.checkpoint import Checkpoints
from spdf_jax.training.phases import make_plan
from spdf_jax.training.restore import restore_state
from spdf_jax.workdir import lock, write_json

pytestmark = pytest.mark.usefixtures("no_figures", "all_with_few_matrices")

ROOT = Path(__file__).parent.parent
MST = "experiments/gpt2_mst.py"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def started(*arguments: str, prefix: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
    """`command`, but as a shell starts it."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "spdf_jax.main", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | env,
        capture_output=True,
        text=True,
        check=False,
    )


#: The tiny run through both its phases, in fewer steps.
SHORT = (
    *("--config", "tests/tiny_experiment.py", "--config.pretrain.steps=24", "--config.finetune.steps=4"),
    *NO_WINDOW_FLAGS,
)
BAD_COMMANDS = {
    "a search for no pod": (["--config", MST, "--job", "plan", "--plan_search"], "name it by --plan_topology"),
    "no config": ([], "--config FILE[:VARIANT] is needed"),
    "no run": (["--job", "evaluate"], "of a run that is there, its --workdir will do"),
    "missing file": (["--config", "experiments/nope.py"], "experiments/nope.py is not there\n"),
    "misspelt file": (
        ["--config", "experiments/gpt2_mts.py:124m"],
        "experiments/gpt2_mts.py is not there; did you mean experiments/gpt2_mst.py?",
    ),
    "unknown variant": (["--config", f"{MST}:125m"], "no variant '125m'; did you mean '124m'?"),
    "a variant as a setting": (
        ["--config", MST, "--config.variant=124m"],
        f"a variant is chosen as --config {MST}:VARIANT",
    ),
    "what nothing uses": (
        ["--config", "experiments/gpt2_dense.py", "--config.pretrain.sparsity.sparsity=0.75"],
        "config.pretrain.sparsity.sparsity: 0.75 would be ignored, since it is for rules other than 'dense'",
    ),
    "NaN": (["--config", MST, "--config.pretrain.optimizer.peak_learning_rate=nan"], "nan must be a number above 0"),
    "below its range": (
        ["--config", MST, "--config.pretrain.optimizer.clip_norm=-1"],
        "clip_norm: -1.0 must be at least 0",
    ),
    "stops before it restores": (
        ["--config", MST, "--config.pretrain.sparsity.stop_fraction=.75"],
        "stop_fraction: 0.75 ends the topology steps before schedule 'three_phases' has arrived, at 0.9",
    ),
    "an interval over the run": (
        ["--config", "experiments/gpt2_rigl.py", "--config.pretrain.sparsity.update_every_steps=500"],
        "'rigl' would never change a mask in 400 steps with update_every_steps 500",
    ),
    "unknown section": (
        ["--config", MST, "--config.modle.n_layer=2"],
        "config: unknown key 'modle'; did you mean 'model'?",
    ),
    "unknown key": (
        ["--config", f"{MST}:124m", "--config.seed=1", "--config.model.n_layr", "2"],
        "config.model: unknown key 'n_layr'; did you mean 'n_layer'?",
    ),
    "a key like none": (
        ["--config", MST, "--config.pretrain.optimizer.q=1e-3"],
        "config.pretrain.optimizer: unknown key 'q'; known are ",
    ),
    "a key by its initials": (
        ["--config", MST, "--config.pretrain.optimizer.lr=1e-3"],
        "config.pretrain.optimizer: unknown key 'lr'; did you mean 'peak_learning_rate'?\n",
    ),
    "a key of another section": (
        ["--config", MST, "--config.pretrain.lr=1e-3"],
        "config.pretrain: unknown key 'lr'; did you mean config.pretrain.optimizer.peak_learning_rate?\n",
    ),
    "a key without its section": (
        ["--config", MST, "--config.steps=3"],
        "config: unknown key 'steps'; did you mean config.pretrain.steps?\n",
    ),
    "a key as a flag": (
        ["--config", MST, "--tokenizer", "x.json"],
        "unknown flag --tokenizer; did you mean --config.data.tokenizer?\n",
    ),
    "a key of several sections as a flag": (
        ["--config", MST, "--batch_size=4"],
        "; did you mean --config.decode.batch_size or --config.pretrain.batch_size?\n",
    ),
    "a file in another folder": (
        ["--config", "gpt2_mst"],
        "gpt2_mst is not there; did you mean experiments/gpt2_mst.py?\n",
    ),
    "a share in percent": (
        ["--config", MST, "--config.pretrain.sparsity.sparsity=80%"],
        "--config.pretrain.sparsity.sparsity: '80%' is no number; write 0.8\n",
    ),
    "a key of a value": (["--config", MST, "--config.seed.a=1"], "config.seed: is a value, and has no 'a'"),
    "wrong type": (["--config", MST, "--config.model.n_layer=two"], "--config.model.n_layer: 'two' is no whole number"),
    "a number with an exponent": (
        ["--config", MST, "--config.pretrain.steps=1e3"],
        "'1e3' is no whole number; write 1000",
    ),
    "no number at all": (["--config", MST, "--config.pretrain.steps=inf"], "'inf' is no whole number; give one"),
    "misspelt job": (["--config", MST, "--job", "plna"], "--job: 'plna' is no job; did you mean 'plan'?\n"),
    "a job like none": (
        ["--job", "x"],
        "--job: 'x' is no job; known are train, evaluate, generate, export, prune, plan, ",
    ),
    "misspelt flag": (["--confg", MST], "unknown flag --confg; did you mean --config?\n"),
    "misspelt flag with a value": (["--config", MST, "--plan_topolgy=v5e:4x4"], "did you mean --plan_topology?\n"),
    "misspelt flag that denies": (["--config", MST, "--noqiuet"], "unknown flag --noqiuet; did you mean --noquiet?\n"),
    "misspelt question": (["--hlep"], "unknown flag --hlep; did you mean --help?\n"),
    "misspelt override": (
        ["--config", MST, "--confg.pretrain.steps=3"],
        "unknown flag --confg.pretrain.steps; did you mean --config.pretrain.steps?\n",
    ),
    "an override without its head": (
        ["--config", MST, "--model.n_layer=2"],
        "unknown flag --model.n_layer; did you mean --config.model.n_layer?\n",
    ),
    "a flag like nothing": (
        ["--config", MST, "--q=2"],
        "unknown flag --q; a setting is --config.section.key=value, and --help has all flags\n",
    ),
    "neither true nor false": (["--config", MST, "--quiet=maybe"], "--quiet: 'maybe' is neither true nor false\n"),
    "neither true nor false of a setting": (
        ["--config", MST, "--config.model.tied_head=maybe"],
        "--config.model.tied_head: 'maybe' is neither true nor false\n",
    ),
    "unknown flag": (["--config", MST, "--wrkdir", "x"], "unknown flag --wrkdir; did you mean --workdir?"),
    "stray word": (["--config", MST, "train"], "'train' is no flag; did you mean --job train?\n"),
    "sparsity": (["--config", MST, "--config.pretrain.sparsity.sparsity=1.0"], "1.0 must be at least 0 and below 1"),
    "rule": (["--config", MST, "--config.pretrain.sparsity.rule=mts"], "'mts' is not one of"),
    "rule in capitals": (["--config", MST, "--config.pretrain.sparsity.rule=RigL"], "did you mean 'rigl'"),
    "sequence length": (["--config", MST, "--config.pretrain.seq_len=512"], "512 exceeds config.model.context 256"),
    "accumulation": (["--config", MST, "--config.pretrain.grad_accumulation_steps=3"], "16 is not divisible by"),
    "no data there": (["--config", f"{MST}:124m", "--workdir", "{tmp}/run"], "data/openwebtext"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands_exit_2_with_one_message(case, tmp_path):
    arguments, message = BAD_COMMANDS[case]
    result = command(*(a.format(tmp=tmp_path) for a in arguments))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    if case == "no data there":  # it got as far as to say what it is about to do
        assert f"Others, by --config {MST}:VARIANT: mini, mini_blocks, mini_er, 124m_er." in result.stdout


@pytest.mark.parametrize("flag", ["--help", "-h", "--help=true"])
def test_help_names_every_flag_and_does_nothing_else(flag):
    result = command(flag, "--config", "experiments/nope.py")
    assert (result.returncode, result.stderr) == (0, "")
    told = result.stdout.splitlines()
    assert told[0].startswith("python -m spdf_jax.main --config FILE[:VARIANT]")
    ours = (ROOT / "spdf_jax" / "main.py").read_text()
    names = re.findall(r"^_\w+ = \S+DEFINE_\w+\(\s*\"(\w+)\"", ours, re.MULTILINE)
    assert len(names) > 10
    lines = {line.split()[0]: line.split()[1:] for line in told if line.startswith("  --")}
    assert lines.keys() == {*(f"--{name}" for name in names), "--config.A.B=value"}
    assert all(lines.values())
    assert told[2].startswith("python -m spdf_jax.main --job compare RUN1 RUN2 ...")


def test_every_key_of_a_config_is_told_with_default_values_and_meaning():
    whole = command("--help_config")
    assert (whole.returncode, whole.stderr) == (0, "")
    config = spdf.default_config("mine", "mini", variants=("mini",), phases=("PHASE",)).to_dict()
    told = dict(re.findall(r"^config\.(\S+) = (.*?)(?:  \(.+\))?$", whole.stdout, re.MULTILINE))
    ours = flat(json.loads(json.dumps(config)))
    assert set(told) == set(ours) - {"phases"}
    assert told["model.n_layer"] == "4"
    assert "config.PHASE.optimizer.clip_norm = 1.0  (at least 0)\n    global gradient norm" in whole.stdout
    for section in ("optimizer", "config.pretrain.optimizer"):
        for arguments in ([f"--help_config={section}"], ["--help_config", section, "--config", "experiments/nope.py"]):
            part = command(*arguments)
            assert part.stdout.startswith("config.PHASE.optimizer.name = 'adamw'  (`adamw`, `muon`, ")
            assert "model" not in part.stdout
    wrong = command("--help_config", "modle")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--help_config: no section 'modle'; did you mean 'model'?" in wrong.stderr


@pytest.mark.parametrize("section", PLACES)
def test_every_key_of_a_section_is_told_in_words_of_its_own(section):
    told = [key.about for key in keys(section)]
    assert len(set(told)) == len(told), "one line for several keys says of none what it is"
    assert all(len(about.split()) > 2 for about in told)


def test_the_table_of_keys_in_the_docs_is_of_today():
    """``python -m spdf_jax.config.reference`` writes it."""
    text = (ROOT / "experiments" / "README.md").read_text()
    assert text.partition(START)[2].partition(END)[0] == table() + "\n"


@pytest.mark.slow
def test_the_package_itself_is_the_command():
    said = subprocess.run(
        [sys.executable, "-m", "spdf_jax", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith(f"spdf_jax {spdf.__version__} ")


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.py")), ids=lambda file: file.stem)
def test_an_experiment_that_is_run_as_a_program_says_how_it_is_run(file, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    said = capsys.readouterr()
    if file.stem == "cold_start":  # a program
        assert ended.value.code == 0
    else:
        assert ended.value.code == 2
        assert said.err.endswith(f"python -m spdf_jax.main --config {file}\n")


#: What stands in an experiment file, the line that is shown of it, and what is said.
MISTAKES = {
    "a name that is not there": ("c.model.n_layer = n", "c.model.n_layer = n: NameError: name 'n' is not defined"),
    "a section of another name": ("c.modell = c.model", "config: unknown key 'modell'; did you mean 'model'?"),
    "a key that is not there": (
        "c.model.n_layers = 3",
        "config.model: unknown key 'n_layers'; did you mean 'n_layer'?",
    ),
    "a section that is not there": ("c.modle.n_layer = 3", "c.modle.n_layer = 3: AttributeError: "),
    "a list that is too short": ("c.seed = [][1]", "c.seed = [][1]: IndexError: list index out of range"),
    "a module that is not there": (
        "import nothing_of_it",
        "import nothing_of_it: ModuleNotFoundError: No module named",
    ),
    "a value of another type": ("c.seed = 'one'", "c.seed = 'one': seed: expected int, got 'one'\n"),
    "a float that is whole": ("c.pretrain.steps = 1e3", "c.pretrain.steps = 1e3: steps: expected int, got 1000.0\n"),
    "a section of values": ("c.pretrain.update(batch_size=[4])", ": batch_size: expected int, got [4]\n"),
    "a value for a section": ("c.pretrain.sparsity = 0.5", "= 0.5: sparsity: expected a section, got 0.5\n"),
    "a shared value of another type": (
        "c.seed = spdf.shared_value('7')",
        "c.seed = spdf.shared_value('7'): seed: expected int, got a shared value of another type\n",
    ),
    "a division by zero": ("c.seed = 1 // 0", "c.seed = 1 // 0: ZeroDivisionError: "),
    "a missing bracket": ("c.seed = (1", "'(' was never closed"),
    "a function of the file": ("helper()", "return {}['a']: KeyError: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_an_experiment_file_is_shown_with_its_line(mistake, tmp_path):
    line, said = MISTAKES[mistake]
    file = tmp_path / "mine.py"
    lines = (
        "import spdf_jax as spdf", "", "", "def helper():", "    return {}['a']", "", "", "def get_config(variant='mini'):",
        "    c = spdf.default_config('mine', 'mini', variants=('mini',))", f"    {line}", "    return c", "",
    )  # fmt: skip
    file.write_text("\n".join(lines))
    result = command("--config", str(file))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    number = 5 if "function" in mistake else 10
    shown = f"error: {os.path.relpath(file, ROOT)}:{number}: "
    assert result.stderr.startswith("error: config" if "unknown key" in said else shown), result.stderr
    assert said in result.stderr
    assert len(result.stderr) < 400


RULES_OF_ONES_OWN = {
    "drop_score": (
        "return abs(weights * grad)",
        "config.pretrain: sparsity.rule: the drop_score of 'mine' fails on weights and grads of shape (256, 256): {line}: "
        "NameError: name 'grad' is not defined",
    ),
    "optimizer": (
        "return weights.with_masks()",
        "{line}: AttributeError: 'GradientTransformationExtraArgs' object has no",
    ),
}


@pytest.mark.parametrize("part", RULES_OF_ONES_OWN)
def test_a_mistake_in_a_rule_of_ones_own_is_shown_with_its_line(part, tmp_path):
    """In a file that the experiment imports."""
    line, said = RULES_OF_ONES_OWN[part]
    (tmp_path / "my_rule.py").write_text(f"def part(weights, grads=None):\n    {line}\n")
    (tmp_path / "mine.py").write_text(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport spdf_jax as spdf\nfrom my_rule import part\n"
        f"spdf.RULES['mine'] = spdf.Rule({part}=part)\n"
        "def get_config(variant='mini'):\n"
        "    c = spdf.default_config('mine', 'mini', variants=('mini',))\n"
        "    c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = 'mine', 0.5\n"
        "    return c\n"
    )
    result = command("--config", str(tmp_path / "mine.py"), "--job", "plan")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    shown = said.format(line=f"{os.path.relpath(tmp_path / 'my_rule.py', ROOT)}:2: {line}")
    assert result.stderr.startswith(f"error: {shown}")


#: Ctrl-C as JAX is imported, which then goes on if it was lost.
INTERRUPTED_JAX = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit('lost')\n"


@pytest.mark.parametrize(
    ("handler", "arguments", "code", "said"),
    [
        ("SIG_DFL", ["-m", "spdf_jax"], 130, "interrupted before anything was begun\n"),
        ("SIG_DFL", ["-m", "spdf_jax.main"], 130, "interrupted before anything was begun\n"),
        ("SIG_IGN", ["-m", "spdf_jax.main"], 1, "lost\n"),
        ("SIG_DFL", ["-c", "import spdf_jax"], -signal.SIGINT, "Traceback.*KeyboardInterrupt\n"),
    ],
)
def test_ctrl_c_while_a_command_imports_ends_it_in_a_line(handler, arguments, code, said, tmp_path):
    """Where a shell has it ignored it stays so, and a program that imports the library gets its exception."""
    (tmp_path / "jax.py").write_text(INTERRUPTED_JAX)
    start = f"import os, signal, sys; signal.signal(signal.SIGINT, signal.{handler}); os.execv(sys.executable, sys.argv[1:])"
    result = subprocess.run(
        [sys.executable, "-c", start, sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (code, "")
    assert re.fullmatch(said, result.stderr, re.DOTALL), result.stderr


def test_once_everything_is_imported_ctrl_c_is_an_exception_again(capsys):
    before = signal.signal(signal.SIGINT, end_interrupted)
    try:
        assert main(["main", "--help_config=mesh"]) == 0  # leaves no flag set for other tests
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_version_is_said_with_those_it_runs_on():
    result = command("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"spdf_jax {spdf.__version__} (jax {jax.__version__}, ")


def test_a_good_override_works_and_plan_trains_nothing(tmp_path):
    result = command("--config", MST, "--config.model.n_layer=2", "--job", "plan", "--workdir", str(tmp_path / "w"))
    assert result.returncode == 0, result.stderr
    assert "linear 1,572,864" in result.stdout
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_of_a_run_the_workdir_says_it_all(half_run, tmp_path):
    run = str(shutil.copytree(half_run, tmp_path / "run"))
    result = command("--job", "report", "--workdir", run)
    assert (result.returncode, result.stderr, result.stdout.strip()) == (0, "", f"{run}/report.html")
    for arguments, message in (
        (["--job", "generate", "--workdir", run, "--config.decode.max_new_token=3"], "'max_new_token'; did you mean"),
        (
            ["--job", "generate", "--workdir", run, "--config.decode.method=bean"],
            "config.decode.method: 'bean' is not one of",
        ),
        (
            ["--job", "evaluate", f"--workdir={tmp_path}"],
            f"--workdir {tmp_path}: no run is there; give the folder of one",
        ),
        (
            ["--workdir", f"{tmp_path}/none"],
            f"--workdir {tmp_path}/none: no run is there; give the folder of one, or --config",
        ),
        (["--workdir", run, "--config.seed=7"], "holds a run of another config (seed was 0, is 7)"),
    ):
        result = command(*arguments)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr
    assert not (tmp_path / "none").exists()

    planned = command("--workdir", run, "--job", "plan")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert "parameters" in planned.stdout


def test_settings_of_a_run_are_of_the_types_that_flags_override(tmp_path):
    """JSON has lists for tuples, and no flag can set a list."""
    c = spdf.default_config("mine", "mini", variants=("mini",))
    c.circuit.tasks, c.evaluation.exams = ("quote",), True
    resolved = spdf.resolve(c).as_dict()
    assert resolved["circuit"]["tasks"] == ["quote"]
    saved = get_config(str(recorded(tmp_path / "run", resolved)))
    types = [{key: type(value) for key, value in flat(config.to_dict()).items()} for config in (saved, c)]
    assert types[0] == types[1]
    assert saved.circuit.tasks == ("quote",)


def test_what_a_workdir_alone_cannot_say_is_told_to_be_typed(tmp_path):
    c = spdf.resolve(spdf.default_config("mine", "mini", variants=("mini",))).as_dict()
    c["pretrain"]["sparsity"]["rule"] = "mine"
    ruled = recorded(
        tmp_path / "sweep" / "cells" / "ruled", c | {"command": "python -m spdf_jax.main --config mine.py"}
    )
    (ruled / "code").mkdir()
    (ruled / "code" / "mine.py").write_text("")
    with pytest.raises(spdf.InputError) as told:
        get_config(str(ruled))
    assert "'mine' is not one of" in str(told.value)
    assert str(told.value).endswith(
        f"({ruled}/code), name that by --config, too, as the run began: python -m spdf_jax.main --config mine.py"
    )
    with pytest.raises(spdf.InputError) as told:
        get_config(str(tmp_path / "sweep"))
    assert str(told.value) == (
        f"--workdir {tmp_path}/sweep: holds a sweep, which goes on by what began it: python -m spdf_jax.main --config mine.py"
    )


def recorded(workdir: Path, config: dict) -> Path:
    workdir.mkdir(parents=True)
    write_json(workdir / "config.json", config)
    rows = [{"step": step, "phase": "fit", "sparsity": 0.5, "loss": 2.0 - step / 10} for step in (1, 2)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def test_a_report_needs_no_config_that_can_be_read(tmp_path, capsys):
    """Of a run of `spdf_jax.fit`, of one by a rule that an experiment file defines, of a sweep, of nothing."""
    c = spdf.resolve(spdf.default_config("mine", "mini", variants=("mini",))).as_dict()
    c["pretrain"]["sparsity"]["rule"] = "mine"
    fitted = recorded(tmp_path / "fit", {"experiment": "fit", "variant": "fit", "fit": {"tx": "adam"}})
    ruled = recorded(tmp_path / "sweep" / "cells" / "ruled", c)
    for workdir in (fitted, ruled, tmp_path / "sweep"):
        report.run_recorded(Request(workdir))
        assert capsys.readouterr().out == f"{workdir}/report.html\n"
    result = command("--job", "report", "--workdir", str(tmp_path / "none"))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "metrics.jsonl: no such file, so no run is recorded there; give the --workdir of a run" in result.stderr
    assert not (tmp_path / "none").exists()
    result = command("--job", "evaluate", "--workdir", str(fitted))
    assert "of a run of spdf_jax.fit, whose model is its caller's; call that again to go on" in result.stderr


def test_an_interrupted_job_without_a_run_says_what_to_do(tmp_path):
    for job in ("evaluate", "report"):
        result = command("--config", MST, "--job", job, "--workdir", str(tmp_path / "none"))
        assert result.returncode == 2
        assert "none" in result.stderr


def in_process(config, workdir: Path) -> str:
    """The message of a refused run; asserts that no file of the workdir changed."""
    before = {p: p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file()}
    with pytest.raises(spdf.InputError) as caught:
        jobs.train(spdf.resolve(config), workdir, progress=False)
    after = {p: p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file()}
    assert {p: b for p, b in after.items() if p.name != ".lock"} == {
        p: b for p, b in before.items() if p.name != ".lock"
    }
    return str(caught.value)


@pytest.fixture(scope="module")
def half_run(text, tmp_path_factory):
    """A run that stopped after its first checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / "half"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "preempted", lambda step: step == 11)
        with pytest.raises(Restart):
            jobs.train(spdf.resolve(fresh(text)), workdir, progress=False)
    assert (workdir / "checkpoints" / "10").is_dir()
    return workdir


def fresh(text, **model):
    c = tiny_config(text, text.parent / "cache")
    c.model.update(model)
    return c


def test_batch_not_divisible_by_devices(text, tmp_path):
    c = fresh(text)
    c.mesh.data = 8
    assert "4 sequences a micro-batch are not divisible by 8 devices; use a multiple of 8" in in_process(c, tmp_path)


def test_more_devices_than_there_are(text, tmp_path):
    c = fresh(text)
    c.mesh.data = 16
    assert "asks for 16 devices, 8 are there" in in_process(c, tmp_path)


def test_token_id_over_the_vocabulary(text, tmp_path):
    message = in_process(fresh(text, vocab_size=200), tmp_path)
    assert "is at or over config.model.vocab_size 200" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "train.bin"), (b"", "empty"), (b"\x01\x00\x02", "odd"), (b"PK\x03\x04" + b"x" * 400, "zip")],
    ids=["missing", "empty", "truncated", "wrong type"],
)
def test_bad_data_files(content, message, text, tmp_path):
    folder = tmp_path / "bins"
    folder.mkdir()
    if content is not None:
        (folder / "train.bin").write_bytes(content)
    np.arange(200, dtype=np.uint16).tofile(folder / "val.bin")
    c = fresh(text)
    c.data.source, c.data.path = "token_files", str(folder)
    said = in_process(c, tmp_path / "run")
    assert message in said.lower()
    assert "train.bin" in said


def refused_restore(config, workdir: Path) -> str:
    """What is said of a checkpoint that does not fit, should its ``config.json`` not tell."""
    run = spdf.resolve(config)
    with (
        contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints,
        pytest.raises(spdf.InputError) as caught,
    ):
        restore_state(run, make_plan(run)[0], make_mesh(run.mesh), checkpoints)
    return str(caught.value)


def test_checkpoint_of_another_model_names_the_shapes(text, half_run):
    assert "another config (model.d_model was 16, is 32)" in in_process(fresh(text, d_model=32), half_run)
    message = refused_restore(fresh(text, d_model=32), half_run)
    assert "is of another model" in message
    assert "(2, 16" in message
    assert "(2, 32" in message


@pytest.mark.slow
def test_checkpoint_without_masks_where_the_phase_is_sparse(text, tmp_path):
    dense = fresh(text)
    dense.phases, dense.pretrain.steps = ("pretrain",), 10
    del dense.finetune
    set_sparsity(dense.pretrain)
    jobs.train(spdf.resolve(dense), tmp_path, progress=False)
    sparse = dense.copy_and_resolve_references()
    set_sparsity(sparse.pretrain, rule="mst", sparsity=0.8, update_every_steps=5)
    assert "pretrain.sparsity.rule was 'dense', is 'mst'" in in_process(sparse, tmp_path)
    message = refused_restore(sparse, tmp_path)
    assert "has no masks for" in message
    assert "but the phase is sparse" in message


def test_another_config_in_a_used_workdir(text, half_run):
    c = fresh(text)
    c.pretrain.optimizer.peak_learning_rate = 1.0
    message = in_process(c, half_run)
    assert "pretrain.optimizer.peak_learning_rate was 0.01, is 1.0" in message


def test_data_replaced_between_runs(text, half_run, tmp_path):
    other = write_text(tmp_path / "text")
    (other / "train.txt").write_text((other / "train.txt").read_text() + "\nand more")
    c = fresh(text)
    saved = json.loads((half_run / "config.json").read_text())
    c.data.path = saved["data"]["path"]
    original = (text / "train.txt").read_text()
    try:
        (text / "train.txt").write_text((other / "train.txt").read_text())
        assert "the data is not what this run was trained on" in in_process(c, half_run)
    finally:
        (text / "train.txt").write_text(original)


def test_workdir_that_cannot_be_made(text, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(spdf.InputError, match="cannot write there"):
        jobs.train(spdf.resolve(fresh(text)), tmp_path / "file" / "run", progress=False)


def test_a_second_run_in_a_workdir_in_use_is_refused(text, tmp_path):
    with lock(tmp_path), pytest.raises(spdf.InputError, match="another run is using it"):
        jobs.train(spdf.resolve(fresh(text)), tmp_path, progress=False)


def test_compiled_programs_are_kept_beside_the_tokens_unless_told_otherwise(tmp_path):
    there = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        keep_compiled(DataConfig(cache_dir=str(tmp_path / "cache")))
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)
        jax.config.update("jax_compilation_cache_dir", None)
        (tmp_path / "file").touch()
        keep_compiled(DataConfig(cache_dir=str(tmp_path / "file")))
        assert jax.config.values["jax_compilation_cache_dir"] is None
        keep_compiled(DataConfig(cache_dir=str(tmp_path / "cache")))
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "cache" / "compiled")
        assert (tmp_path / "cache" / "compiled").is_dir()
    finally:
        jax.config.update("jax_compilation_cache_dir", there)


@pytest.mark.slow
def test_a_quiet_run_prints_nothing_but_errors(text, tmp_path):
    quiet = (*SHORT, "--quiet", "--workdir", str(tmp_path))
    result = started(*quiet, TINY_TEXT=str(text), TINY_FEW_MATRICES="1")
    assert (result.returncode, result.stdout) == (0, "")
    # XLA itself complains here about compiling slowly where the machine is busy.
    assert not [word for word in ("error:", "validation", "Tokenize", "tokens/s", "left") if word in result.stderr]
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"
    result = started(*quiet, "--config.seed=1", TINY_TEXT=str(text), TINY_FEW_MATRICES="1")
    assert (result.returncode, result.stdout) == (2, "")
    assert "seed was 0, is 1" in result.stderr


@pytest.mark.slow
@needs_mount
def test_a_full_disk_exits_2_and_keeps_the_last_checkpoint(text, tmp_path):
    """The run's disk has room for some checkpoints only; what it holds at the end is copied out and resumed."""
    disk, saved = tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    mounted = f'mount -t tmpfs -o size=900k tmpfs {disk} && {{ "$@"; code=$?; cp -r {disk} {saved}; exit $code; }}'
    prefix = ("unshare", "-rm", "sh", "-c", mounted, "sh")
    tiny = (*SHORT, "--quiet", "--config.loop.checkpoint_every_steps=3")
    env = {"TINY_TEXT": str(text), "TINY_FEW_MATRICES": "1"}
    result = started(*tiny, "--workdir", str(disk / "run"), prefix=prefix, **env)
    assert result.returncode == 2, result.stderr
    assert "No space left on device; what was saved before is intact" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    again = started(*tiny, "--noquiet", "--workdir", str(saved / "run"), **env)
    assert again.returncode == 0, again.stderr
    assert "resuming after step" in again.stdout
