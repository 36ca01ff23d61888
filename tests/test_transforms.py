"""The invariant: whatever the optimiser does, a masked weight is exactly zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from optimizers import OPTIMIZERS, UNWRAPPED, compiled, problem

from spdf_jax.errors import InputError
from spdf_jax.sparsity.masks import dense_masks
from spdf_jax.sparsity.regrowth import reset_masked_state
from spdf_jax.sparsity.transforms import sparse


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_are_exactly_zero_after_every_step_even_when_the_mask_moves(name):
    params, masks, grads = problem()
    tx = compiled(sparse(OPTIMIZERS[name]()))
    state, add = tx.init(params), jax.jit(optax.apply_updates)
    seen = []
    for i in range(6):
        if i == 3:  # Moments of weights masked only now are not zero.
            masks = {**masks, "w": ~masks["w"]}
        updates, state = tx.update(grads(i), state, params, masks=masks)
        params = add(params, updates)
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
    with pytest.raises(TypeError, match=r"missing 1 required keyword-only argument: 'masks'.*apply_gradients"):
        tx.update(grads(0), tx.init(params), params)
    with pytest.raises(TypeError):
        tx.update(grads(0), tx.init(params), params, masks)


def test_what_flax_train_state_cannot_pass_on_is_said_and_can_be_done_by_hand():
    params, masks, grads = problem()
    state = TrainState.create(apply_fn=None, params=params, tx=sparse(optax.adam(0.1)))
    with pytest.raises(
        TypeError, match=r"call state\.tx\.update\(grads, state\.opt_state, state\.params, masks=masks\)"
    ):
        state.apply_gradients(grads=grads(0))
    updates, opt_state = state.tx.update(grads(0), state.opt_state, state.params, masks=masks)
    state = state.replace(step=state.step + 1, opt_state=opt_state, params=optax.apply_updates(state.params, updates))
    assert not np.asarray(state.params["w"])[~np.asarray(masks["w"])].any()


def test_params_are_required_and_masks_must_fit_them():
    params, masks, grads = problem()
    tx = sparse(optax.sgd(0.1))
    with pytest.raises(InputError, match="needs params"):
        tx.update(grads(0), tx.init(params), masks=masks)
    with pytest.raises(InputError, match="tree structure"):
        tx.update(grads(0), tx.init(params), params, masks={"w": masks["w"]})
    with pytest.raises(InputError, match=r"w has a mask of shape \(1, 8\).*\(6, 8\)"):
        tx.update(grads(0), tx.init(params), params, masks={**masks, "w": masks["w"][:1]})
    with pytest.raises(InputError, match=r"masks: b is True, not an array of bool; jnp\.array\(True\)"):
        tx.update(grads(0), tx.init(params), params, masks={**masks, "b": True})
    with pytest.raises(InputError, match="masks: w is an array of float32, not an array of bool"):
        tx.update(grads(0), tx.init(params), params, masks={**masks, "w": masks["w"].astype(jnp.float32)})
    with pytest.raises(InputError, match=r"gradients must have the tree structure.*missing \['b'\]"):
        tx.update({"w": grads(0)["w"]}, tx.init(params), params, masks=masks)


@pytest.mark.parametrize(
    "around",
    [
        lambda tx, **k: optax.masked(tx, {"w": True, "b": False}, **k),
        lambda tx, **k: optax.partition({"a": tx, "s": optax.sgd(0.1)}, {"w": "a", "b": "s"}, **k),
    ],
)
def test_sparse_inside_a_part_of_the_tree_is_told_how(around):
    params, masks, grads = problem()
    tx = around(sparse(optax.adam(0.1)))
    with pytest.raises(InputError, match=r"sparse\(optax\.partition.*mask_compatible_extra_args=True"):
        tx.update(grads(0), tx.init(params), params, masks=masks)
    tx = around(sparse(optax.adam(0.1)), mask_compatible_extra_args=True)
    updates, _ = tx.update(grads(0), tx.init(params), params, masks=masks)
    assert not np.asarray(optax.apply_updates(params, updates)["w"])[~np.asarray(masks["w"])].any()


@pytest.mark.parametrize("reset", [True, False])
def test_evaluation_parameters_of_schedule_free_are_zero_where_masked(reset):
    """However the state came to hold other values there: made from unmasked parameters, or masks moved without a reset."""
    params, masks, grads = problem()
    tx = sparse(optax.contrib.schedule_free_sgd(0.1))
    state = tx.init(params)
    for i in range(4):
        if i == 2:
            masks = {**masks, "w": ~masks["w"]}
            state = reset_masked_state(tx, state, params, masks) if reset else state
        updates, state = tx.update(grads(i), state, params, masks=masks)
        params = optax.apply_updates(params, updates)
        shown = np.asarray(optax.contrib.schedule_free_eval_params(state, params)["w"])
        assert not shown[~np.asarray(masks["w"])].any()
        assert i < 1 or (shown[np.asarray(masks["w"])] != 0).all()


def test_what_diverges_where_weights_grow_is_refused_and_goes_on_with_masks_that_stay():
    params, masks, grads = problem()
    with pytest.raises(InputError, match=r"scale_by_acprop, .* divides by .* one of w that grows.*moving=False"):
        jax.jit(sparse(optax.contrib.acprop(0.1)).update)(
            grads(0), optax.contrib.acprop(0.1).init(params), params, masks=masks
        )
    tx = sparse(optax.contrib.acprop(0.1), moving=False)
    updates, _ = tx.update(grads(0), tx.init(params), params, masks=masks)
    assert (np.asarray(updates["w"])[np.asarray(masks["w"])] != 0).all()


def test_line_searches_and_sam_see_the_loss_and_the_gradient_under_the_masks():
    """A linear loss with a huge slope at masked weights, which must not count."""
    params, masks = {"w": jnp.array([1.0, 5.0])}, {"w": jnp.array([True, False])}
    seen = []

    def loss(p):
        return jnp.sum(p["w"] * jnp.array([1.0, 1e6])) + 3

    search = optax.scale_by_backtracking_linesearch(10, store_grad=True)
    tx = sparse(optax.chain(optax.sgd(1.0), search), moving=False)
    state, grads = tx.init(params), jax.grad(loss)(params)
    updates, state = tx.update(
        grads, state, params, masks=masks, value=loss({"w": jnp.array([1.0, 0.0])}), grad=grads, value_fn=loss
    )
    assert updates["w"].tolist() == [-1.0, -5.0]
    assert float(state[1].value) == 3.0  # at 0, 0; the masked weight's 5e6 was never in it
    assert state[1].grad["w"].tolist() == [1.0, 1e6]  # dense, as topology steps want it

    def gradient(p, step):
        seen.append(p["w"].tolist())
        return jax.grad(loss)(p)

    sam = sparse(
        optax.contrib.sam(optax.sgd(1.0), optax.chain(optax.contrib.normalize(), optax.sgd(0.1)), opaque_mode=True)
    )
    updates, _ = sam.update(grads, sam.init(params), params, masks=masks, grad_fn=gradient)
    assert seen[-1] == pytest.approx([1.1, 0.0])
    assert updates["w"].tolist() == [-1.0, -5.0]


def test_updates_of_another_shape_are_refused_not_broadcast():
    params, masks, grads = problem()
    tx = sparse(optax.stateless(lambda u, _: {**u, "w": u["w"].sum()}))
    with pytest.raises(InputError, match=r"updates of .*have shape \(\) for w, a weight of shape \(6, 8\)"):
        tx.update(grads(0), tx.init(params), params, masks=masks)


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
