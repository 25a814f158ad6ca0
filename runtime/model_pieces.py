"""A model in pieces for devices: which blocks each takes, where they begin and end among the ops, what they are called."""

from __future__ import annotations

from collections.abc import Sequence

from pyinfer.graph.experts import ExpertRun


def spans_of(pieces: Sequence[tuple[int, int]], runs: Sequence[ExpertRun]) -> list[tuple[int, int | None]]:
    """(first op, piece) of each part, in order: what is left of these pieces [first op, end) between `runs`, which are None's."""
    spans: list[tuple[int, int | None]] = []
    for number, (start, end) in enumerate(pieces):
        for run in (run for run in runs if start <= run.start < end):
            if start < run.start:
                spans.append((start, number))
            spans.append((run.start, None))
            start = run.end
        if start < end:
            spans.append((start, number))
    return spans


def divide(costs: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """How many of the items, in order, each device takes: in proportion to its room."""
    total, available = sum(costs), max(1, sum(rooms))
    counts, done, share = [], 0, 0.0
    taken = 0.0
    for device_room in rooms[:-1]:
        share += total * device_room / available
        count = 0
        while done + count < len(costs) and taken + costs[done + count] / 2 <= share:
            taken += costs[done + count]
            count += 1
        counts.append(count)
        done += count
    return [*counts, len(costs) - done]


def piece_name(start: int, end: int, n: int, away: Sequence[int]) -> str:
    """What units [start, end) are, where the experts of the blocks `away` are elsewhere."""
    parts = ["embedding"] if start == 0 else []
    blocks = list(range(max(start, 1) - 1, min(end, n + 1) - 1))
    if blocks:
        here = [block for block in away if block in blocks]
        without = (
            "" if not here else " without experts" if here == blocks else f" without the experts of {_numbers(here)}"
        )
        parts.append(block_names(blocks) + without)
    if end == n + 2:
        parts.append("head")
    return ", ".join(parts)


def block_names(blocks: Sequence[int]) -> str:
    return f"block{'s' if len(blocks) > 1 else ''} {_numbers(blocks)}"


def _numbers(blocks: Sequence[int]) -> str:
    """Of blocks that follow each other."""
    return f"{blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else str(blocks[0])
