"""Curves over progress: values at the corners, MST's mirror image, RigL's cosine."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdf_jax.errors import InputError
from spdf_jax.sparsity import schedules

QUICK = settings(deadline=None, derandomize=True, max_examples=50)
PROGRESS = st.floats(0, 1)


@QUICK
@given(p=PROGRESS)
def test_constant_is_constant(p):
    curve = schedules.constant(0.8)
    assert curve(p) == 0.8
    assert curve.stage(p) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("p", "expected"),
    # s (1 - (1 - x)^3) with s = 0.8 and x = (p - 0.2)/0.4 (Zhu & Gupta 2017): x = 1/4 -> 37/64, 1/2 -> 7/8, 3/4 -> 63/64.
    [(0.0, 0.0), (0.2, 0.0), (0.3, 0.4625), (0.4, 0.7), (0.5, 0.7875), (0.6, 0.8), (1.0, 0.8)],
)
def test_cubic_at_its_corners(p, expected):
    assert schedules.cubic(0.8, 0.2, 0.6)(p) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.0, 0.0),
        (0.1, 0.7875),  # half of the warm-up: 7/8 of 0.9
        (0.2, 0.9),
        (0.5, 0.9),
        (0.6, 0.9),
        (0.7, 0.7875),  # half of the restoration: the same height as half of the warm-up
        (0.8, 0.0),
        (0.9, 0.0),
        (1.0, 0.0),
    ],
)
def test_three_phases_at_its_corners(p, expected):
    assert schedules.three_phases(0.9, 0.2, 0.6, 0.8)(p) == pytest.approx(expected, abs=1e-12)


@QUICK
@given(x=st.floats(0, 1), lengths=st.tuples(st.integers(1, 8), st.integers(0, 8), st.integers(1, 8)))
def test_restoration_is_the_mirror_image_of_the_warmup(x, lengths):
    warmup, hold, restoration = (n / 24 for n in lengths)
    ultra_end = warmup + hold
    curve = schedules.three_phases(0.9, warmup, ultra_end, ultra_end + restoration)
    assert curve(warmup * x) == pytest.approx(curve(ultra_end + restoration * (1 - x)), abs=1e-9)
    assert 0 <= curve(warmup * x) <= 0.9


def test_three_phases_may_leave_out_warmup_or_restoration():
    curve = schedules.three_phases(0.9, 0.0, 0.5, 0.5)
    assert [curve(p) for p in (0.0, 0.25, 0.49, 0.5, 1.0)] == [0.9, 0.9, 0.9, 0.0, 0.0]
    assert curve.stages == (0.0, 0.5)


def test_step_table_holds_each_value_until_the_next_and_needs_no_order():
    curve = schedules.step_table({0.5: 0.9, 0.0: 0.25, 0.75: 0.0})
    assert [curve(p) for p in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)] == [0.25, 0.25, 0.9, 0.9, 0.0, 0.0]
    assert curve.stages == (0.0, 0.5, 0.75)


@pytest.mark.parametrize(
    ("curve", "p", "expected"),
    [
        (schedules.cubic(0.8, 0.2, 0.6), 0.4, (0.0, 1.0)),
        (schedules.three_phases(0.9, 0.2, 0.6, 0.8), 0.0, (0.0, 0.2)),
        (schedules.three_phases(0.9, 0.2, 0.6, 0.8), 0.19, (0.0, 0.2)),
        (schedules.three_phases(0.9, 0.2, 0.6, 0.8), 0.2, (0.2, 0.6)),
        (schedules.three_phases(0.9, 0.2, 0.6, 0.8), 0.79, (0.6, 0.8)),
        (schedules.three_phases(0.9, 0.2, 0.6, 0.8), 1.0, (0.8, 1.0)),
        (schedules.step_table({0.0: 0.5, 0.5: 0.9}), 0.25, (0.0, 0.5)),
        (schedules.step_table({0.0: 0.5, 0.5: 0.9}), 0.5, (0.5, 1.0)),
    ],
)
def test_a_stage_holds_its_own_start(curve, p, expected):
    assert curve.stage(p) == expected


@pytest.mark.parametrize(
    ("p", "expected"),
    # RigL, eq. (1): alpha/2 (1 + cos(t pi / T_end)); alpha = 0.3 on [0.25, 0.75].
    [(0.25, 0.3), (0.375, 0.15 * (1 + math.sqrt(0.5))), (0.5, 0.15), (0.625, 0.15 * (1 - math.sqrt(0.5))), (0.75, 0.0)],
)
def test_drop_fraction_falls_by_half_a_cosine(p, expected):
    assert schedules.cosine_drop_fraction(0.3, p, 0.25, 0.75) == pytest.approx(expected, abs=1e-12)


def test_drop_fraction_is_flat_outside_its_stage_and_zero_in_an_empty_one():
    assert schedules.cosine_drop_fraction(0.3, 0.1, 0.25, 0.75) == 0.3
    assert schedules.cosine_drop_fraction(0.3, 0.9, 0.25, 0.75) == pytest.approx(0.0, abs=1e-12)
    assert schedules.cosine_drop_fraction(0.3, 0.5, 0.5, 0.5) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.constant(1.0), "outside"),
        (lambda: schedules.cubic(-0.1), "outside"),
        (lambda: schedules.cubic(0.5, 0.6, 0.2), "rise"),
        (lambda: schedules.cubic(0.5, 0.0, 1.1), "rise"),
        (lambda: schedules.three_phases(0.5, 0.5, 0.4, 0.9), "rise"),
        (lambda: schedules.three_phases(0.5, 0.1, 0.4, 1.9), "rise"),
        (lambda: schedules.alternate(0.5, 0.4, 0.4, 2), "no turn has room"),
        (lambda: schedules.step_table({}), "progress 0"),
        (lambda: schedules.step_table({0.1: 0.5}), "progress 0"),
        (lambda: schedules.step_table({0.0: 0.5, 1.5: 0.0}), "rise"),
        (lambda: schedules.step_table({0.0: 0.5, 0.5: 1.0}), r"progress 0\.5"),
    ],
)
def test_curves_that_make_no_sense_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
