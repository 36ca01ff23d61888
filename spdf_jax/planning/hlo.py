"""What a program compiled for TPUs or GPUs does on one device, read from its text, every instruction as often as it runs.

`compiled.as_text()` lists the body of a loop once, and `compiled.cost_analysis()` counts it once, so with layers in a scan both
see one layer. The times that a loop runs stand beside it, or in its condition; here they multiply everything inside.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4}  # of other types the name ends in them
_ARRAY = re.compile(r"\b(pred|bf16|[suf](?:4|8|16|32|64)|f8e\w+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Of several estimates, the one of what could be reached, and the first one's time to move data.
_MICROSECONDS = re.compile(r'"exec_time_us":([\d.e+\-]+)[^}]*"name":"sol"')
_MOVING_MICROSECONDS = re.compile(r'"memory_access_time_us":([\d.e+\-]+)')
# Kernels that the compiler puts nothing down for; what it calls by other names only moves data, or is timed.
_TARGET = re.compile(r'custom_call_target="(tpu_custom_call|__cudnn\$\w+|__cub\$\w+)"')


class Collective(NamedTuple):
    """A communication that an instruction takes part in.

    Attributes:
      kind: one of `KINDS`.
      bytes: on each chip: of the gathered result, or of what goes into any other kind.
      devices: one of the groups that communicate, as places in the mesh's flattened order; of a permutation, a pair.
      key: the same in all instructions that take part in an asynchronous one, the first of which starts it and the last waits.
    """

    kind: str
    bytes: int
    devices: tuple[int, ...]
    key: str


class Instruction(NamedTuple):
    """An instruction that costs something.

    Attributes:
      cycles: the estimate of the compiler for TPUs; 0 where it makes none.
      flops: of its matrix products.
      collectives: that it takes part in.
      kernel: name of a Pallas kernel, or what a GPU's program calls of a library; "" of neither.
      operands: shapes of the kernel's operands.
      seconds: the estimate of the compiler for GPUs, asked for its statistics; 0 where it makes none. Of matrix products the
        time to move data alone: the rest is a matter of tiles, which are tuned on a GPU and any here.
    """

    cycles: int = 0
    flops: int = 0
    collectives: tuple[Collective, ...] = ()
    kernel: str = ""
    operands: tuple[tuple[int, ...], ...] = ()
    seconds: float = 0.0


class Loop(NamedTuple):
    """Instructions that run `times` times; once where that is not known before they run."""

    times: int
    body: tuple["Instruction | Loop", ...]


Items = Sequence[Instruction | Loop]


def read_program(text: str) -> tuple[Instruction | Loop, ...]:
    """Everything that costs something, in the order in which it runs.

    Args:
      text: `as_text()` of a program compiled for TPUs or GPUs.

    Returns:
      Instructions and loops.

    >>> text = '''
    ... %body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
    ...   %all-reduce.1 = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=[1,2]<=[2], to_apply=%add
    ... }
    ... %condition (p: (s32[], f32[8])) -> pred[] {
    ...   %n = s32[] constant(12)
    ...   ROOT %lt = pred[] compare(%i, %n), direction=LT
    ... }
    ... ENTRY %main (a: f32[8]) -> f32[8] {
    ...   %while.1 = (s32[], f32[8]) while(%tuple), condition=%condition, body=%body
    ... }'''
    >>> [(times, c.kind, c.bytes, c.devices) for times, c in executed_collectives(read_program(text))]
    [(12, 'all-reduce', 32, (0, 1))]
    """
    return _Reader(text).items


def executed(items: Items, times: int = 1) -> Iterator[tuple[int, Instruction]]:
    """Every instruction with the number of times that it runs."""
    for item in items:
        if isinstance(item, Loop):
            yield from executed(item.body, times * item.times)
        else:
            yield times, item


def executed_collectives(items: Items, times: int = 1) -> Iterator[tuple[int, Collective]]:
    """Every collective, once however many instructions take part in it, with the number of times that it runs."""
    seen = set()
    for item in items:
        if isinstance(item, Loop):
            yield from executed_collectives(item.body, times * item.times)
            continue
        for collective in item.collectives:
            if collective.key not in seen:
                seen.add(collective.key)
                yield times, collective


def matrix_flops(items: Items) -> int:
    """FLOPs of all matrix products outside of the instructions with a `kernel`: our kernels' for GPUs are among them."""
    return sum(times * instruction.flops for times, instruction in executed(items))


@dataclass
class _Line:
    """An instruction's text, taken apart."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest[: _closing(self.rest)])


@dataclass
class _Reader:
    text: str
    computations: dict[str, list[_Line]] = field(default_factory=dict)
    entry: str = ""

    @cached_property
    def items(self) -> tuple[Instruction | Loop, ...]:
        name = ""
        for line in self.text.splitlines():
            begins = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if begins:
                name = begins[2]
                self.computations[name] = []
                self.entry = name if begins[1] else self.entry
            elif parsed := _parse(line):
                self.computations[name].append(parsed)
        return tuple(self._items(self.entry))

    def _items(self, computation: str) -> Iterator[Instruction | Loop]:
        for line in self.computations[computation]:
            called = _CALLED.findall(line.rest)
            if line.opcode == "while":
                yield Loop(self._trips(line), tuple(self._items(called[0])))
            elif line.opcode in ("call", "conditional"):
                branches = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
                for name in called or re.findall(r"%?([\w.\-]+)", branches[1] if branches else ""):
                    yield from self._items(name)
            else:
                cycles = _CYCLES.search(line.rest)
                parts = list(self._parts(computation, line))
                waited_for = (
                    self._parts(computation, self._start(computation, line)) if line.opcode == "call-done" else ()
                )
                flops = sum(self._flops(where, part) for where, part in parts if _multiplies(part))
                microseconds = (_MOVING_MICROSECONDS if flops else _MICROSECONDS).search(line.rest)
                found = Instruction(
                    int(cycles[1]) if cycles else 0,
                    flops,
                    tuple(self._collective(w, part, line) for w, part in (*parts, *waited_for) if _kind(part.opcode)),
                    *_kernel(line),
                    float(microseconds[1]) * 1e-6 if microseconds else 0.0,
                )
                if found != Instruction():
                    yield found

    def _parts(self, computation: str, line: _Line) -> Iterator[tuple[str, _Line]]:
        """The instruction itself, or what is fused in it, each with the computation that it stands in."""
        yield computation, line
        if line.opcode in (
            "fusion",
            "async-start",
            "call-start",
        ):  # the last: on another core of the chip, a sparse one
            for name in _CALLED.findall(line.rest):
                for part in self.computations[name]:
                    yield from self._parts(name, part)

    def _start(self, computation: str, done: _Line) -> _Line:
        return next(line for line in self.computations[computation] if line.name == done.operands[0])

    def _trips(self, loop: _Line) -> int:
        """As the compiler says; else JAX counts from 0 by 1, up to the one constant of the condition."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        if known or not condition:
            return int(known[1]) if known else 1
        lines = [part for line in self.computations[condition[1]] for _, part in self._parts(condition[1], line)]
        found = [line.rest for line in lines if line.opcode == "constant" and re.match(r"[su]32\[\]", line.shape)]
        return int(re.sub(r"\D*(\d+)\).*", r"\1", found[0])) if len(found) == 1 else 1

    def _shape(self, computation: str, name: str) -> str:
        return next((line.shape for line in self.computations[computation] if line.name == name), "")

    def _collective(self, computation: str, part: _Line, instruction: _Line) -> Collective:
        kind, fused = _kind(part.opcode), part is not instruction
        given = sum(_bytes(self._shape(computation, name)) for name in part.operands)
        if part.opcode.endswith("-done"):
            return Collective(kind, 0, (), part.operands[0])
        if kind == "all-gather":
            size = _bytes(part.shape) - (given if part.opcode.endswith("-start") else 0)
        else:
            size = given or _bytes(part.shape)
        if fused and "all-reduce-scatter" in instruction.rest:
            kind = "reduce-scatter"
        channel = re.search(r"channel_id=(\d+)", part.rest)
        # An asynchronous collective is one channel in the fusions that it runs beside.
        key = f"{kind} {channel[1]}" if fused and channel else instruction.name
        return Collective(kind, size, _group(part.rest), key)

    def _flops(self, computation: str, line: _Line) -> int:
        """Of a product, of a convolution, which is what every product becomes on a TPU, or of our kernels for GPUs."""
        if line.opcode == "custom-call":
            tokens = _dimensions(self._shape(computation, line.operands[0]))[0]
            shapes = (_dimensions(shape) for shape in (self._shape(computation, line.operands[1]), line.shape))
            return 2 * tokens * next(math.prod(shape) for shape in shapes if len(shape) == 3)  # the live blocks
        if line.opcode == "dot":
            factor = _dimensions(self._shape(computation, line.operands[0]))
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
            return (
                2
                * math.prod(_dimensions(line.shape))
                * math.prod(factor[d] for d in _sizes(summed[1] if summed else ""))
            )
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
        assert labels, "a convolution has dim_labels"
        given, kernel, result = (
            dict(zip(names, _dimensions(shape), strict=True))
            for names, shape in zip(
                labels.groups(), [*(self._shape(computation, n) for n in line.operands[:2]), line.shape], strict=True
            )
        )
        window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", line.rest) or ["", ""])[1]))
        groups = re.search(r"batch_group_count=(\d+)", line.rest)
        products = kernel["i"] * result["f"] * given["b"] // (int(groups[1]) if groups else 1)
        for d, size in ((int(d), size) for d, size in kernel.items() if d.isdigit()):
            stride, dilation, hole = (int(window[k].split("x")[d]) if k in window else 1 for k in _WINDOW)
            before = int(window["pad"].split("x")[d].split("_")[0]) if "pad" in window else 0
            read = np.arange(result[str(d)])[:, None] * stride + np.arange(size) * dilation - before
            products *= int(np.sum((read >= 0) & (read <= (given[str(d)] - 1) * hole) & (read % hole == 0)))
        return 2 * products


_WINDOW = ("stride", "rhs_dilate", "lhs_dilate")


def _parse(line: str) -> _Line | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    depth = 0
    for i, letter in enumerate(found[3]):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            opcode = re.match(r" ([\w\-]+)\(", found[3][i:])
            return _Line(found[2], found[3][:i], opcode[1], found[3][i + opcode.end() :]) if opcode else None
    return None


def _closing(text: str) -> int:
    """Place of the bracket that ends the operands."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return i
    return len(text)


def _kind(opcode: str) -> str:
    return next((kind for kind in KINDS if re.fullmatch(f"{kind}(-start|-done)?", opcode)), "")


def _multiplies(line: _Line) -> bool:
    return line.opcode in ("convolution", "dot") or 'custom_call_target="mosaic_gpu' in line.rest


def _kernel(line: _Line) -> tuple[str, tuple[tuple[int, ...], ...]]:
    target = _TARGET.search(line.rest)
    if not target:
        return "", ()
    name = re.sub(r"\.\d+$", "", line.name) if target[1] == "tpu_custom_call" else target[1]
    given = line.rest.partition("operand_layout_constraints={")[2]
    return name, tuple(_sizes(dims) for _, dims in _ARRAY.findall(given[: _closing(given)]))


def _sizes(dims: str) -> tuple[int, ...]:
    return tuple(int(n) for n in dims.split(",") if n)


def _dimensions(shape: str) -> tuple[int, ...]:
    return _sizes(_ARRAY.findall(shape)[0][1])


def _bytes(shape: str) -> int:
    """Of an array, or of all arrays of a tuple, less the scalars with which asynchronous instructions keep count."""
    arrays = _ARRAY.findall(shape)
    counted = [array for array in arrays if array[1]] or arrays
    bits = (_BITS.get(t) or int(re.findall(r"\d+", t)[0]) for t, _ in counted)
    return sum(math.prod(_sizes(dims)) * b // 8 for (_, dims), b in zip(counted, bits, strict=True))


def _group(rest: str) -> tuple[int, ...]:
    """The first group of devices, which HLO writes in three ways, or the first pair of a permutation."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", rest):
        return _sizes(listed[1])
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return tuple(_iota(counted[3]).reshape(int(counted[1]), -1)[0].tolist())
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}", rest
    )
    if not named:
        return ()  # all devices
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    grouped = re.findall(r"'(\w+)'", named[3])
    ids = _iota(named[2]) if named[2] else np.arange(math.prod(axes.values()))
    order = [list(axes).index(a) for a in (*(a for a in axes if a not in grouped), *grouped)]
    return tuple(
        ids.reshape(*axes.values()).transpose(order).reshape(-1, math.prod(axes[a] for a in grouped))[0].tolist()
    )


def _iota(text: str) -> np.ndarray:
    """``[4,2]T(1,0)``: 0, 1, ... in this shape, transposed, flat."""
    shape, _, transposed = text.strip("[)").partition("]")
    ids = np.arange(math.prod(_sizes(shape))).reshape(_sizes(shape))
    return ids.transpose(_sizes(transposed[2:])).reshape(-1) if transposed else ids.reshape(-1)
