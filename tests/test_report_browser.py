"""Pages of each kind in a browser: they fit a phone and a desk, load nothing, and are drawn by day and by night."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from report_folders import (
    STEPS,
    circuit_record,
    make_circuit_sweep,
    make_exam_run,
    make_finetuned,
    make_rows,
    make_run,
    make_sweep,
    save_pictures,
    sweep_cells,
)

from spdf_jax.report import write_report, write_sweep_report
from spdf_jax.report.circuit import write_circuits
from spdf_jax.report.compare import read_runs, write_comparison
from spdf_jax.workdir import write_json

BROWSERS = (os.environ.get("CHROME", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), "")
needs_browser = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome, in PATH or at $CHROME")


def browse(page: Path, *flags: str, size: str = "1000,800") -> tuple[str, list[str]]:
    """Opens a page in a headless browser of its own profile: what it prints, and what its console says."""
    quiet = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars", "disable-sync"]
    quiet += ["disable-background-networking", "disable-component-update", f"user-data-dir={page.parent / 'profile'}"]
    command = [BROWSER, *(f"--{flag}" for flag in quiet), "--enable-logging=stderr", f"--window-size={size}", *flags]
    done = subprocess.run([*command, page.as_uri()], check=True, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]


def measured(html: str, width: int, folder: Path) -> dict:
    """What a page is like in a frame of a width.

    The width that it `needs`, its `cards`, the `smallest` text of its figures in CSS pixels, which texts of a figure `overlap`
    or are `cut` at its edge, as are commands at that of their card and cells that are hidden, what it has `loaded`, and what
    the `console` says.
    """
    script = """
      const d = frame.contentDocument, overlap = [], cut = [];
      let smallest = Infinity;
      for (const svg of d.querySelectorAll(".plot svg")) {
        const box = svg.getBoundingClientRect();
        const texts = [...svg.querySelectorAll("text")].map(text => [text, text.getBoundingClientRect()]);
        texts.forEach(([text, a], i) => {
          const m = text.getScreenCTM();
          smallest = Math.min(smallest, Math.hypot(m.a, m.b) * parseFloat(getComputedStyle(text).fontSize));
          if (a.left < box.left - 1 || a.right > box.right + 1 || a.top < box.top - 1 || a.bottom > box.bottom + 1)
            cut.push(text.textContent);
          for (const [other, b] of texts.slice(i + 1))  // boxes are higher than letters
            if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
              overlap.push(text.textContent + " / " + other.textContent);
        });
      }
      const loaded = frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
      const right = one => one.getBoundingClientRect().right;
      for (const code of d.querySelectorAll(".card > pre > code, .scroll code"))  // to be read and copied: not scrolled to
        if (right(code) > right(code.closest(".card"))) cut.push(code.textContent);
      for (const cell of d.querySelectorAll(".card > table :is(td, th)"))
        if (cell.textContent && !cell.getClientRects().length) cut.push(cell.textContent);
      const needs = d.documentElement.scrollWidth, cards = d.querySelectorAll(".card").length;
      document.title = JSON.stringify({needs, cards, smallest, overlap, cut, loaded})"""
    frame = f'<iframe id=frame style="width:{width}px;height:800px;border:0" srcdoc="{escape(html)}"></iframe>'
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f'<meta charset="utf-8"><title></title>{frame}<script>frame.onload = () => {{{script}}}</script>'
    )
    dom, console = browse(wrapper, "--dump-dom")
    (title,) = re.findall(r"<title>(.*?)</title>", dom)
    return json.loads(unescape(title)) | {"console": console}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A run or a sweep of each kind, with its page."""
    found = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    rows = [row | {"phase": "pretrain"} for row in make_rows(STEPS, sparse=False)]
    static = [row | {"sparsity": 0.75, "train_flops": 0.4 * row["dense_flops"]} for row in rows]
    make_run(found["mst"])
    make_run(found["dense"], sparse=False, rows=rows)
    make_run(found["static"], sparse=False, rows=static)
    spdf = [
        row if row["step"] <= 300 else after | {"phase": "finetune"} for row, after in zip(static, rows, strict=True)
    ]
    make_run(found["spdf"], sparse=False, rows=spdf)
    for kind in ("static", "spdf"):
        save_pictures(found[kind], 0)
    make_exam_run(found["exams"])
    make_finetuned(found["finetuned"])
    make_sweep(found["sweep"])
    write_comparison(
        read_runs([found[kind] for kind in ("mst", "dense", "static")], found["compare"]), found["compare"]
    )
    make_circuit_sweep(found["circuit_sweep"])
    write_json(found["circuits"] / "circuit.json", circuit_record())
    write_circuits(found["circuits"]).rename(found["circuits"] / "report.html")
    for kind, folder in found.items():
        if kind not in ("compare", "circuits"):
            (write_sweep_report if "sweep" in kind else write_report)(folder)
    return found


KINDS = ("mst", "dense", "static", "spdf", "finetuned", "exams", "sweep", "compare", "circuits", "circuit_sweep")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_a_phone_and_a_desk(kind, width, folders, tmp_path):
    html = (folders[kind] / "report.html").read_text()
    found = measured(html, width, tmp_path)
    assert found.pop("smallest") > 7.5
    whole = {"overlap": [], "cut": [], "loaded": [], "console": []}
    assert found == whole | {"needs": width, "cards": html.count('<section class="card')}


@pytest.mark.slow
@needs_browser
def test_masks_are_shown_of_the_step_that_is_chosen(folders, tmp_path):
    """Without a script on the page: one clicks here."""
    html = (folders["mst"] / "report.html").read_text()
    script = """
      const seen = [...document.querySelectorAll(".slider input")].map(input => {
        input.click();
        return [...document.querySelectorAll(".slider .multiples")]
            .filter(one => one.getClientRects().length).map(one => one.querySelector("figcaption").textContent);
      });
      document.title = JSON.stringify(seen)"""
    page = tmp_path / "page.html"
    page.write_text(html.replace("</body>", f"<script>{script}</script></body>"))
    dom, console = browse(page, "--dump-dom")
    seen = json.loads(unescape(re.findall(r"<title>(.*?)</title>", dom)[0]))
    assert not console
    assert [len(captions) for captions in seen] == [1] * 6
    assert [re.findall(r", step ([\d,]+): ", captions[0])[0] for captions in seen] == [
        str(s) for s in range(0, 401, 80)
    ]


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("kind", ["mst", "sweep", "compare"])
def test_curves_are_looked_at_closer(kind, folders, tmp_path):
    """The pointer over a point shows its values, the wheel zooms, and each scale is a click away."""
    pytest.importorskip("bokeh")
    assert 'href="curves.html"' in (folders[kind] / "report.html").read_text()
    html = (folders[kind] / "curves.html").read_text()
    assert len(html) < 3_000_000
    script = """
      const wait = ms => new Promise(done => setTimeout(done, ms));
      const every = (root, selector) => [...root.querySelectorAll("*")].flatMap(one =>
        [...(one.matches(selector) ? [one] : []), ...(one.shadowRoot ? every(one.shadowRoot, selector) : [])]);
      (async () => {
        while (!Bokeh.documents[0]?.is_idle) await wait(50);
        const models = [...Bokeh.documents[0]._all_models.values()];
        const plot = models.find(one => one.type == "Figure"), view = Bokeh.index.find_one(plot);
        const source = plot.renderers.at(-1).data_source, x = source.get_column("x")[2], y = source.get_column("y")[2];
        const events = view.canvas_view.events_el, box = events.getBoundingClientRect();
        const at = {clientX: box.left + view.frame.x_scale.compute(x), clientY: box.top + view.frame.y_scale.compute(y),
                    bubbles: true, composed: true, pointerType: "mouse", isPrimary: true, pointerId: 1};
        for (const kind of ["pointerenter", "pointerover", "pointermove"]) events.dispatchEvent(new PointerEvent(kind, at));
        await wait(300);
        const values = every(document, ".bk-tooltip-row-value").map(one => one.textContent);
        const width = plot.x_range.end - plot.x_range.start;
        events.dispatchEvent(new WheelEvent("wheel", {...at, deltaY: -200}));
        await wait(300);
        const zoomed = (plot.x_range.end - plot.x_range.start) / width;
        models.find(one => one.type == "Tabs").active = 2;
        await wait(300);
        const scales = models.filter(one => one.type == "Figure").slice(0, 3).map(one => one.x_scale.type + one.y_scale.type);
        const key = models.find(one => one.type == "Legend").items.flatMap(one => one.get_labels_list_from_label_prop());
        const stepped = models.filter(one => one.type == "Step").map(one => one.mode);
        const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
        document.title = JSON.stringify({x, y, values, zoomed, scales, loaded, key, stepped});
      })()"""
    page = tmp_path / "page.html"
    page.write_text(html.replace("</body>", f"<script>{script}</script></body>"))
    dom, console = browse(page, "--dump-dom", "--virtual-time-budget=30000")
    found = json.loads(unescape(re.findall(r"<title>(.*?)</title>", dom)[0]))
    assert not [line for line in console if "[bokeh " not in line]
    values = {value.strip().replace(",", "") for value in found["values"]}
    assert {f"{found[axis]:.4f}".rstrip("0").rstrip(".") for axis in "xy"} <= values
    assert found["zoomed"] < 0.9
    names = {"mst": ["training", "validation"], "sweep": list(sweep_cells())[:3]}
    assert found["key"] == names.get(kind, [folders[name].name for name in ("mst", "dense", "static")])
    assert ("before" in found["stepped"]) == (kind == "mst")  # sparsity changes at a step, not on the way to it
    assert found["scales"] == ["LinearScaleLinearScale", "LogScaleLinearScale", "LogScaleLogScale"]
    assert found["loaded"] == []


@pytest.mark.slow
@needs_browser
def test_what_does_not_fit_is_noticed(folders, tmp_path):
    html = (folders["mst"] / "report.html").read_text()
    assert ">200<" in html
    html = html.replace(">200<", f">{'200 ' * 60}<", 1)  # the label of a tick
    bad = '<div style="width: 1500px"><img src="http://127.0.0.1:9/a.png"></div><script>nothing()</script><main'
    bad = bad.replace("<main", f"<div class=card><div class=scroll><code>{'x' * 300}</code></div></div><main")
    bad = bad.replace(
        "<main", "<div class=card><table><tr><td style='display: none'>hidden</td></tr></table></div><main"
    )
    found = measured(html.replace("<main", bad), 1280, tmp_path)
    assert found["needs"] > 1500
    assert found["loaded"] == ["http://127.0.0.1:9/a.png"]
    assert "nothing is not defined" in "".join(found["console"])
    assert found["overlap"]
    assert {"x" * 300, "hidden"} < set(found["cut"])


@pytest.mark.slow
@needs_browser
def test_a_page_is_drawn_by_day_and_by_night(folders, tmp_path):
    page = folders["sweep"] / "report.html"
    means = {}
    for scheme, flag in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{scheme}.png"
        browse(page, f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={flag}", size="1000,1600")
        pixels = imread(picture)[..., :3]
        means[scheme] = pixels.mean()
        # Text, lines and the colours of the series, not one flat sheet.
        assert len(np.unique((pixels * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 200
        blue = np.abs(pixels - np.array([0x3B, 0x82, 0xC4]) / 255).max(axis=-1) < 0.02
        assert blue.sum() > 200
    assert means["light"] > 0.9
    assert means["dark"] < 0.2
