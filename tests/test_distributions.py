"""How many weights each matrix keeps: literals worked by hand, and the total within rounding."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdf_jax.errors import InputError
from spdf_jax.sparsity.distributions import DISTRIBUTIONS, MatrixGroup, check_sparsity, target_counts

QUICK = settings(deadline=None, derandomize=True, max_examples=50)


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [(0.0, {"a": 12, "b": 10}), (0.5, {"a": 6, "b": 5}), (0.75, {"a": 3, "b": 2}), (0.9, {"a": 1, "b": 1})],
)
def test_uniform_keeps_size_minus_rounded_zeros(sparsity, expected):
    # 12 and 10 weights: 0.75 -> 9 and round(7.5) = 8 zeros (ties to even); 0.9 -> round(10.8) = 11 and 9 zeros.
    groups = {"a": MatrixGroup(2, (3, 4)), "b": MatrixGroup(1, (10,))}
    assert target_counts(groups, sparsity) == expected


def test_uniform_on_the_matrices_of_gpt2_small_gives_spdf_s_share_exactly():
    groups = {"attn": MatrixGroup(12, (768, 768)), "up": MatrixGroup(12, (768, 3072))}
    assert target_counts(groups, 0.75, "uniform") == {"attn": 147_456, "up": 589_824}


def test_erdos_renyi_on_two_matrices_by_hand():
    # density_l = eps (n_in + n_out)/(n_in n_out), so matrix l keeps eps (n_in + n_out). Sums 16 and 24; half of 64 + 80
    # is 72 = eps (16 + 24), eps = 1.8: 28.8 and 43.2.
    groups = {"square": MatrixGroup(1, (8, 8)), "wide": MatrixGroup(1, (4, 20))}
    assert target_counts(groups, 0.5, "er") == {"square": 29, "wide": 43}


def test_every_layer_of_a_stack_counts():
    # Two 8x8 and one 4x20: 208 weights, half is 104 = eps (2 * 16 + 24), eps = 1.857: 29.71 and 44.57.
    groups = {"square": MatrixGroup(2, (8, 8)), "wide": MatrixGroup(1, (4, 20))}
    assert target_counts(groups, 0.5, "er") == {"square": 30, "wide": 45}


def test_a_matrix_that_would_exceed_one_becomes_dense_and_the_rest_is_solved_again():
    # Half of 16 + 4 + 256 = 138. First eps = 138/(8 + 5 + 32) = 3.07: 4x4 would keep 24.5 > 16 and 1x4 15.3 > 4.
    # Both dense: 138 - 20 = 118 for the 16x16.
    groups = {"small": MatrixGroup(1, (4, 4)), "row": MatrixGroup(1, (1, 4)), "large": MatrixGroup(1, (16, 16))}
    assert target_counts(groups, 0.5, "er") == {"small": 16, "row": 4, "large": 118}


def test_the_clamp_may_cascade():
    # Half of 4 + 30 + 400 = 217. Raw keeps: eps = 217/(4 + 11 + 40) = 3.95: 15.8 (of 4), 43.4 (of 30), 157.8.
    # Both dense: 183 for the 20x20. At 0.85: 65.1, eps = 65.1/55 = 1.18, the 2x2 keeps 4.7 of 4: dense; then
    # eps = 61.1/51 = 1.198: 13.2 and 47.9. At 0.66: 147.56, eps = 2.683:
    # 10.7 of 4 and 29.5; the 2x2 dense, eps = 143.56/51 = 2.815 and only now 31.0 of 30: 113.56 remain.
    groups = {"tiny": MatrixGroup(1, (2, 2)), "middle": MatrixGroup(1, (5, 6)), "large": MatrixGroup(1, (20, 20))}
    assert target_counts(groups, 0.5, "er") == {"tiny": 4, "middle": 30, "large": 183}
    assert target_counts(groups, 0.66, "er") == {"tiny": 4, "middle": 30, "large": 114}
    assert target_counts(groups, 0.85, "er") == {"tiny": 4, "middle": 13, "large": 48}


def test_erk_counts_the_kernel_axes_and_er_does_not():
    # conv 3x3x4x8 (288 weights) and matrix 16x32 (512); half is 400. ERK densities eps 18/288 and eps 48/512, so they
    # keep eps 18 and eps 48: eps = 400/66, 109.1 and 290.9. ER: densities eps 12/32 and eps 48/512, keeps eps 108 and
    # eps 48: eps = 400/156, 276.9 and 123.1.
    groups = {"conv": MatrixGroup(1, (3, 3, 4, 8)), "matrix": MatrixGroup(1, (16, 32))}
    assert target_counts(groups, 0.5, "erk") == {"conv": 109, "matrix": 291}
    assert target_counts(groups, 0.5, "er") == {"conv": 277, "matrix": 123}


@QUICK
@given(
    groups=st.dictionaries(
        st.sampled_from("abcde"),
        st.builds(MatrixGroup, st.integers(1, 4), st.tuples(st.integers(1, 40), st.integers(1, 40))),
        min_size=1,
    ),
    sparsity=st.floats(0, 0.99),
    distribution=st.sampled_from(DISTRIBUTIONS),
)
def test_counts_are_possible_and_the_total_is_right_within_rounding(groups, sparsity, distribution):
    counts = target_counts(groups, sparsity, distribution)
    assert counts.keys() == groups.keys()
    assert all(isinstance(n, int) and 0 <= n <= groups[name].size for name, n in counts.items())
    total = sum(g.count * g.size for g in groups.values())
    kept = sum(groups[name].count * n for name, n in counts.items())
    # Half a weight a matrix; ER and ERK keep at least one.
    slack = sum(g.count for g in groups.values()) * (0.5 if distribution == "uniform" else 1.0)
    assert abs(kept - (1 - sparsity) * total) <= slack + 1e-6
    if sparsity == 0:
        assert kept == total
    if distribution != "uniform":
        assert min(counts.values()) >= 1


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_sparsity_outside_its_range_is_refused_by_name(sparsity):
    with pytest.raises(InputError, match="here"):
        check_sparsity(sparsity, "here")
    with pytest.raises(InputError, match="sparsity"):
        target_counts({"w": MatrixGroup(1, (2, 2))}, sparsity)


def test_an_unknown_distribution_is_refused_by_name():
    with pytest.raises(InputError, match="'normal'"):
        target_counts({"w": MatrixGroup(1, (2, 2))}, 0.5, "normal")


def test_er_qkv_is_er_of_the_one_matrix_that_gpt2_keeps_queries_keys_and_values_in():
    """As MST's code counts: c_attn [D, 3D]."""
    rest = {"blocks/attn_o/kernel": MatrixGroup(2, (64, 64)), "blocks/mlp_up/kernel": MatrixGroup(2, (64, 256))}
    ours = rest | {f"blocks/attn_{x}/kernel": MatrixGroup(2, (64, 64)) for x in "qkv"}
    theirs = rest | {"c_attn": MatrixGroup(2, (64, 192))}
    for sparsity in (0.5, 0.9):
        counts, wanted = target_counts(ours, sparsity, "er_qkv"), target_counts(theirs, sparsity, "er")
        assert {name: counts[name] for name in rest} == {name: wanted[name] for name in rest}
        qkv = [counts[f"blocks/attn_{x}/kernel"] for x in "qkv"]
        assert len(set(qkv)) == 1
        assert sum(qkv) == pytest.approx(wanted["c_attn"], abs=1.5)  # rounded a third at a time
        assert counts["blocks/attn_o/kernel"] > qkv[0] > 0
