"""Of the page about a run: its command, and what it sets."""

import json

from markupsafe import Markup

from spdf_jax.report.page import Panel, command_panel, template
from spdf_jax.report.records import Run, changed_settings


def run_again(run: Run) -> Panel | None:
    """The command of the run or, for one started from Python, the lines that repeat it; None where nothing recorded can."""
    if not run.loss_unit:
        return None
    seed = f"Seed {run.config['seed']}. " if "seed" in run.config else ""
    found = "finds this run and has nothing left to do" if run.is_finished else "goes on with this run"
    remark = f"{seed}In its own workdir the command {found}: give another --workdir to begin anew."
    if command := run.config.get("command"):
        return command_panel(command, remark)
    command = (
        "from pathlib import Path\nfrom spdf_jax.config.read import load_config\nfrom spdf_jax.jobs.train import train\n\n"
        'train(load_config(Path("config.json")), Path("again"))'
    )
    return command_panel(command, f"{seed}In Python, from the config.json beside this page.")


def settings(run: Run) -> Panel:
    """Every setting that is not at its default, and the whole config, folded."""
    changed = changed_settings(run.config)
    config = json.dumps(run.config, indent=2, ensure_ascii=False)
    body = _SETTINGS.render(changed=changed, config=config)
    return Panel("Settings", Markup(body), "What this run sets; everything else is at its default.", wide=True)


_SETTINGS = template("""\
{% if changed %}
<table class="numbers">
  <thead><tr><th>setting</th><th>here</th><th>default</th></tr></thead>
  {% for key, value, default in changed %}
  <tr><th scope="row">{{ key | breakable }}</th><td>{{ value | breakable }}</td><td>{{ default }}</td></tr>
  {% endfor %}
</table>
{% endif %}
<details><summary>Resolved config</summary><pre><code>{{ config }}</code></pre></details>
""")
