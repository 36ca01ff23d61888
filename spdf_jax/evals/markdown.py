"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], alignment: str, rows: Sequence[Sequence[str | int]]) -> str:
    """A Markdown table.

    Args:
      header: names of the columns.
      alignment: an l or r for each column.
      rows: the cells of each.

    Returns:
      Lines without one at the end.

    >>> print(markdown_table(("task", "n"), "lr", [("ptb", 1)]))
    | task | n |
    | --- | ---: |
    | ptb | 1 |
    """
    rule = ["---" if side == "l" else "---:" for side in alignment]
    cells = [[" ".join(str(cell).split()).replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *cells))
