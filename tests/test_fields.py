"""Every field of a config has its range or its words, holds to them wherever it is made, and says so in one line."""

import dataclasses
import json
import math
import typing

import pytest
from ml_collections import ConfigDict

import spdf_jax as spdf
from spdf_jax.config.read import load_config
from spdf_jax.config.run import PhaseConfig, RunConfig
from spdf_jax.data import DataConfig
from spdf_jax.fields import OneOf, Range, Text, Used, requirements
from spdf_jax.model.decoding import DecodeConfig
from spdf_jax.optim import OptimizerConfig
from spdf_jax.sharding import MeshConfig
from spdf_jax.sparsity.programme import SparsityConfig


def walk(section=RunConfig, path=()):
    """``(path, type, requirement or None)`` of every field, phases by the name ``one``."""
    rules = requirements(section)
    for name, hint in typing.get_type_hints(section).items():
        if name == "phases":
            yield from walk(PhaseConfig, ("one",))
        elif dataclasses.is_dataclass(hint):
            yield from walk(hint, (*path, name))
        else:
            yield (*path, name), hint, rules.get(name)


FIELDS = {".".join(path): (hint, rule) for path, hint, rule in walk()}


def wrong_values(rule):
    if isinstance(rule, OneOf):
        return ["nonsense", ""] if "" not in (*rule.words, *rule.more) else ["nonsense"]
    if isinstance(rule, Text):
        return ["a\nb", "a\0b"]
    just_outside = [rule.least - 1, rule.above, rule.most + 1, rule.below]
    return [v for v in just_outside if math.isfinite(v) and v != rule.special] + [
        math.nan,
        math.inf,
        -math.inf,
        10**400,
    ]


def change(path, value, hint):
    values = spdf.default_config("e", "v", variants=("v",), phases=("one",)).to_dict()
    *sections, key = path.split(".")
    node = values
    for section in sections:
        node = node[section]
    if typing.get_origin(hint) is tuple:
        value = ((0.0, value),) if key == "table" else (value,)
    node[key] = value
    return ConfigDict(values)


def test_every_section_is_walked():
    assert {path.rpartition(".")[0] for path in FIELDS} == {
        *("", "model", "circuit", "data", "mesh", "loop", "decode", "evaluation"),
        *("one", "one.task", "one.optimizer", "one.sparsity", "one.distill"),
    }


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_has_a_range_or_words(path):
    hint, rule = FIELDS[path]
    assert hint is bool or rule is not None, f"{path}: annotate it with one of spdf_jax.fields"
    assert not (isinstance(rule, Range) and rule == Range() and hint is int)


@pytest.mark.parametrize("path", [path for path, (_, rule) in FIELDS.items() if rule is not None])
def test_every_value_outside_is_refused_in_one_line_by_its_place(path):
    hint, rule = FIELDS[path]
    for value in wrong_values(rule):
        if hint is int and not isinstance(value, int):
            continue  # refused by its type, as test_config.py has it
        with pytest.raises(spdf.InputError) as caught:
            spdf.resolve(change(path, value, hint))
        message = str(caught.value)
        assert message.startswith(f"config.{path}"), message
        assert repr(value) in message or value == 10**400  # inf, where a fraction is meant
        assert "\n" not in message
        assert " must " in message or " is not one of " in message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(clip_norm=-1.0), "optimizer.clip_norm: -1.0 must be at least 0; the default is 1.0"),
        (lambda: OptimizerConfig(eps=-1.0), "optimizer.eps: -1.0 must be above 0; the default is 1e-08"),
        (lambda: OptimizerConfig(beta1=1.0), "optimizer.beta1: 1.0 must be at least 0 and below 1; the default is 0.9"),
        (
            lambda: OptimizerConfig(beta2=1.0),
            "optimizer.beta2: 1.0 must be at least 0 and below 1; the default is 0.95",
        ),
        (lambda: OptimizerConfig(weight_decay=-1.0), "optimizer.weight_decay: -1.0 must be at least 0"),
        (lambda: OptimizerConfig(warmup_steps=-1), "optimizer.warmup_steps: -1 must be at least 0"),
        (lambda: OptimizerConfig(final_fraction=5.0), "optimizer.final_fraction: 5.0 must be at least 0 and at most 1"),
        (
            lambda: OptimizerConfig(peak_learning_rate=math.nan),
            "optimizer.peak_learning_rate: nan must be a number above 0",
        ),
        (
            lambda: OptimizerConfig(schedule="linaer"),
            "'linaer' is not one of .*; did you mean 'linear'; the default is",
        ),
        (
            lambda: SparsityConfig(drop_fraction=2.0),
            "sparsity.drop_fraction: 2.0 must be -1, or at least 0 and at most 1",
        ),
        (lambda: SparsityConfig(rule="rgil"), "sparsity.rule: 'rgil' is not one of 'dense', 'static', .* mean 'rigl'"),
        (lambda: spdf.GPTConfig(layer_norm_eps=-1.0), "model.layer_norm_eps: -1.0 must be above 0 and at most 1"),
        (lambda: spdf.GPTConfig(d_ff=-4), "model.d_ff: -4 must be at least 0"),
        (lambda: spdf.GPTConfig(n_head=0), "model.n_head: 0 must be at least 1"),
        (lambda: MeshConfig(data=0), "mesh.data: 0 must be -1, or at least 1"),
        (lambda: MeshConfig(data=-1, fsdp=-1), "mesh: at most one of its sizes may be -1"),
        (lambda: DecodeConfig(length_penalty=math.nan), "decode.length_penalty: nan must be a finite number"),
        (lambda: DataConfig(source="files"), "data.source: 'files' is not one of 'embedded', 'text'"),
    ],
)
def test_a_section_made_by_hand_is_held_to_the_same(make, message):
    with pytest.raises(spdf.InputError, match=message):
        make()


def test_a_table_of_another_shape_is_refused():
    for table in (((0.0, 0.5, 0.7),), (0.0, 0.5), ((0.0, "dense"),)):
        c = spdf.default_config("e", "v", variants=("v",), phases=("one",)).to_dict()
        c["one"]["sparsity"] |= {"rule": "rigl", "schedule": "table", "table": table}
        with pytest.raises(spdf.InputError, match=r"config\.one\.sparsity\.table\[0\].*: expected"):
            spdf.resolve(ConfigDict(c))


USED_BY_DEFAULT = {"data.validation_fraction", "data.unique_tokens", "one.steps"} | {
    f"one.optimizer.{name}" for name in ("final_fraction", "beta1", "beta2", "eps")
}


def another_value(hint, rule, default):
    """A value that the field may have, other than its default."""
    if hint is bool:
        return not default
    if isinstance(rule, OneOf):
        return next(word for word in (*rule.words, *rule.more) if word not in (default, ""))
    if isinstance(rule, Range):
        return next(hint(v) for v in (0.5, 1, 2, 500) if rule.holds(hint(v)) and hint(v) != default)
    return "2:4"  # is a pattern, a path and a name


@pytest.mark.parametrize("path", [path for path in FIELDS if "." in path])
def test_what_nothing_uses_is_refused_where_it_is_set(path):
    """From the defaults, dense and greedy, one field is set at a time."""
    hint, rule = FIELDS[path]
    node = spdf.default_config("e", "v", variants=("v",), phases=("one",))
    for key in path.split("."):
        node = node[key]
    value = 0.5 if path.endswith("table") else another_value(hint, rule, node)
    said = ""
    try:
        spdf.resolve(change(path, value, hint))
    except spdf.InputError as error:
        said = str(error)
    ignored = said.startswith(f"config.{path}: ") and "would be ignored, since it is for" in said
    *sections, name = path.split(".")
    owner = spdf.resolve(spdf.default_config("e", "v", variants=("v",), phases=("one",)))
    for section in sections:
        owner = owner.phases["one"] if section == "one" else getattr(owner, section)
    hints = typing.get_type_hints(type(owner), include_extras=True)[name]
    conditional = any(isinstance(extra, Used) for extra in getattr(hints, "__metadata__", ()))
    assert ignored == (conditional and path not in USED_BY_DEFAULT)


def resolved(phases=("one",), **changes):
    c = spdf.default_config("e", "v", variants=("v",), phases=phases)
    with c.unlocked():
        for path, value in changes.items():
            *sections, key = path.split("__")
            node = c
            for section in sections:
                node = node[section]
            node[key] = value
    return spdf.resolve(c)


RIGL = {"one__sparsity__rule": "rigl", "one__sparsity__sparsity": 0.8}
MST = {"one__sparsity__rule": "mst", "one__sparsity__sparsity": 0.8, "one__sparsity__schedule": "three_phases"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"one__sparsity__sparsity": 0.75, "one__sparsity__distribution": "erk"},
            r"config\.one\.sparsity\.sparsity: 0\.75 would be ignored, since it is for rules other than 'dense' .*; leave it "
            r"at 0\.0 \(likewise config\.one\.sparsity\.distribution at 'uniform'\)",
        ),
        ({**RIGL, "one__sparsity__sparsity": 0.0}, r"sparsity: 0\.0 leaves rule 'rigl' no zeros to place; set a share"),
        ({**RIGL, "one__sparsity__table": ((0.0, 0.5),)}, r"table: .* since it is for schedule 'table'"),
        ({**RIGL, "one__sparsity__cycles": 2}, "cycles: 2 would be ignored, since it is for schedule 'alternate'"),
        (
            {**RIGL, "one__sparsity__exploration": 0.2},
            "exploration: 0.2 would be ignored, since it is for rules that explore",
        ),
        (
            {**RIGL, "one__sparsity__attention_width": 8},
            "attention_width: 8 would be ignored, since it is for an attention_p",
        ),
        (
            {**MST, "one__sparsity__init": "magnitude"},
            "init: 'magnitude' would be ignored, since it is for masks that are",
        ),
        ({**MST, "one__sparsity__stop_fraction": 0.75}, "stop_fraction: 0.75 ends the topology steps before schedule"),
        (
            {**RIGL, "one__sparsity__rule": "static", "one__sparsity__update_every_steps": 5},
            "update_every_steps: 5 would be",
        ),
        (
            {"one__epochs": 3, "one__steps": 50, "one__task__name": "restaurant"},
            "steps: 50 would be ignored, since it is for",
        ),
        (
            {"one__optimizer__warmup_steps": 601},
            "warmup_steps: a warm-up of 601 steps is longer than its phase of 600, and would never arrive at the learning "
            "rate; set it to 60, or raise config.one.steps",
        ),
        (
            {"one__optimizer__schedule": "constant", "one__optimizer__final_fraction": 0.5},
            "final_fraction: 0.5 would be",
        ),
        ({"one__reset_optimizer": False}, "reset_optimizer: False has nothing to carry over"),
        (
            {"decode__beam_size": 4},
            "decode.beam_size: 4 would be ignored, since it is for method 'beam'; leave it at 10",
        ),
        (
            {"decode__method": "beam", "decode__top_p": 0.5},
            "decode.top_p: 0.5 would be ignored, since it is for method 's",
        ),
        ({"model__mup_alpha": 2.0}, "model.mup_alpha: 2.0 would be ignored, since it is for a mup_base_width above 0"),
        ({"variant": "124m"}, "config.variant: e has no variant '124m'"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(spdf.InputError, match=message) as caught:
        resolved(**changes)
    assert "\n" not in str(caught.value)


def test_what_an_earlier_run_ignored_is_at_its_default_when_it_is_read(tmp_path):
    """Sparsity on rule dense trained dense; its folder stays usable, and means what it did."""
    values = resolved().as_dict()
    values["one"]["sparsity"] |= {"sparsity": 0.75, "sparsify_head": True}
    values["decode"]["beam_size"] = 4
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_config(tmp_path / "config.json") == resolved()
