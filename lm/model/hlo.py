"""Reads from an optimized XLA program's text what devices exchange, in which order, and which arrays it holds."""

import math
import re
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(?:[a-z]+(\d+)(?:e\d+m\d+\w*)?|pred)\[([\d,]*)\]")  # (bits, dimensions)
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_NAMES = re.compile(r"%([\w.\-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CHAIN = re.compile(r'chain_id="(\d+)"')  # shared by the parts of one collective on a TPU
# Participants have three spellings: [groups,size]<=..., {{0,1},...}, and named axes of the instruction's own mesh.
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[([^\]]*)\][^{]*\{([^}]*)\})")


class Collective(NamedTuple):
    """One collective instruction. shape: of its result, as text; times: executions per run of the program.

    bytes: sent by one device in all executions, in a ring over its group of `size` devices.
    """

    kind: str
    shape: str
    size: int
    times: int
    bytes: float
    source: str


class Instruction(NamedTuple):
    """One instruction of a computation: name, result type, operation, and the rest of its line."""

    name: str
    type: str
    operation: str
    rest: str


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({computation: instructions}, name of the entry computation) of an HLO module's text."""
    found, entry, current = {}, "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(Instruction(*match.groups()))
    return found, entry


def collectives(text: str) -> list[Collective]:
    """All collectives of one execution, with loops multiplied by trip counts; of branches the most expensive.

    A TPU may spread one collective over several fusions (start, other work, done). Its parts are in one computation and
    share a chain, or share kind, result and channel; they count once. Elsewhere collectives may share a channel.
    """
    found, entry = computations(text)

    def within(name: str, times: int, spread: set | None = None) -> list[Collective]:
        result, parts = [], set()
        for instruction in found.get(name, []):
            kind = instruction.operation.removesuffix("-start")
            if kind in _KINDS:
                chain = _CHAIN.search(instruction.rest)
                channel = chain or _CHANNEL.search(instruction.rest)
                if spread is not None and channel:
                    same = (kind, channel[0], "" if chain else instruction.type)
                    if same in spread:
                        continue
                    spread.add(same)
                # TPU fuses an all-reduce with the slice that each device keeps; it sends what a reduce-scatter sends.
                scatters = kind == "all-reduce" and name.startswith("all-reduce-scatter")
                result.append(_collective(kind, instruction, times, scatters))
                continue
            inner = times
            if instruction.operation == "while":
                inner = times * _trips(instruction, found, found[name])
            for called in _CALLED.findall(instruction.rest):
                result += within(called, inner, parts if instruction.operation == "fusion" else None)
            if branches := _BRANCHES.search(instruction.rest):
                names = [part.strip().lstrip("%") for group in branches.groups() if group for part in group.split(",")]
                result += max((within(n, times) for n in names), key=lambda cs: sum(c.bytes for c in cs))
        return result

    return within(entry, 1)


def unordered(text: str) -> list[tuple[str, str]]:
    """(control flow, collective) pairs of a scheduled program that XLA's CPU runtime may execute in either order.

    The runtime starts collectives in the schedule's order, which is the same on every device. But a loop, branch or
    call counts as started when it returns, before the collectives inside it have started. A later collective that does
    not wait for its results may overtake them on some devices only. gloo matches by order alone, so sums are wrong;
    devices of one process wait for each other forever. (openxla/xla: execution_graph.h orders collectives by
    scheduling edges, and thunk_executor.cc releases those when a nested executor returns.)
    """
    found, _ = computations(text)
    holding: dict[str, bool] = {}

    def flows(instruction: Instruction) -> bool:
        called = _CALLED.findall(instruction.rest)
        branches = _BRANCHES.search(instruction.rest)
        for group in branches.groups() if branches else ():
            called += re.findall(r"[\w.\-]+", group or "")
        return instruction.operation in ("while", "conditional", "call") and any(holds(name) for name in called)

    def sends(instruction: Instruction) -> bool:
        return instruction.operation.removesuffix("-start") in _KINDS

    def holds(name: str) -> bool:
        if name not in holding:
            holding[name] = any(sends(each) or flows(each) for each in found.get(name, ()))
        return holding[name]

    result = []
    for instructions in found.values():
        needs: dict[str, set[str]] = {}  # {instruction: earlier control flow whose results it waits for}
        for each in instructions:
            operands = _NAMES.findall(each.rest.split("), ")[0])
            before = set().union(*(needs[name] for name in operands if name in needs))
            flow = flows(each)
            if flow or sends(each):
                result += [(other, each.name) for other in needs if other in needs[other] and other not in before]
            needs[each.name] = before | {each.name} if flow else before
    return result


def _trips(loop: Instruction, found: dict, around: list[Instruction]) -> int:
    """A loop's trip count: as XLA noted it, else from its counter. around: the instructions of the same computation.

    The condition compares the counter with a constant. A windowed product counts by two, because its body is unrolled.
    """
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    condition, body = (
        {each.name: each for each in found.get(re.findall(rf"{part}=%?([\w.\-]+)", loop.rest)[0], [])}
        for part in ("condition", "body")
    )
    constants = {name: number for name, each in condition.items() if (number := _constant(each)) is not None}
    bound, step, start = max(constants.values(), default=1), 1, 0
    for compare in condition.values():
        operands = _NAMES.findall(compare.rest.split("), ")[0]) if compare.operation == "compare" else []
        counter = next((condition[name] for name in operands if name in condition and name not in constants), None)
        place = counter and re.search(r"index=(\d+)", counter.rest)
        if not place:
            continue
        bound = next((constants[name] for name in operands if name in constants), bound)
        if steps := _added(body, _operand(list(body.values())[-1], int(place[1]))):
            step = steps
        siblings = {each.name: each for each in around}
        begins = _operand(siblings.get(_operand(loop, 0)), int(place[1]))
        while begins in siblings and siblings[begins].operation in ("copy", "bitcast"):
            begins = _operand(siblings[begins], 0)
        start = _constant(siblings.get(begins)) or 0
    return max(0, -(-(bound - start) // step))


def _constant(instruction: Instruction | None) -> int | None:
    number = instruction and instruction.operation == "constant" and re.match(r"(\d+)\)", instruction.rest)
    return int(number[1]) if number else None


def _operand(instruction: Instruction | None, index: int) -> str:
    """The name of an operand; "" if absent."""
    names = _NAMES.findall(instruction.rest.split("), ")[0]) if instruction else []
    return names[index] if index < len(names) else ""


def _added(body: dict[str, Instruction], name: str) -> int:
    """The constant that a loop's body adds to its counter; 0 if it does anything else."""
    each = body.get(name)
    if not each or each.operation != "add":
        return 0
    return next((n for operand in (0, 1) if (n := _constant(body.get(_operand(each, operand))))), 0)


def _collective(kind: str, instruction: Instruction, times: int, scatters: bool) -> Collective:
    size = _group_size(instruction.rest)
    arrays = [
        math.prod(int(d) for d in dims.split(",") if d) * int(bits or 8) / 8
        for bits, dims in _ARRAY.findall(instruction.type)
    ]
    # A start lists its operands, then its results; it has several of each when arrays travel together.
    if instruction.operation.endswith("-start") and len(arrays) > 1 and kind != "all-reduce":
        pairs = kind in ("all-gather", "reduce-scatter")
        arrays = arrays[len(arrays) // 2 :] if pairs else [max(arrays[:2])]
    whole = sum(arrays)
    share = (size - 1) / size
    sent = {
        "all-gather": whole * share,
        "all-reduce": 2 * whole * share,
        "reduce-scatter": whole * (size - 1),
        "collective-permute": whole,
    }.get(kind, whole * share)
    if scatters:
        kind, sent = "reduce-scatter", whole * share
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(kind, instruction.type, size, times, sent * times, source[1] if source else "")


def _group_size(rest: str) -> int:
    groups = _GROUPS.search(rest)
    if not groups:
        return 2  # a permutation names pairs
    if groups[1]:
        return int(groups[1])
    if groups[2]:
        return groups[2].count(",") + 1
    sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", groups[3])}
    named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[4])
    return math.prod(int(part) if part else sizes[name] for name, part in named)
