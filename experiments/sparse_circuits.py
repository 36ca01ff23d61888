"""Weight-sparse models of Python and dense ones of equal loss: how few nodes close a quote, a bracket or a call in each?

Claim   Gao et al. 2025: circuits of weight-sparse models are about 16 times smaller than those of a dense model of equal loss.
        Here, for closing a bracket: 15 nodes against 210 at a validation loss of 4.16 and 4.13, 38 against 194 at 3.92.
Source  arXiv 2511.13653, github.com/openai/circuit_sparsity. Theirs are heads 16 wide, context 256, a vocabulary of 2048, RMS
        norm, a quarter of the channels kept at each place (AbsTopK), the largest weights kept after every step, from dense to
        the target over the first half. Width, depth, length, densities and rates are ours.
Command python -m spdf_jax.main --config experiments/sparse_circuits.py
        python -m spdf_jax.main --config experiments/sparse_circuits.py --job report   (the page again)

mini    2 layers x 128: 0.9M parameters, of which 1/4, 1/8 or 1/16 are not 0; 3,000 steps x 16 x 128 = 6.1M tokens of the
        embedded corpus. Dense models of the same shape, without AbsTopK, take 350, 600 or 1,000 steps, each with a schedule of
        its own: the page puts each sparse model beside the dense one whose validation loss is nearest. Circuits of every task
        that the vocabulary has the tokens of, at 0.4 nats: so small a model does not reach the paper's 0.15.
small   4 layers x 512: 14.7M parameters, of which 1/16, 1/64 or 1/256 are not 0; 10,000 steps x 64 x 256 = 164M tokens; dense
        ones 625, 1250 or 2500 steps; at 0.15 nats. For an accelerator: not run.
"""

import spdf_jax as spdf
from spdf_jax.config import recipes

VARIANTS = ("mini", "small")
PLACES = ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out")
#: Layers, width, context, sequences a step, the loss at which a task counts as done.
SIZES = {"mini": (2, 128, 128, 16, 0.4), "small": (4, 512, 256, 64, 0.15)}
#: Steps of the sparse models, their densities as 1 / n, and the dense models' steps.
RUNS = {"mini": (3000, (4, 8, 16), (350, 600, 1000)), "small": (10_000, (16, 64, 256), (625, 1250, 2500))}
TASKS = ("quote", "bracket", "call_depth", "set_or_string")
COLUMNS = (
    ("validation loss", "summary.val_loss", ".3f", True),
    *((f"nodes: {task}", f"circuit.{task}.nodes", ".0f", True) for task in TASKS),
)


def get_config(variant="mini"):
    variant = variant or "mini"
    steps, densities, lengths = RUNS.get(variant, RUNS["mini"])
    cells, rows = {}, []
    for inverse in densities:
        cells[f"sparse_{inverse}"] = run(variant, steps, inverse)
        rows.append((f"1/{inverse} of the weights", (("", f"sparse_{inverse}"),)))
    for length in lengths:
        cells[f"dense_{length}"] = run(variant, length, 1)
        rows.append((f"dense, {length} steps", (("", f"dense_{length}"),)))
    return spdf.sweep_config(
        "sparse_circuits",
        variant,
        variants=VARIANTS,
        title="Circuits of weight-sparse and dense models of Python",
        cells=cells,
        rows=rows,
        columns=COLUMNS,
        remark="-: the model does not do the task at the target loss, so there is no circuit to be found.",
    )


def run(variant, steps, inverse):
    c = spdf.default_config("sparse_circuits", variant, variants=VARIANTS)
    n_layer, d_model, context, batch_size, target_loss = SIZES.get(variant, SIZES["mini"])
    model, phase = c.model, c.pretrain
    model.n_layer, model.d_model, model.n_head, model.d_head = n_layer, d_model, d_model // 16, 16
    model.context, model.vocab_size, model.norm, model.tied_head = context, 2048, "rms_norm", False
    c.data.tokenizer_vocab_size = 2048
    phase.steps, phase.batch_size = steps, batch_size
    phase.optimizer.peak_learning_rate, phase.optimizer.warmup_steps = 3e-3, min(50, steps // 4)
    phase.optimizer.clip_norm, phase.optimizer.clip_rms = 0.0, 1.0
    c.loop.eval_every_steps = c.loop.checkpoint_every_steps = max(steps // 4, 1)
    c.circuit.tasks, c.circuit.target_loss = TASKS, target_loss
    if inverse > 1:
        phase.optimizer.peak_learning_rate = 1e-2  # sparser models want more
        model.activation_topk = ",".join(f"{place}=0.25" for place in PLACES)
        phase.sparsity.rule, phase.sparsity.sparsity, phase.sparsity.leaves = "topk", 1 - 1 / inverse, "all"
        phase.sparsity.schedule, phase.sparsity.ramp_end, phase.sparsity.floor_per_neuron = "linear", 0.5, 1
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
