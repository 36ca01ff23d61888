"""Numbers and names as a reader wants them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Units, largest first; the last is for everything smaller.
FLOP_UNITS = (
    *((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")),
    (1.0, "FLOP"),
)
COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
TIME_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_FIGURE_UNITS = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1.0, ""))

#: In the place of a task: the losses of models of the caller's own, which are not of text.
OF_FIT = "spdf.fit"

COUNTED_NOTE = (
    "FLOPs saved are counted, not seconds saved. The count is what a machine that skips zeros would do; masks simulate"
    " sparsity, and masked weights are still multiplied, so wall-clock time is no measure of the saving. Runs with"
    " sparse_compute=blocks skip blocks of zeros, and save less time than FLOPs."
)

_SCORE_NAMES = {
    "bleu": "BLEU",
    "nist": "NIST",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "meteor": "METEOR",
    "ter": "TER",
    "val_loss": "validation loss",
    "acc": "accuracy",
    "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte",
}


def unit(value: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit not over `value`; the smallest for a value below all.

    >>> unit(2.5e12, FLOP_UNITS), unit(0.5, TIME_UNITS)
    ((1000000000000.0, 'TFLOP'), (1.0, 'seconds'))
    """
    return next((one for one in units if abs(value) >= one[0]), units[-1])


def digits(value: float, significant: int = 3) -> str:
    """A number to so many significant digits, never less than its whole part, without an exponent.

    >>> digits(0.01234), digits(1234.5), digits(66.5, 4)
    ('0.0123', '1,234', '66.50')
    """
    return f"{value:,.{decimals(value, significant)}f}"


def decimals(value: float, significant: int) -> int:
    """Decimals that a number needs for so many significant digits.

    >>> decimals(66.5, 4), decimals(1234.5, 3), decimals(0, 3)
    (2, 0, 0)
    """
    return max(significant - 1 - math.floor(math.log10(abs(value))), 0) if value else 0


def quantity(value: float, units: Sequence[tuple[float, str]], largest: float | None = None) -> str:
    """A large number with its unit, or in a column with that of the column's largest.

    >>> quantity(983_040, COUNT_UNITS), quantity(12, COUNT_UNITS), quantity(983_040, COUNT_UNITS, 2e6)
    ('983k', '12', '0.983M')
    """
    scale, name = unit(largest or value, units)
    return f"{digits(value / scale)}{name}" if scale > 1 else f"{value:,.0f}"


def flops(value: float, largest: float | None = None) -> str:
    """A count of FLOPs with its unit, or in a column with that of the column's largest.

    >>> flops(3.7e13), flops(3.7e13, 1.2e15)
    ('37.0 TFLOP', '0.0370 PFLOP')
    """
    scale, name = unit(largest or value, FLOP_UNITS)
    return f"{digits(value / scale)} {name}"


def reduction(ratio: float) -> str:
    """How many times fewer FLOPs: 6 % fewer must not read "1.1x", nor 0.6 % fewer as none.

    >>> reduction(1.78), reduction(1.06)
    ('1.8x', '1.06x')
    """
    return f"{ratio:.{1 if ratio >= 1.2 else 2}f}x"


def figure_text(value: float, largest: float | None = None, deviation: float = 0.0) -> str:
    """A figure of a table, with the unit and the decimals of the largest of its column, and its deviation if it has one.

    >>> figure_text(41, 142.5, 1.414), figure_text(6e14, 1e15)
    ('41.0 ± 1.4', '0.600P')
    """
    largest = largest or value
    scale, name = unit(largest, _FIGURE_UNITS)
    places = max(decimals(largest / scale, 4), decimals(value / scale, 3))
    return f"{value / scale:,.{places}f}{name}" + (f" ± {deviation / scale:.{places}f}" if deviation else "")


def capitalised(text: str) -> str:
    """A text as the beginning of a heading; only its first letter changes.

    >>> capitalised("loss of SPDF")
    'Loss of SPDF'
    """
    return text[:1].upper() + text[1:]


def percent(fraction: float) -> str:
    """A share in per cent.

    >>> percent(0.9375)
    '93.8 %'
    """
    return f"{100 * fraction:.3g} %"


def duration(seconds: float) -> str:
    """A time in its two largest units.

    >>> duration(312.4), duration(7261)
    ('5 min 12 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def count_tick(value: float, _position: float = 0) -> str:
    """A count as the label of an axis.

    >>> count_tick(400), count_tick(1500)
    ('400', '1.5k')
    """
    scale, name = unit(value, COUNT_UNITS)
    return f"{value / scale:g}{name}"


def short_name(leaf: str) -> str:
    """A leaf path without the parts that every leaf has.

    >>> short_name("blocks/attn_q/kernel/3")
    'attn_q, layer 3'
    """
    name = re.sub(r"^params/|^blocks/|/kernel(?=/|$)|/embedding(?=/|$)", "", leaf)
    return clipped(re.sub(r"/(\d+)$", r", layer \1", name))


def clipped(name: str, max_characters: int = 24) -> str:
    """The end of a name that is too long to stand in a figure.

    >>> clipped("transformer/blocks/attn_q", 10)
    '…ks/attn_q'
    """
    return name if len(name) <= max_characters else f"…{name[1 - max_characters :]}"


def when(time: str) -> str:
    """A time of `provenance.json`.

    >>> when("2026-11-30T08:00:01+00:00")
    '2026-11-30 08:00:01 UTC'
    """
    return time.replace("T", " ").replace("+00:00", " UTC")


def made_with(start: Mapping[str, Any]) -> str:
    """The versions of a start of a run.

    >>> made_with({"packages": {"spdf_jax": "0.2.0", "jax": "0.12"}, "commit": "abc", "python": "3.13.1"})
    'spdf_jax 0.2.0 at commit abc, JAX 0.12, Python 3.13.1'
    """
    ours = f"spdf_jax {start['packages']['spdf_jax']}" + (f" at commit {start['commit']}" if start["commit"] else "")
    return f"{ours}, JAX {start['packages']['jax']}, Python {start['python']}"


def score_name(key: str) -> str:
    """A score as it is written in papers.

    >>> score_name("rouge_l"), score_name("perplexity_per_byte")
    ('ROUGE-L', 'perplexity per byte')
    """
    return _SCORE_NAMES.get(key, key.replace("_", " "))


def target_name(task: str) -> str:
    """What a validation loss is over, given the task of its phase ("" for none).

    >>> target_name("restaurant")
    'the target tokens of restaurant'
    """
    return {"": "held-out text", OF_FIT: f"what {OF_FIT} was given"}.get(task, f"the target tokens of {task}")


def setting(value: Any) -> str:
    """A value of a config.

    >>> setting(True), setting("rigl"), setting([1, 2]), setting("")
    ('true', 'rigl', '[1, 2]', '""')
    """
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
