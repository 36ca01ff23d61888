"""Cold start: what first updates of regrown weights cost, by beta2 and by what their optimiser state starts from.

Claim   under a global step count a weight that grows back with zero moments is updated up to 6.6 times too far with
        beta2 = 0.999, and 1.1 times with 0.95; with a step count and a warm-up of its own it is not (SMET, ICML 2026,
        arXiv 2606.00888).
Source  `spdf.adam_overshoot` for a constant gradient. Arms: `reset` zeroes the moments; `keep` leaves the moments of dropped
        weights to decay and uses them again; `smet` zeroes them and counts each weight's own steps. W = 100 with topology
        steps every 100 steps in SMET; here W = 25 with every 25.
Command python experiments/cold_start.py --workdir runs/cold_start      (all nine cells, then comparison.md, .json, .svg;
                                                                         goes on where it was stopped, cell by cell)
        python -m spdf_jax.main --config experiments/cold_start.py:b999_smet      (one cell as an ordinary run)

        2 layers x 128, context 128, vocabulary 1024: 0.5M parameters; RigL at 80 %, 500 steps x 16 x 128 = 1.0M tokens a
        cell; about a minute a cell on 2 CPU cores.

Result  seed 0, 2 CPU cores, jax 0.10: update of weights that just grew / update of weights never dropped, at its largest
        beta2   reset  keep  smet
        0.95    2.00   1.88  1.01
        0.99    4.03   2.95  0.94
        0.999   5.91   3.82  0.86
        Oversized as claimed, and SMET's Adam cures it; with real, noisy gradients at the first update and not the twelfth.
        No benefit for the loss at this size: validation loss at 0.999 is 3.979, 3.986, 4.004 (seed 1: reset 3.969, smet
        3.988), at 0.95 4.052, 4.050, 4.025. In `smet` the initial weights warm up too, 25 steps.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

import spdf_jax as spdf

BETA2 = {"b95": 0.95, "b99": 0.99, "b999": 0.999}
ARMS = ("reset", "keep", "smet")
VARIANTS = tuple(f"{b}_{arm}" for b in BETA2 for arm in ARMS)
UPDATE_EVERY_STEPS = 25
#: Growth is followed from here on: the global bias correction is spent for b95 and b99, and mostly so for b999.
FOLLOW_FROM_STEP = 200


def get_config(variant="b999_smet"):
    c = spdf.default_config("cold_start", variant or "b999_smet", variants=VARIANTS)
    beta2, arm = c.variant.split("_")
    c.model.n_layer, c.model.n_head, c.model.d_model, c.model.context, c.model.vocab_size = 2, 4, 128, 128, 1024
    c.data.tokenizer_vocab_size = 1024
    c.mesh.data = 1
    c.pretrain.steps = 500
    c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = "rigl", 0.8
    c.pretrain.sparsity.update_every_steps, c.pretrain.sparsity.stop_fraction = UPDATE_EVERY_STEPS, 0.9
    optimizer = c.pretrain.optimizer
    optimizer.peak_learning_rate, optimizer.warmup_steps = 3e-3, 50
    optimizer.beta2, optimizer.regrowth = BETA2[beta2], arm
    if arm == "smet":
        optimizer.regrowth_warmup_steps = UPDATE_EVERY_STEPS
    c.loop.eval_every_steps = 250
    return c


def run_cell(config):
    """Trains one cell in memory and returns its losses and the size of updates by steps since growth.

    Sizes are root mean squares of update / learning rate: of the weights that grew k updates ago, for k = 1, 2, ... up to
    the next topology step, and of the weights that were active all along.
    """
    losses, val_losses, topology_steps = [], {}, []
    squares, counts = np.zeros(UPDATE_EVERY_STEPS), np.zeros(UPDATE_EVERY_STEPS)
    established_squares = established_count = 0
    states = spdf.watch_training(config)
    state, _ = next(states)
    mask, never = flat(state.masks, state.masks), 1 << 30
    age = np.where(mask, never, 0)  # updates since a weight grew; the first ones never did
    weights = None
    for step, (state, metrics) in enumerate(states, start=1):
        old_weights, old_mask = weights, mask
        weights = flat(state.params, state.masks) if step >= FOLLOW_FROM_STEP else None
        if "churn" in metrics:
            topology_steps.append(step)
            mask = flat(state.masks, state.masks)
            age[mask & ~old_mask] = 0
        else:
            if old_weights is not None:
                ages = age[mask]
                size = ((weights[mask] - old_weights[mask]) / metrics["learning_rate"]) ** 2
                young, old = ages < UPDATE_EVERY_STEPS, ages >= never
                squares += np.bincount(ages[young], size[young], UPDATE_EVERY_STEPS)
                counts += np.bincount(ages[young], minlength=UPDATE_EVERY_STEPS)
                established_squares += size[old].sum(dtype=np.float64)
                established_count += old.sum()
            age[mask] += 1
        losses.append(float(metrics["loss"]))
        if "val_loss" in metrics:
            val_losses[step] = metrics["val_loss"]
    sizes = np.sqrt(squares / np.maximum(counts, 1))[: UPDATE_EVERY_STEPS - 1]
    return {
        "losses": losses,
        "val_losses": val_losses,
        "topology_steps": topology_steps,
        "regrown_update_rms": sizes.tolist(),
        "established_update_rms": float(np.sqrt(established_squares / established_count)),
    }


def flat(tree, masks):
    """The leaves of the sparse tensors as one vector of the host."""
    return np.concatenate(
        [np.ravel(x) for x, m in zip(jax.tree.leaves(tree), jax.tree.leaves(masks), strict=True) if m.ndim]
    )


def without_batches(cells):
    """The cells with the nine cells' mean loss at each step taken off: all see the same batches, whose noise goes with it."""
    mean = np.mean([cell["losses"] for cell in cells.values()], axis=0)
    return {variant: cell | {"losses": (np.array(cell["losses"]) - mean).tolist()} for variant, cell in cells.items()}


def loss_around(cell, before=5, after=20):
    """Training loss by steps from a topology step, less its mean over the steps just before; mean over topology steps."""
    losses = np.array(cell["losses"])
    steps = [s for s in cell["topology_steps"] if s > FOLLOW_FROM_STEP and s + after <= len(losses)]
    windows = np.array([losses[s - before : s + after] for s in steps])  # index s is the first step after it
    return (windows.mean(0) - windows[:, :before].mean()).tolist()


def summarise(variant, cell, relative):
    """One row of the table."""
    sizes, established = np.array(cell["regrown_update_rms"]), cell["established_update_rms"]
    steps = np.arange(1, len(sizes) + 1)
    beta2 = BETA2[variant.split("_")[0]]
    return {
        "beta2": beta2,
        "arm": variant.split("_")[1],
        "val_loss": list(cell["val_losses"].values())[-1],
        "train_loss_last_50": float(np.mean(cell["losses"][-50:])),
        "update_rms_established": established,
        "update_rms_first": float(sizes[0]),
        "update_rms_peak": float(sizes.max()),
        "peak_at_step": int(sizes.argmax()) + 1,
        "peak_over_established": float(sizes.max() / established),
        "analytic_peak": float(spdf.adam_overshoot(0.9, beta2, steps).max()),
        "loss_rise_after_topology": float(np.mean(loss_around(relative)[5:15])),
    }


def write_comparison(workdir, cells):
    """comparison.json, comparison.md and comparison.svg."""
    relative = without_batches(cells)
    rows = [summarise(variant, cell, relative[variant]) for variant, cell in cells.items()]
    (workdir / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n")
    text = [
        "| beta2 | arm | validation loss | training loss, last 50 | first update | largest update (at step) | established "
        "weights | largest / established | constant gradient, reset | loss rise, 10 steps after topology, against all cells |",
        "|" + "---|" * 10,
    ]
    text += [
        f"| {r['beta2']} | {r['arm']} | {r['val_loss']:.4f} | {r['train_loss_last_50']:.4f} | {r['update_rms_first']:.3f} "
        f"| {r['update_rms_peak']:.3f} ({r['peak_at_step']}) | {r['update_rms_established']:.3f} "
        f"| {r['peak_over_established']:.2f} | {r['analytic_peak']:.2f} | {r['loss_rise_after_topology']:+.4f} |"
        for r in rows
    ]
    text.append("\nUpdates are root mean squares of update / learning rate, over all growth from step 200 on.")
    (workdir / "comparison.md").write_text("\n".join(text) + "\n")
    plot(workdir / "comparison.svg", cells, relative)
    print("\n".join(text))


def plot(path, cells, relative):
    """Size of updates since growth, and loss around topology steps: a column a beta2, a line an arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, len(BETA2), figsize=(13, 10), sharey="row", layout="constrained")
    window = np.full(UPDATE_EVERY_STEPS, 1 / UPDATE_EVERY_STEPS)
    for column, (name, beta2) in zip(axes.T, BETA2.items(), strict=True):
        for arm, colour in zip(ARMS, ("tab:red", "tab:blue", "tab:green"), strict=True):
            cell = cells[f"{name}_{arm}"]
            sizes = np.array(cell["regrown_update_rms"]) / cell["established_update_rms"]
            column[0].plot(range(1, len(sizes) + 1), sizes, label=arm, color=colour)
            around = loss_around(relative[f"{name}_{arm}"])
            column[1].plot(range(-5, len(around) - 5), around, label=arm, color=colour)
            smooth = np.convolve(relative[f"{name}_{arm}"]["losses"], window, "valid")
            column[2].plot(UPDATE_EVERY_STEPS + np.arange(len(smooth)), smooth, label=arm, color=colour)
        steps = np.arange(1, UPDATE_EVERY_STEPS)
        overshoot = spdf.adam_overshoot(0.9, beta2, steps)
        column[0].plot(steps, overshoot, "k:", label="reset, constant gradient (analytic)")
        column[0].set(title=f"beta2 = {beta2}", xlabel="updates since growth")
        column[1].axvline(-0.5, color="grey", lw=0.8)
        column[1].set(xlabel="steps from a topology step")
        column[2].set(xlabel="step")
    against = "training loss\nagainst all cells"
    labels = ("update of regrown / established", f"{against}, change (nats)", f"{against} (nats)")
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/cold_start"))
    parser.add_argument(
        "--cells", nargs="*", choices=VARIANTS, default=VARIANTS, help="run only these, compare nothing"
    )
    options = parser.parse_args(arguments)
    options.workdir.mkdir(parents=True, exist_ok=True)
    cells = {}
    for variant in options.cells:
        config = spdf.resolve(get_config(variant))
        path = options.workdir / f"{variant}.json"
        record = json.loads(path.read_text()) if path.exists() else None
        if record is None or record["config"] != config.as_dict():
            print(f"training {variant}", flush=True)
            record = {"config": config.as_dict(), "cell": run_cell(config)}
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(record))
            unfinished.replace(path)
        cells[variant] = record["cell"]
    if set(cells) == set(VARIANTS):
        write_comparison(options.workdir, cells)


if __name__ == "__main__":
    main()
