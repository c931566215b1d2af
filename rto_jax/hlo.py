"""What a compiled program costs, read off XLA's text of it, with loops multiplied out.

XLA's own `cost_analysis` counts the body of a loop once, and so a scanned model as one layer.
"""

import math
import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

ITEM_BITS = {"pred": 8, "token": 0, "bf16": 16}  # the others carry their bits in their name: s32, f8e4m3fn, u4
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_START = re.compile(r"  (?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    name: str
    op: str
    shape: str
    operands: tuple[str, ...]
    text: str  # what follows the operands, or stands in their place


@dataclass
class Collective:
    """All collectives of one kind."""

    count: int = 0
    """how often they run"""
    wire_bytes: float = 0.0
    """bytes that each device sends, on rings"""


@dataclass
class Cost:
    """What one device does in one run of a program."""

    cycles: float = 0.0
    """XLA's estimated_cycles (TPU only); kernels and what the devices exchange have none"""
    flops: float = 0.0
    """2 per multiply-add of every product; kernels are not in it"""
    collectives: dict[str, Collective] = field(default_factory=dict)
    """by kind"""
    kernels: int = 0
    """runs of hand-written kernels (Pallas), whose work is in none of these figures"""
    early: "Cost | None" = None
    """the part of all this that lies in loops that may end early (decoding): these are counted to their bound"""
    unknown_loops: int = 0
    """loops without a bound, whose bodies are counted once"""
    largest: dict[str, float] = field(default_factory=dict)
    """cycles by instruction, with its opcode and the name that JAX gave it"""

    @property
    def wire_bytes(self) -> float:
        return sum(kind.wire_bytes for kind in self.collectives.values())

    def add(self, other: "Cost", times: int) -> None:
        self.cycles += times * other.cycles
        self.flops += times * other.flops
        self.kernels += times * other.kernels
        self.unknown_loops += other.unknown_loops
        for name, kind in other.collectives.items():
            own = self.collectives.setdefault(name, Collective())
            own.count += times * kind.count
            own.wire_bytes += times * kind.wire_bytes
        for name, cycles in other.largest.items():
            self.largest[name] = self.largest.get(name, 0.0) + times * cycles
        if other.early:
            self.early = self.early or Cost()
            self.early.add(other.early, times)


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The name of the entry computation, and the instructions of each."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", None

    def finish():
        computations[name] = [_instruction(line) for line in lines]

    for line in text.splitlines():
        if lines is None:
            if found := _HEADER.match(line):
                name, lines = found[2], []
                entry = name if found[1] else entry
        elif line == "}":
            finish()
            lines = None
        elif _START.match(line):
            lines.append(line)
        else:  # some attributes of kernels contain line breaks
            lines[-1] += line
    return entry, computations


def program_cost(text: str) -> Cost:
    """The cost of a compiled program's text (`compiled.as_text()`)."""
    entry, computations = parse(text)
    return _Walker(computations).cost(entry)


class _Walker:
    def __init__(self, computations):
        self.computations = computations
        self.known: dict[str, Cost] = {}

    def cost(self, name: str) -> Cost:
        if name not in self.known:
            self.known[name] = self._walk(name)
        return self.known[name]

    def _walk(self, name: str) -> Cost:
        total, instructions = Cost(), self.computations[name]
        shapes = {i.name: i.shape for i in instructions}
        channels: set[str] = set()
        for i in instructions:
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', i.text):
                label = re.search(r'op_name="([^"]*)"', i.text)
                label = f"{i.op} {label[1] if label else i.name}"
                total.add(Cost(cycles=float(cycles[1]), largest={label: float(cycles[1])}), 1)
            if i.op == "while":
                times, exact = self._trips(i, {j.name: j for j in instructions})
                body = self.cost(_called(i, "body"))
                total.add(body if exact else replace(body, early=None), times or 1)
                if not exact:
                    total.early = total.early or Cost()
                    total.early.add(replace(body, early=None), times or 1)
                total.unknown_loops += times is None
            elif i.op in ("fusion", "call", "async-start"):
                called = self.computations[_called(i, "calls", "to_apply")]
                # A collective that is spread over several fusions keeps its channel: it is one.
                seen = {c for j in called if (c := _channel(j))}
                if not (seen and seen <= channels):
                    total.add(self.cost(_called(i, "calls", "to_apply")), 1)
                else:
                    inner = self.cost(_called(i, "calls", "to_apply"))
                    total.add(Cost(inner.cycles, inner.flops, kernels=inner.kernels, largest=inner.largest), 1)
                channels |= seen
            elif i.op == "conditional":
                branches = re.findall(r"%?([\w.\-]+)", re.search(r"branch_computations=\{([^}]*)\}", i.text)[1])
                total.add(max((self.cost(b) for b in branches), key=lambda c: (c.cycles, c.flops)), 1)
            elif i.op == "custom-call" and re.search(r'custom_call_target="(tpu_custom_call|__gpu\$xla.gpu.triton)', i.text):
                total.kernels += 1
            elif i.op in ("dot", "convolution"):
                total.flops += _product_flops(i, shapes)
            elif (kind := i.op.removesuffix("-start")) in KINDS:
                size = sum(_bytes(shapes[operand]) for operand in i.operands)
                total.add(Cost(collectives={kind: Collective(1, _wire(kind, size, _group(i)))}), 1)
        return total

    def _trips(self, loop: Instruction, siblings) -> tuple[int | None, bool]:
        """How often a loop turns (None: nobody knows), and whether it surely turns that often."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(found[1]), True
        # Where the backend dropped the number: while i < constant, with i counted up from a constant.
        condition = self.computations[_called(loop, "condition")]
        by_name = {i.name: i for i in condition}
        alone = not any(i.op in ("and", "or") for i in self._with_fused(condition))
        for i in self._with_fused(condition):
            if i.op != "compare" or "direction=LT" not in i.text:
                continue
            own = {j.name: j for c in self.computations.values() if i in c for j in c}
            bound = next((x for o in i.operands if (x := self._constant(o, own, condition, by_name)) is not None), None)
            if bound is None:
                continue
            counter = next((j for j in condition if j.op == "get-tuple-element" and j.shape.startswith("s32[]")), None)
            start = self._start(loop, counter, siblings) if counter else 0
            return max(bound - start, 0), alone
        return None, False

    def _with_fused(self, instructions):
        for i in instructions:
            yield i
            if i.op == "fusion":
                yield from self.computations[_called(i, "calls")]

    def _constant(self, name, own, condition, outer) -> int | None:
        """The value of a constant, also where it enters a fused computation as a parameter."""
        i = own.get(name)
        while i is not None and i.op in ("copy", "bitcast", "convert"):
            i = own.get(i.operands[0])
        if i is not None and i.op == "parameter" and own is not outer:
            fusion = next((j for j in condition if j.op == "fusion"), None)
            i = fusion and outer.get(fusion.operands[int(i.text.split(")")[0])])
        return int(i.text.split(")")[0]) if i is not None and i.op == "constant" and "s32[]" in i.shape else None

    def _start(self, loop, counter, siblings) -> int:
        index = int(re.search(r"index=(\d+)", counter.text)[1])
        i = siblings.get(loop.operands[0])
        if i is None or i.op != "tuple":
            return 0
        i = siblings.get(i.operands[index])
        while i is not None and i.op in ("copy", "bitcast"):
            i = siblings.get(i.operands[0])
        return int(i.text.split(")")[0]) if i is not None and i.op == "constant" else 0


def _instruction(line: str) -> Instruction:
    line = re.sub(r"/\*.*?\*/", "", line)
    name = _START.match(line)
    rest = line[name.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    op, rest = rest.split("(", 1)
    end = _closing("(" + rest, 0) - 1
    inside = rest[:end]
    operands = () if op in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name[1], op, shape, operands, rest if not operands else rest[end + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _called(i: Instruction, *names: str) -> str:
    return re.search(rf"(?:{'|'.join(names)})=%?([\w.\-]+)", i.text)[1]


def _channel(i: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", i.text) if i.op.removesuffix("-start") in KINDS else None
    return found and found[1]


def _arrays(shape: str) -> list[tuple[str, list[int]]]:
    return [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in _ARRAY.findall(shape)]


def _bytes(shape: str) -> float:
    return sum(
        math.prod(dims) * ITEM_BITS.get(dtype, int((re.findall(r"\d+", dtype) or [0])[0])) / 8
        for dtype, dims in _arrays(shape)
    )


def _group(i: Instruction) -> int:
    """Devices per group."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", i.text):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", i.text):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", i.text):
        return len(found[1].split(","))
    if "source_target_pairs" in i.text:
        return 2
    if "replica_groups=" in i.text.replace("replica_groups={}", ""):
        raise ValueError(f"unknown replica groups: {i.text[:300]}")
    return 1


def _wire(kind: str, size: float, group: int) -> float:
    """Bytes that each device sends for an operand of so many bytes, along rings."""
    if group == 1:
        return 0.0
    share = (group - 1) / group
    return {
        "all-gather": size * (group - 1), "reduce-scatter": size * share, "all-reduce": 2 * size * share,
        "all-to-all": size * share, "collective-permute": size,
    }[kind]  # fmt: skip


def _product_flops(i: Instruction, shapes: dict[str, str]) -> float:
    (_, out), (_, left), (_, right) = (_arrays(s)[0] for s in (i.shape, *(shapes[name] for name in i.operands[:2])))
    if i.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.text)
        return 2.0 * math.prod(out) * math.prod(left[int(n)] for n in contracted[1].split(",") if n)
    lhs, rhs, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text).groups()
    window = re.search(r"window=\{(.*?)\}", i.text)
    window = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    # Batched products are written as convolutions, of which most steps meet only padding: those count for nothing.
    work = 1
    for n, spatial in enumerate(sorted(c for c in lhs if c.isdigit())):
        get = lambda key, default, n=n: window[key].split("x")[n] if key in window else default  # noqa: E731
        low = int(get("pad", "0_0").split("_")[0])
        stride, dilate, step = (int(get(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        size, length = right[rhs.index(spatial)], (left[lhs.index(spatial)] - 1) * dilate + 1
        work *= sum(
            0 <= (at := o * stride + k * step - low) < length and at % dilate == 0
            for o in range(out[result.index(spatial)])
            for k in range(size)
        )
    return 2.0 * work * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
