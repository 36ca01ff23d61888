"""A phase's plan against a walk through all of its steps that applies every topology target."""

from fractions import Fraction
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdf_jax.errors import InputError
from spdf_jax.sparsity.distributions import MatrixGroup, target_counts
from spdf_jax.sparsity.programme import Programme, SparsityConfig
from spdf_jax.sparsity.rules import RULES

QUICK = settings(deadline=None, derandomize=True, max_examples=60)
GROUPS = {"attn": MatrixGroup(2, (8, 8)), "mlp": MatrixGroup(2, (8, 32)), "head": MatrixGroup(1, (50, 8))}
HUNDREDTHS = st.integers(0, 100).map(lambda n: n / 100)
CURVES = st.sampled_from(
    [
        {"schedule": "constant"},
        {"schedule": "cubic", "ramp_end": 0.4},
        {"schedule": "three_phases", "ramp_end": 0.1, "ultra_end": 0.7, "restoration_end": 0.9},
        {"schedule": "table", "table": ((0.0, 0.0), (0.3, 0.9), (0.5, 0.9), (0.8, 0.0))},
    ]
)


def share(value: float) -> Fraction:
    """The decimal that a config means: 0.29 is 29/100."""
    return Fraction(repr(value))


def expected_counts(config, progress):
    return dict(target_counts(GROUPS, config.curve(progress), config.distribution))


def turning_steps(config, total_steps):
    """The steps that a schedule needs whatever the interval, by the definition; None where the phase has no room for them."""
    at = {p: min(-(-share(p) * total_steps // 1), total_steps - 1) for p in (0.0, *config.curve.turns)}
    ramps = [(at[start], at[end]) for start, end in config.curve.ramps]
    if sorted(set(at.values())) != list(at.values()) or any(last - first < 2 for first, last in ramps):
        return None
    short = [(first, last) for first, last in ramps if last - first < 2 * config.update_every_steps]
    return ({*at.values()} | {first + n * (last - first) // 4 for first, last in short for n in (1, 2, 3)}) - {0}


@QUICK
@given(
    rule=st.sampled_from(["set", "rigl", "mst"]),
    curve=CURVES,
    distribution=st.sampled_from(["uniform", "er"]),
    total_steps=st.integers(12, 130) | st.just(100),
    every=st.integers(1, 12),
    stop_fraction=HUNDREDTHS | st.just(1.0),
)
def test_counts_and_topology_steps_equal_a_walk_through_the_phase(
    rule, curve, distribution, total_steps, every, stop_fraction
):
    if curve["schedule"] != "constant":
        stop_fraction = max(stop_fraction, 0.9)
    config = SparsityConfig(
        rule=rule,
        sparsity=0.8,
        distribution=distribution,
        update_every_steps=every,
        stop_fraction=stop_fraction,
        **curve,
    )
    turning = turning_steps(config, total_steps)
    none = not turning and Fraction(every, total_steps) > min(
        share(stop_fraction), Fraction(total_steps - 1, total_steps)
    )
    if turning is None or none:
        with pytest.raises(InputError, match="has no room" if turning is None else "would never change a mask"):
            Programme(config, GROUPS, total_steps)
        return
    programme = Programme(config, GROUPS, total_steps)
    full = {name: g.size for name, g in GROUPS.items()}
    now = expected_counts(config, 0.0)
    for step in range(total_steps):
        assert dict(programme.counts(step)) == now
        assert programme.active(step) == {name: n * GROUPS[name].count for name, n in now.items()}
        assert programme.sparsity(step) == pytest.approx(
            1 - sum(programme.active(step).values()) / sum(g.count * g.size for g in GROUPS.values())
        )
        due = step > 0 and step % every == 0 and Fraction(step, total_steps) <= share(stop_fraction)
        aim = expected_counts(config, step / total_steps)
        target = programme.topology(step)
        assert (target is not None) == ((due or step in turning) and not (now == full and aim == full))
        if target is not None:
            assert dict(target.counts) == aim
            assert 0 <= target.drop_fraction <= RULES[rule].drop_fraction
            now = aim
    assert dict(programme.counts(total_steps)) == now == expected_counts(config, 1.0)


SETTINGS = st.sampled_from(
    [
        *[
            (rule, s)
            for rule in ("set", "rigl", "mst", "mest", "topkast")
            for s in ("constant", "cubic", "three_phases")
        ],
        *[(rule, "table") for rule in ("gmp", "mst", "topkast")],
        ("gmp", "cubic"),
        ("acdc", "alternate"),
    ]
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    setting=SETTINGS,
    total_steps=st.integers(1, 700),
    every=st.integers(1, 800),
    boundaries=st.lists(HUNDREDTHS, min_size=3, max_size=3, unique=True).map(sorted),
    cycles=st.integers(1, 6),
)
def test_a_programme_goes_where_its_schedule_says_or_is_refused(setting, total_steps, every, boundaries, cycles):
    (rule, schedule), (first, second, third) = setting, boundaries
    table = {"table": ((0.0, 0.25), (first or 0.01, 0.5), (second or 0.01, 0.9), (third or 0.01, 0.0))}
    config = SparsityConfig(
        rule=rule,
        sparsity=0.8,
        schedule=schedule,
        ramp_end=first,
        ultra_end=second,
        restoration_end=third,
        cycles=cycles,
        update_every_steps=every,
        **(table if schedule == "table" else {}),
    )
    refusal = ""
    try:
        programme = Programme(config, {"w": MatrixGroup(1, (100, 100))}, total_steps)
    except InputError as error:
        refusal = str(error)
    turns = (0.0, *config.curve.turns)
    if "has no room" in refusal:
        assert turns[-1] > 0
        assert any((b - a) * total_steps < 4 for a, b in pairwise((*turns, 1.0)))
        return
    if refusal:
        assert "would never change a mask" in refusal
        assert turns[-1] == 0
        assert every >= total_steps
        return
    levels = [round(programme.sparsity(step), 3) for step in range(total_steps + 1)]
    stairs = [level for level, _ in groupby(levels)]
    moves = [step for step in range(total_steps) if programme.topology(step)]
    if schedule == "constant":
        assert stairs == [0.8]
        assert moves
        assert max(moves) > 0
    elif schedule == "cubic":
        assert stairs[-1] == 0.8
        assert stairs == sorted(stairs)
        assert len(stairs) >= 4 or first * total_steps < 8  # it climbs, where there is room for heights between
    elif schedule == "three_phases":
        assert stairs[-1] == 0.0
        assert max(stairs) == 0.8
        assert len(stairs) >= 7 or first * total_steps < 8 or (third - second) * total_steps < 8
    elif schedule == "table":
        assert stairs == [s for s, _ in groupby(s for _, s in sorted(dict(table["table"]).items()))]
    else:
        assert stairs == ([] if first == 0 else [0.0]) + [0.8, 0.0] * cycles + [0.8]


def stairs(total_steps=600, **settings):
    """``{topology step: sparsity after it}`` of a phase with the config's other defaults."""
    programme = Programme(SparsityConfig(sparsity=0.9, **settings), {"w": MatrixGroup(1, (100, 100))}, total_steps)
    return {step: round(programme.sparsity(step + 1), 3) for step in range(total_steps) if programme.topology(step)}


def test_the_defaults_reach_their_ends():
    mst = stairs(rule="mst", schedule="three_phases")
    assert list(mst) == [15, 30, 45, 60, 100, 200, 300, 400, 450, 472, 495, 500, 517, 540]
    assert mst[60] == mst[450] == 0.9
    assert mst[540] == 0.0
    assert mst[30] == 0.787  # half of the warm-up: 7/8
    assert stairs(rule="gmp", schedule="cubic") == {15: 0.52, 30: 0.787, 45: 0.886, 60: 0.9}
    acdc = stairs(rule="acdc", schedule="alternate")
    assert list(acdc) == [60, 99, 138, 177, 216, 255, 294, 333, 372, 411, 450]
    assert list(acdc.values()) == [0.9, 0.0] * 5 + [0.9]


def test_a_turn_at_the_very_end_is_made_at_the_last_step():
    assert stairs(rule="gmp", schedule="cubic", ramp_end=1.0, total_steps=400) == {
        100: 0.52,
        200: 0.787,
        300: 0.886,
        399: 0.9,
    }


def test_turns_on_the_interval_add_no_step():
    settings = {"rule": "mst", "schedule": "three_phases", "update_every_steps": 10}
    assert list(stairs(400, **settings)) == list(range(10, 361, 10))


@pytest.mark.parametrize(
    ("total_steps", "settings", "message"),
    [
        (60, {"rule": "rigl"}, "'rigl' would never change a mask in 60 steps with update_every_steps 100"),
        (600, {"rule": "rigl", "stop_fraction": 0.1}, "'rigl' would never change a mask .*stop_fraction 0.1"),
        (600, {"rule": "set", "drop_fraction": 0.0}, "'set' would never change a mask .*drop_fraction 0 "),
        (100, {"rule": "topkast"}, "'topkast' would never change a mask in 100 steps"),
        (600, {"rule": "gmp", "schedule": "table", "table": ((0.0, 0.5),)}, "'gmp' would never change a mask"),
        (
            5,
            {"rule": "mst", "schedule": "three_phases"},
            "'three_phases' has no room from 0.75 to 0.9 of a phase of 5 steps",
        ),
        (
            600,
            {"rule": "acdc", "schedule": "alternate", "cycles": 300},
            "'alternate' has no room from 0.102167 to 0.10325",
        ),
        (
            600,
            {"rule": "mst", "schedule": "three_phases", "stop_fraction": 0.75},
            "stop_fraction: 0.75 ends the topology steps before schedule 'three_phases' has arrived, at 0.9",
        ),
    ],
)
def test_a_programme_that_would_stand_still_or_miss_its_end_is_refused(total_steps, settings, message):
    with pytest.raises(InputError, match=message):
        stairs(total_steps, **settings)


@pytest.mark.parametrize("stop_fraction", [0.29, 0.57, 0.58])  # 100 times these falls short of an integer in floats
def test_the_last_topology_step_counts_when_the_stop_falls_on_it(stop_fraction):
    config = SparsityConfig(rule="set", sparsity=0.9, update_every_steps=1, stop_fraction=stop_fraction)
    programme = Programme(config, GROUPS, 100)
    last = round(stop_fraction * 100)
    assert [step for step in range(100) if programme.topology(step)] == list(range(1, last + 1))


@QUICK
@given(start=HUNDREDTHS, end=HUNDREDTHS, total_steps=st.integers(1, 100))
def test_sparse_attention_runs_in_its_half_open_window(start, end, total_steps):
    config = SparsityConfig(
        rule="static",
        sparsity=0.5,
        attention_pattern="strided",
        attention_width=16,
        attention_start=start,
        attention_end=end,
    )
    programme = Programme(config, GROUPS, total_steps)
    for step in range(total_steps):
        inside = share(start) <= Fraction(step, total_steps) < share(end)
        assert programme.attention(step) == ("strided" if inside else "causal", 16)


def test_rigl_stops_at_three_quarters_and_its_drop_fraction_falls_to_zero_there():
    config = SparsityConfig(rule="rigl", sparsity=0.8, stop_fraction=0.75)
    programme = Programme(config, GROUPS, 1000)
    steps = [step for step in range(1000) if programme.topology(step)]
    assert steps == [100, 200, 300, 400, 500, 600, 700]
    # 0.3/2 (1 + cos(pi p/0.75)): p = 0.25 is a third, 0.5 two thirds: 3/4 and 1/4 of 0.3.
    programme = Programme(config, GROUPS, 2000)
    assert [programme.topology(step).drop_fraction for step in (500, 1000, 1500)] == pytest.approx([0.225, 0.075, 0.0])
    assert programme.topology(1600) is None


def test_the_drop_fraction_restarts_at_every_stage():
    config = SparsityConfig(
        rule="mst", sparsity=0.9, schedule="three_phases", ramp_end=0.2, ultra_end=0.6, restoration_end=0.8
    )
    programme = Programme(config, GROUPS, 10_000)
    zetas = {p: programme.topology(round(p * 10_000)).drop_fraction for p in (0.1, 0.2, 0.4, 0.59, 0.6, 0.7)}
    assert zetas == pytest.approx({0.1: 0.15, 0.2: 0.3, 0.4: 0.15, 0.59: 0.000462, 0.6: 0.3, 0.7: 0.15}, abs=1e-5)


def test_mst_needs_no_topology_step_once_it_is_dense():
    config = SparsityConfig(
        rule="mst", sparsity=0.9, schedule="three_phases", ramp_end=0.1, ultra_end=0.5, restoration_end=0.7
    )
    programme = Programme(config, GROUPS, 10_000)
    steps = [step for step in range(10_000) if programme.topology(step)]
    assert steps == list(range(100, 7_001, 100))
    assert programme.sparsity(0) == programme.sparsity(7_001) == programme.sparsity(9_999) == 0.0
    assert programme.sparsity(7_000) > 0.0
    assert programme.sparsity(1_001) == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize(("drop_fraction", "expected"), [(-1.0, 0.3), (0.1, 0.1), (0.5, 0.5)])
def test_the_config_s_drop_fraction_goes_before_the_rule_s(drop_fraction, expected):
    config = SparsityConfig(rule="set", sparsity=0.5, drop_fraction=drop_fraction)
    assert config.topology_rule.drop_fraction == expected
    assert config.topology_rule._replace(drop_fraction=0.3) == RULES["set"]
    assert Programme(config, GROUPS, 10**9).topology(100).drop_fraction == pytest.approx(expected)


def test_a_step_that_would_exchange_nothing_is_an_ordinary_one():
    gmp = SparsityConfig(rule="gmp", sparsity=0.8, schedule="cubic", ramp_end=0.5)
    programme = Programme(gmp, GROUPS, 1000)
    steps = [step for step in range(1000) if programme.topology(step)]
    assert steps == [100, 200, 300, 400, 500]  # and none once the ramp has arrived
    assert {programme.topology(step).drop_fraction for step in steps} == {0.0}


def test_acdc_alternates_between_dense_and_sparse_and_ends_sparse():
    config = SparsityConfig(
        rule="acdc", sparsity=0.9, schedule="alternate", ramp_end=0.2, ultra_end=0.6, cycles=2, pattern="unstructured"
    )
    programme = Programme(config, GROUPS, 1000)
    targets = {step: programme.topology(step) for step in range(1000)}
    assert [step for step, target in targets.items() if target] == [200, 300, 400, 500, 600]
    levels = [round(programme.sparsity(step), 1) for step in (0, 199, 201, 301, 401, 501, 601, 999)]
    assert levels == [0.0, 0.0, 0.9, 0.0, 0.9, 0.0, 0.9, 0.9]


@pytest.mark.parametrize("rule", ["set", "rigl", "mst", "mest", "sensitivity"])
def test_patterns_reach_the_rule_and_the_counts(rule):
    blocks = Programme(
        SparsityConfig(rule=rule, sparsity=0.6, pattern="block4", distribution="er"),
        {**GROUPS, "head": MatrixGroup(1, (48, 8))},
        300,
    )
    assert blocks.config.topology_rule.pattern == "block4"
    assert all(n % 16 == 0 for n in blocks.topology(100).counts.values())
    half = Programme(SparsityConfig(rule=rule, sparsity=0.5, pattern="2:4"), {"attn": GROUPS["attn"]}, 300)
    assert half.topology(100).counts == {"attn": 32}
    with pytest.raises(InputError, match=r"head of shape \(50, 8\).*block4"):
        Programme(SparsityConfig(rule=rule, sparsity=0.6, pattern="block4"), GROUPS, 300)


def test_a_static_phase_has_one_count_and_no_topology_step():
    programme = Programme(SparsityConfig(rule="static", sparsity=0.75, update_every_steps=1), GROUPS, 50)
    assert {tuple(programme.counts(step).items()) for step in range(50)} == {(("attn", 16), ("mlp", 64), ("head", 100))}
    assert [programme.topology(step) for step in range(50)] == [None] * 50
    assert programme.sparsity(0) == 0.75
    assert programme.active(7) == {"attn": 32, "mlp": 128, "head": 100}


def test_a_dense_phase_has_nothing_to_count():
    programme = Programme(SparsityConfig(), GROUPS, 50)
    assert SparsityConfig().dense
    assert dict(programme.counts(10)) == {}
    assert programme.sparsity(10) == 0.0
    assert [programme.topology(step) for step in range(50)] == [None] * 50
    assert programme.attention(10) == ("causal", 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, "sparsity.sparsity"),
        ({"rule": "magic"}, "sparsity.rule"),
        ({"schedule": "sine"}, "sparsity.schedule"),
        ({"distribution": "normal"}, "sparsity.distribution"),
        ({"init": "zeros"}, "sparsity.init"),
        ({"update_every_steps": 0}, "sparsity.update_every_steps"),
        ({"rule": "static", "schedule": "cubic"}, "'static' cannot follow 'cubic'"),
        ({"rule": "gmp", "sparsity": 0.5}, "'gmp' cannot follow 'constant'; use 'cubic' or 'table'"),
        ({"rule": "acdc", "schedule": "table"}, "'acdc' cannot follow"),
        ({"rule": "acdc", "schedule": "alternate", "cycles": 0}, "cycles: 0 must be at least 1"),
        ({"rule": "mst", "schedule": "three_phases", "sparsity": 0.5, "pattern": "2:4"}, "pattern 2:4.*cannot follow"),
        ({"rule": "rigl", "sparsity": 0.8, "pattern": "2:4"}, "2:4 has sparsity 0.5 .*not 0.8"),
        ({"rule": "gmp", "schedule": "table", "table": ((0.0, 0.0), (0.5, 0.4)), "pattern": "2:4"}, "not 0.4"),
        (
            {"rule": "rigl", "sparsity": 0.5, "pattern": "2:4", "distribution": "erk"},
            "2:4 gives every matrix one density",
        ),
        ({"rule": "rigl", "sparsity": 0.5, "pattern": "4:2"}, "'4:2'"),
    ],
)
def test_bad_settings_are_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        SparsityConfig(**change)
