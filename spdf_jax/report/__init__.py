"""`report.html`: one page about a run, or about a sweep of runs, for someone who was not there.

Built only from what was recorded, so it can be written during a run and again at any time after. A page loads nothing:
figures are inline SVG in the page's own colours, mask pictures are PNG data URIs.
"""

from spdf_jax.report.run import write_report
from spdf_jax.report.sweep import write_sweep_report

__all__ = ["write_report", "write_sweep_report"]
