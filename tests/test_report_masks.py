"""The masks of a run: density by layer, pictures at named steps, connections counted neuron by neuron."""

import re

import numpy as np
import pytest
from report_folders import drawn, make_rows, make_run

from spdf_jax.report.losses import loss_by_step
from spdf_jax.report.masks import churn_by_step, density_by_layer, sparsity_by_step
from spdf_jax.report.pictures import mask_degrees, mask_pictures, masks_by_step
from spdf_jax.report.records import read_run
from spdf_jax.training.mask_pictures import picture_of, save_mask_picture


@pytest.fixture
def workdir(tmp_path):
    """A run under way at step 100, without pictures yet."""
    return make_run(tmp_path, last_step=100, sparse=False, rows=make_rows(100, sparse=True))


def test_one_topology_row_of_long_names_is_enough(tmp_path):
    rows = [row for row in make_rows(100, sparse=True) if "density" not in row or row["step"] == 50]
    for row in rows:
        if "density" in row:
            row["density"] = {f"{'transformer/' * 9}{leaf}": density for leaf, density in row["density"].items()}
    panel = drawn(density_by_layer, read_run(make_run(tmp_path, rows=rows, last_step=100, sparse=False)))
    assert re.search(r">…[a-z/]*/attn_q</text>", panel), "the end of a long name is shown"


@pytest.mark.parametrize("last_step", [2, 31])
@pytest.mark.parametrize("panels", [loss_by_step, sparsity_by_step, churn_by_step, density_by_layer])
def test_steps_are_numbered_at_whole_ones(panels, last_step, tmp_path):
    rows = make_rows(last_step, sparse=True)
    if last_step == 2:
        rows += [row | {"step": step} for row in make_rows(10, sparse=True) if "density" in row for step in (1, 2)]
    rows = sorted(rows, key=lambda row: row["step"])
    panel = drawn(panels, read_run(make_run(tmp_path, last_step=last_step, sparse=False, rows=rows)))
    svg = panel.partition(">step</text>")[0]
    numbers = [float(at) for at in re.findall(r"text-anchor: middle[^>]*>([\d.]+)</text>", svg)]
    assert len(numbers) > 1
    assert all(number.is_integer() for number in numbers)


def test_masks_that_do_not_change_have_no_sparsest_step(workdir):
    def columns() -> list[str]:
        return re.findall(r"<span>(.*, step \d+)</span>", drawn(mask_pictures, read_run(workdir)))

    for step in (0, 60):
        save_mask_picture(workdir, step, {"blocks/mlp_up/kernel/0": np.full((2, 2), 0.25, np.float32)})
    assert columns() == ["start, step 0", "last, step 60"]
    save_mask_picture(workdir, 100, {"blocks/mlp_up/kernel/0": np.full((2, 2), 0.5, np.float32)})
    assert columns() == ["start and sparsest, step 0", "last, step 100"]


def test_the_sparsest_step_is_the_first_of_those_as_sparse(workdir):
    """Blocks at the edge of a matrix are smaller, so that moved masks of one count have means a little apart."""
    for step, share in ((0, 1.0), (20, 0.1002), (60, 0.0998), (100, 0.1)):
        save_mask_picture(workdir, step, {"blocks/mlp_up/kernel/0": np.full((2, 2), share, np.float32)})
    assert re.findall(r"<span>(.*, step \d+)</span>", drawn(mask_pictures, read_run(workdir))) == [
        "start, step 0",
        "sparsest, step 20",
        "last, step 100",
    ]
    save_mask_picture(workdir, 0, {"blocks/mlp_up/kernel/0": np.full((2, 2), 0.1, np.float32)})
    assert "sparsest" not in drawn(mask_pictures, read_run(workdir))


def test_mask_pictures_name_their_layer(workdir):
    save_mask_picture(workdir, 0, {"wte/embedding": np.ones((2, 2), np.float32)})
    save_mask_picture(workdir, 80, {"blocks/attn_q/kernel/3": np.full((2, 2), 0.25, np.float32)})
    panel = drawn(mask_pictures, read_run(workdir))
    assert "<code>attn_q, layer 3</code>" in panel
    assert "not recorded" in panel  # at step 0, which has another matrix
    assert "25 % present" in panel


def test_masks_of_one_step_at_a_time_where_others_than_the_named_have_pictures(workdir):
    def save(step: int, share: float, leaves: int) -> None:
        pictures = {f"blocks/mlp_up/kernel/{i}": np.full((2, 2), share, np.float32) for i in range(leaves)}
        save_mask_picture(workdir, step, pictures)

    for step, share in ((0, 1.0), (20, 0.25), (100, 1.0)):
        save(step, share, 2)
    assert drawn(masks_by_step, read_run(workdir)) == ""  # start, sparsest and end are shown beside each other
    save(60, 0.5, 2)
    panel = drawn(masks_by_step, read_run(workdir))
    assert re.findall(r'value="(\d)"( checked)?>\s*<span>(\d+)</span>', panel) == [
        ("1", "", "0"),
        ("2", "", "20"),
        ("3", "", "60"),
        ("4", " checked", "100"),
    ]
    shown = re.findall(r'data-step="3">(.*?)</div>', panel, re.DOTALL)[0]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", shown) == [
        f"mlp_up, layer {i}, step 60: 50 % present" for i in range(2)
    ]
    assert len(re.findall(r":has\(input\[value=.\d.\]:checked\)", panel)) == 4


def test_degrees_are_counted_neuron_by_neuron(workdir):
    mask = np.zeros((4, 6), bool)  # 4 inputs, 6 outputs
    mask[0], mask[1, :3] = True, True
    save_mask_picture(workdir, 80, picture_of("blocks/mlp_up/kernel/0", mask))
    run = read_run(workdir)
    panel = drawn(mask_degrees, run)
    assert "in 1 to 2 of 4<br>out 0 to 6 of 6<br>2 without any" in panel
    assert "Without any weight, at the step with the most: 2 of 4 inputs of mlp_up, layer 0 (step 80)." in panel
    pictures = drawn(mask_pictures, run)
    assert pictures.count("<img src") == 2  # the mask and the scale: degrees are no pictures


def test_tokens_without_a_weight_are_counted_at_the_step_that_has_most_of_them(workdir):
    for step, dead in ((0, 0), (40, 39), (100, 3)):
        into, out = np.full(8, 50), np.full(4096, 2)  # of the embedding: a column a channel, a row a token
        out[:dead] = 0
        save_mask_picture(workdir, step, {"wte/embedding:in": into, "wte/embedding:out": out})
    assert (
        "Without any weight, at the step with the most: 39 of 4,096 tokens of wte (step 40). A token without any weight has no"
        " embedding (head tied) and the logit 0." in drawn(mask_degrees, read_run(workdir))
    )


def test_bins_of_degrees_hold_as_many_possible_degrees_each(workdir):
    degrees = np.arange(1, 18)  # each once: flat, where 20 bins would leave some empty
    save_mask_picture(workdir, 80, {"blocks/mlp_up/kernel/0:in": degrees, "blocks/mlp_up/kernel/0:out": degrees})
    flat = "M0,75" + "".join(f"V0H{100 * i / 17:.4g}" for i in range(1, 18)) + "V75"
    panel = drawn(mask_degrees, read_run(workdir))
    assert re.findall(r'<path class="\w+" d="(.*?)"/>', panel) == [flat, flat]
