"""Loops whose turns overlap: each turn's steps stand beside other steps of the turns before.

A processor looks only so far ahead for work that is ready. The stages of a tile wait for each
other; with another tile's stages between them, what is looked at is ready more often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from corequant._cpu.codegen.vectors import int64

__all__ = ["Step", "staggered"]

Step = Callable[[Any, list[Any]], list[Any]]
"""Is given the index of a turn and the previous step's values, and returns its own.

It emits no branches, and nothing that steps of other turns wait for.
"""


def staggered(b: Any, count: Any, steps: Sequence[Step], depth: int) -> None:
    """Emit a loop over ``range(count)`` of ``steps``, with ``depth`` turns under way at once.

    Each step goes through the indices in order. A ``count`` that is known at run time only is at
    least 1; the last turn is then begun several times, but ended once.
    """
    known = isinstance(count, int)
    groups = _grouped(steps, depth if not known or count >= depth else 1)
    late = len(groups) - 1
    last = None if known else b.sub(count, int64(1))

    def turn(first: Any, carried: list[list[Any]], which: range) -> list[list[Any]]:
        """Emit groups beside each other, each for an index one less than the one before."""
        fresh, pieces = [], []
        for k in which:
            start = len(b.block.instructions)
            index = b.add(int64(first), int64(late - k))
            if last is not None and k < late:
                index = b.select(b.icmp_signed("<", index, last), index, last)
            fresh.append(groups[k](index, carried[k]))
            pieces.append(b.block.instructions[start:])
            del b.block.instructions[start:]
            b.position_at_end(b.block)
        b.block.instructions += _interleaved(pieces)
        b.position_at_end(b.block)
        return fresh

    carried: list[list[Any]] = [[] for _ in groups]
    for k in range(late):
        carried[1 : k + 2] = turn(k - late, carried, range(k + 1))
    rounds = count - late if known else count
    with _carrying(b, rounds, carried) as (index, values, following):
        following += [[], *turn(index, values, range(late + 1))[:-1]]
    for k in range(late if known else 0):
        values[k + 2 :] = turn(rounds + k, values, range(k + 1, late + 1))[:-1]


def _grouped(steps: Sequence[Step], count: int) -> list[Step]:
    """Put consecutive steps together, so that ``count`` are left."""
    cuts = [len(steps) * k // count for k in range(count + 1)]
    return [_together(steps[cuts[k] : cuts[k + 1]]) for k in range(count)]


def _together(steps: Sequence[Step]) -> Step:
    def several(index: Any, values: list[Any]) -> list[Any]:
        for step in steps:
            values = step(index, values)
        return values

    return several


def _interleaved(pieces: list[list[Any]]) -> list[Any]:
    """Merge lists, each of them evenly from the first place to the last."""
    placed = [
        ((i + 1) / (len(piece) + 1), k, i)
        for k, piece in enumerate(pieces)
        for i in range(len(piece))
    ]
    return [pieces[k][i] for _, k, i in sorted(placed)]


@contextmanager
def _carrying(
    b: Any, stop: Any, carried: list[list[Any]]
) -> Iterator[tuple[Any, list[list[Any]], list[list[Any]]]]:
    """Repeat what is emitted inside, with values that are replaced from turn to turn.

    Yields the index, the values, and a list that takes those of the next turn. After the loop the
    values are the last turn's.
    """
    entry = b.block
    head, body, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(ir.IntType(64))
    values = [[b.phi(value.type) for value in group] for group in carried]
    b.cbranch(b.icmp_signed("<", index, int64(stop)), body, after)
    b.position_at_end(body)
    following: list[list[Any]] = []
    yield index, values, following
    index.add_incoming(int64(0), entry)
    index.add_incoming(b.add(index, int64(1)), b.block)
    for old, first, new in zip(values, carried, following, strict=True):
        for phi, *incoming in zip(old, first, new, strict=True):
            phi.add_incoming(incoming[0], entry)
            phi.add_incoming(incoming[1], b.block)
    b.branch(head)
    b.position_at_end(after)
