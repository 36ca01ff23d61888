"""`report.html`: one page about a run, a sweep or runs beside each other, for readers who did not run them; and its `figures/`.

Built only from what was recorded, so it can be written during a run and again at any time after. A page loads nothing and has
no script: figures are inline SVG in the page's own colours, mask pictures are PNG data URIs.

`records` reads a folder, `words` writes numbers and names, `draw` makes figures, `page` puts panels on a page, `figures` into
files. On these stand the panels of a run (`run`, `losses`, `masks`, `pictures`, `scores`), of a sweep (`sweep`, `sweep_table`,
`sweep_curves`, `sweep_cells`), of a study (`study`, from `study_records` and `intervals`) and of any runs (`compare`).
"""

from spdf_jax.report.run import write_report
from spdf_jax.report.sweep import write_sweep_report

__all__ = ["write_report", "write_sweep_report"]
