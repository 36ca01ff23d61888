"""Every field of a config has its range or its words, holds to them wherever it is made, and says so in one line."""

import dataclasses
import math
import typing

import pytest
from ml_collections import ConfigDict

import spdf_jax as spdf
from spdf_jax.config import PhaseConfig, RunConfig
from spdf_jax.data import DataConfig
from spdf_jax.fields import OneOf, Range, Text, requirements
from spdf_jax.generate import DecodeConfig
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
        *("", "model", "data", "mesh", "loop", "decode", "evaluation"),
        *("one", "one.task", "one.optimizer", "one.sparsity"),
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
