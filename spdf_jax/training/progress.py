"""What a run says on the terminal as it goes: one line that moves, or a line now and then for logs and pipes."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class Progress:
    """No progress, only messages; also the interface of the two below."""

    def log(self, row: Mapping[str, Any]) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def message(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class _Bar(Progress):
    """One tqdm line on a terminal."""

    def __init__(self, resume_step: int, total_steps: int) -> None:
        layout = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} | {remaining} left{desc}"
        how: dict[str, Any] = {"bar_format": layout, "dynamic_ncols": True, "miniters": 1, "file": sys.stdout}
        self._bar = tqdm(total=total_steps, initial=resume_step, **how)

    def log(self, row: Mapping[str, Any]) -> None:
        if "loss" in row:
            self._bar.set_description_str(f" | {_train_text(row)}", refresh=False)
        elif "val_loss" in row:
            self.message(f"step {row['step']:,} | {_evaluation_text(row)}")

    def advance(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def message(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)

    def close(self) -> None:
        self._bar.close()


class _Lines(Progress):
    """A line every tenth of the run and at every evaluation, for logs and pipes."""

    def __init__(self, resume_step: int, total_steps: int) -> None:
        self._start_step, self._total_steps = resume_step, max(total_steps, 1)
        self._start_seconds = time.monotonic()
        self._tenths_shown = resume_step * 10 // self._total_steps

    def log(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        position = f"step {step:,}/{self._total_steps:,} | {row['phase']}"
        tenths = step * 10 // self._total_steps
        if "val_loss" in row:
            self.message(f"{position} | {_evaluation_text(row)}")
        elif "loss" in row and tenths > self._tenths_shown:
            self._tenths_shown = tenths
            self.message(f"{position} | {_train_text(row)} | {self._time_left_text(step)} left")

    def _time_left_text(self, step: int) -> str:
        """At the mean pace since this start."""
        steps_done = max(step - self._start_step, 1)
        seconds_left = (time.monotonic() - self._start_seconds) / steps_done * (self._total_steps - step)
        return str(tqdm.format_interval(seconds_left))


def make_progress(progress: bool, resume_step: int, total_steps: int) -> Progress:
    """A bar on a terminal, lines elsewhere, nothing where there is to be none."""
    if not progress:
        return Progress()
    return (_Bar if sys.stdout.isatty() else _Lines)(resume_step, total_steps)


def _train_text(row: Mapping[str, Any]) -> str:
    """The numbers of a train row that a person watches, in ASCII for any terminal."""
    text = f"loss {row['loss']:.3f} | {row['sparsity']:.0%} sparse"
    if "tokens" not in row:  # a model of the caller's own
        return text
    flops_reduction = row["dense_flops"] / max(row["train_flops"], 1)
    return f"{text} | {flops_reduction:.1f}x fewer FLOPs | {row['tokens_per_second']:,.0f} tokens/s"


def _evaluation_text(row: Mapping[str, Any]) -> str:
    read = f" | {row['tokens'] / 1e6:,.2f}M tokens" if "tokens" in row else ""
    return f"validation loss {row['val_loss']:.4f}{read}"
