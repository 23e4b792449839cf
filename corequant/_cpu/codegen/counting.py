"""Counting loops in LLVM's intermediate form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

__all__ = ["counted"]

_WORD = ir.IntType(64)


@contextmanager
def counted(builder: Any, stop: Any, start: int = 0, step: int = 1) -> Iterator[Any]:
    """Repeat what is emitted inside for ``range(start, stop, step)``; yields the index."""
    if isinstance(stop, int):
        stop = ir.Constant(_WORD, stop)
    entry = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_WORD)
    index.add_incoming(ir.Constant(_WORD, start), entry)
    builder.cbranch(builder.icmp_signed("<", index, stop), body, after)
    builder.position_at_end(body)
    yield index
    index.add_incoming(builder.add(index, ir.Constant(_WORD, step)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)
