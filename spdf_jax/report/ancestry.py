"""Of the page about a run: the runs that it goes on from, and what is set otherwise from each to the next."""

from markupsafe import Markup

from spdf_jax.report.draw import Table
from spdf_jax.report.page import Panel, template
from spdf_jax.report.records import Run
from spdf_jax.report.words import setting


def ancestry(run: Run) -> Panel | None:
    """A row a run; None where there is none before this one."""
    if not run.ancestors:
        return None
    lines = [
        (one["workdir"], one["step"], one["what"], [(key, *map(setting, both)) for key, both in one["changed"].items()])
        for one in run.ancestors
    ]
    rows = [(*line, *change) for *line, changed in lines for change in changed or [("", "", "")]]
    table = Table(("run", "step", "what went on from there", "setting", "there", "in the run after it"), rows)
    body = _ANCESTRY.render(lines=lines)
    return Panel("Ancestry", Markup(body), "The oldest run first.", wide=True, table=table)


_ANCESTRY = template("""\
<table class="numbers">
  <thead><tr><th>run</th><th>gone on from</th><th>set otherwise in the run after it</th></tr></thead>
  {% for workdir, step, what, changed in lines %}
  <tr><th scope="row">{{ workdir | breakable }}</th><td>its {{ what }} at step {{ "{:,}".format(step) }}</td><td>
    {% for key, there, here in changed %}
    {{ key | breakable }}: {{ there | breakable }} to {{ here | breakable }}{{ "" if loop.last else "; " }}
    {% else %}
    nothing
    {% endfor %}
  </td></tr>
  {% endfor %}
</table>
""")
