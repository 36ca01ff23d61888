"""The invariant: whatever the optimiser does, a masked weight is exactly zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import OPTIMIZERS, UNWRAPPED, problem

from spdf_jax.errors import InputError
from spdf_jax.sparsity.masks import dense_masks
from spdf_jax.sparsity.transforms import sparse


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_are_exactly_zero_after_every_step_even_when_the_mask_moves(name):
    params, masks, grads = problem()
    tx = sparse(OPTIMIZERS[name]())
    state = tx.init(params)

    @jax.jit
    def update(params, state, grads, masks):
        updates, state = tx.update(grads, state, params, masks=masks)
        return optax.apply_updates(params, updates), state

    seen = []
    for i in range(6):
        if i == 3:  # Moments of weights masked only now are not zero.
            masks = {**masks, "w": ~masks["w"]}
        params, state = update(params, state, grads(i), masks)
        inactive = ~np.asarray(masks["w"])
        assert inactive.sum() > 10
        np.testing.assert_array_equal(np.asarray(params["w"])[inactive], 0.0)
        seen.append(np.asarray(params["w"])[~inactive])
    assert np.isfinite(np.concatenate(seen)).all()
    assert (seen[5] != 0).all()
    assert (seen[5] != seen[3]).all()


@pytest.mark.parametrize("name", UNWRAPPED)
@pytest.mark.parametrize("masks_of", [dense_masks, lambda p: jax.tree.map(lambda x: jnp.ones(x.shape, bool), p)])
def test_all_true_masks_change_nothing(name, masks_of):
    params, _, grads = problem()
    plain, wrapped = OPTIMIZERS[name](), sparse(OPTIMIZERS[name]())
    updates, state = plain.update(grads(0), plain.init(params), params)
    ours, our_state = wrapped.update(grads(0), wrapped.init(params), params, masks=masks_of(params))
    assert jax.tree.structure(our_state) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, (ours, our_state), (updates, state))
    assert bool((ours["w"] != 0).all())


def test_masks_are_required_by_keyword():
    params, masks, grads = problem()
    tx = sparse(optax.adam(0.1))
    with pytest.raises(TypeError, match="masks"):
        tx.update(grads(0), tx.init(params), params)
    with pytest.raises(TypeError):
        tx.update(grads(0), tx.init(params), params, masks)


def test_params_are_required_and_masks_must_fit_them():
    params, masks, grads = problem()
    tx = sparse(optax.sgd(0.1))
    with pytest.raises(InputError, match="needs params"):
        tx.update(grads(0), tx.init(params), masks=masks)
    with pytest.raises(InputError, match="tree structure"):
        tx.update(grads(0), tx.init(params), params, masks={"w": masks["w"]})
    with pytest.raises(InputError, match=r"\(1, 8\).*\(6, 8\)"):
        tx.update(grads(0), tx.init(params), params, masks={**masks, "w": masks["w"][:1]})


def test_clipping_sees_masked_gradients_and_nan_there_does_no_harm():
    params, masks = {"w": jnp.zeros(4)}, {"w": jnp.array([True, True, False, False])}
    tx = sparse(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    state = tx.init(params)

    def update(*grads):
        return tx.update({"w": jnp.array(grads)}, state, params, masks=masks)[0]["w"].tolist()

    # Norm of the active part 0.5: not clipped, however large the masked part.
    assert update(0.3, 0.4, 1e6, -1e6) == pytest.approx([-0.3, -0.4, 0.0, 0.0])
    assert update(0.3, 0.4, np.nan, np.inf) == pytest.approx([-0.3, -0.4, 0.0, 0.0])
    # Norm 5: scaled to 1.
    assert update(3.0, 4.0, 7.0, 7.0) == pytest.approx([-0.6, -0.8, 0.0, 0.0])


def test_other_keyword_extras_reach_the_inner_transformation():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    params, masks, grads = problem()
    tx = sparse(optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update))
    tx.update(grads(0), tx.init(params), params, masks=masks, value=3.0)
    assert seen["value"] == 3.0
    assert seen["masks"] is masks


@pytest.mark.parametrize("grad_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_are_exact_in_mixed_precision(param_dtype, grad_dtype):
    params = {"w": jnp.array([1 / 3, 0.1, -1 / 7, 2.0], param_dtype)}
    masks = {"w": jnp.array([False, False, False, True])}
    tx = sparse(optax.sgd(0.5))
    updates, _ = tx.update({"w": jnp.ones(4, grad_dtype)}, tx.init(params), params, masks=masks)
    after = optax.apply_updates(params, updates)["w"]
    assert after.dtype == param_dtype
    assert after.tolist() == [0.0, 0.0, 0.0, 1.5]
