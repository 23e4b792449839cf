"""Threads that share out units of work without the interpreter, whose lock costs more than they do.

A *job* is a function, the context that it is given, and a range of units for each member of the
team. A member takes chunks of its own range, which is what its cache holds from call to call, then
what is left of the others', so that a member that comes late, or not at all, leaves no gap.

A helper's *mailbox* says what it does: it looks for work, is dismissed, sleeps or works; any other
value is the address of a job. It changes by comparing and exchanging alone, so that a job which a
helper hasn't taken can be taken back, and both know whether it was.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from corequant._cpu.codegen.compiler import build
from corequant._cpu.codegen.vectors import counted, int64

__all__ = [
    "ASLEEP",
    "CONTEXT_WORDS",
    "LINE",
    "MOST_MEMBERS",
    "Word",
    "dismiss",
    "job_words",
    "lead",
    "serve",
]

LINE = 8
"""Words in a line of cache; what several threads write has one of its own."""

CONTEXT_WORDS = 20
"""Words of context that a job has room for."""

MOST_MEMBERS = 64
"""Members that a job has room for."""

LOOKING, _DISMISSED, ASLEEP, _WORKING = range(4)
"""States of a mailbox."""

_WORD = ir.IntType(64)
_PIECE = ir.FunctionType(ir.VoidType(), [_WORD] * 4)


class Word:
    """Word offsets in the job and mailbox structs.

    ``UNFINISHED`` helpers are left over by ``lead``. A job's ``PIECE`` is the address of a
    function of the context's address, the first unit, how many units, and a scratch. From
    ``RANGES`` on each member has a line: its next unit, and the one after its last.
    """

    UNFINISHED, PIECE, CHUNK, MEMBERS, CONTEXT = range(5)
    RANGES = CONTEXT + CONTEXT_WORDS
    STATE, NUMBER, SCRATCH = range(3)


def job_words(members: int) -> int:
    """Return the number of words in a job for a number of members."""
    return Word.RANGES + LINE * members


@cache
def serve() -> Callable[..., None]:
    """Return what a helper runs.

    Its parameters are the mailbox's address, and how often to look in vain before falling asleep.
    """
    return build("serve", "ii", _serve)


@cache
def lead() -> Callable[..., None]:
    """Return what a job's owner runs: it asks helpers to join, works, and waits for them.

    Its parameters are the addresses of the job, of the mailboxes' addresses and of a scratch, how
    many mailboxes there are, and how often to look whether all are done before giving up.
    """
    return build("lead", "iiiii", _lead)


@cache
def dismiss() -> Callable[..., None]:
    """Return what puts a polling helper to sleep; its parameter is the mailbox's address."""
    return build("dismiss", "i", _dismiss)


def _serve(b: Any, given: Any) -> None:
    mailbox, turns = given
    state = _at(b, mailbox, Word.STATE)
    member, scratch = (_at(b, mailbox, i) for i in (Word.NUMBER, Word.SCRATCH))
    left = b.alloca(_WORD)
    names = ("look", "take", "work", "idle", "wait", "rest", "leave", "end")
    look, take, work, idle, wait, rest, leave, end = (b.append_basic_block(n) for n in names)
    b.store(turns, left)
    _exchange(b, state, ASLEEP, LOOKING)
    b.branch(look)
    b.position_at_end(look)
    found = b.load_atomic(state, "seq_cst", 8)
    b.cbranch(b.icmp_unsigned(">", found, int64(_WORKING)), take, idle)
    b.position_at_end(take)
    b.cbranch(_exchange(b, state, found, _WORKING), work, look)
    b.position_at_end(work)
    _take_part(b, found, b.load(member), b.load(scratch))
    b.store_atomic(int64(LOOKING), state, "seq_cst", 8)
    b.store(turns, left)
    b.branch(look)
    b.position_at_end(idle)
    b.cbranch(b.icmp_unsigned("==", found, int64(_DISMISSED)), leave, wait)
    b.position_at_end(wait)
    _pause(b)
    now = b.sub(b.load(left), int64(1))
    b.store(now, left)
    b.cbranch(b.icmp_signed(">", now, int64(0)), look, rest)
    b.position_at_end(rest)
    b.cbranch(_exchange(b, state, LOOKING, ASLEEP), end, look)
    b.position_at_end(leave)
    b.cbranch(_exchange(b, state, _DISMISSED, ASLEEP), end, look)
    b.position_at_end(end)


def _lead(b: Any, given: Any) -> None:
    job, mailboxes, scratch, count, turns = given
    waited, unfinished = b.alloca(_WORD), b.alloca(_WORD)
    for variable in (waited, unfinished):
        b.store(int64(0), variable)
    with counted(b, count) as k:
        state = _at(b, b.load(_at(b, mailboxes, k)), Word.STATE)
        _exchange(b, state, LOOKING, job)
    _take_part(b, job, int64(0), scratch)
    with counted(b, count) as k:
        state = _at(b, b.load(_at(b, mailboxes, k)), Word.STATE)
        # Take the job back from a helper that hasn't begun: all units are taken by now.
        _exchange(b, state, job, LOOKING)
        look, wait, give_up, after = (b.append_basic_block(n) for n in ("look", "wait", "up", "on"))
        b.branch(look)
        b.position_at_end(look)
        working = b.icmp_unsigned("==", b.load_atomic(state, "seq_cst", 8), int64(_WORKING))
        b.cbranch(working, wait, after)
        b.position_at_end(wait)
        _pause(b)
        now = b.add(b.load(waited), int64(1))
        b.store(now, waited)
        b.cbranch(b.icmp_signed("<", now, turns), look, give_up)
        b.position_at_end(give_up)
        b.store(b.add(b.load(unfinished), int64(1)), unfinished)
        b.branch(after)
        b.position_at_end(after)
    b.store(b.load(unfinished), _at(b, job, Word.UNFINISHED))


def _dismiss(b: Any, given: Any) -> None:
    _exchange(b, _at(b, given[0], Word.STATE), LOOKING, _DISMISSED)


def _take_part(b: Any, job: Any, member: Any, scratch: Any) -> None:
    """Work until all units are taken, the member's own ones first."""
    chunk, members = (b.load(_at(b, job, i)) for i in (Word.CHUNK, Word.MEMBERS))
    piece = b.inttoptr(b.load(_at(b, job, Word.PIECE)), _PIECE.as_pointer())
    context = b.add(job, int64(8 * Word.CONTEXT))
    with counted(b, members) as turn:
        whose = b.urem(b.add(member, turn), members)
        line = b.add(int64(Word.RANGES), b.mul(whose, int64(LINE)))
        following, stop = _at(b, job, line), b.load(_at(b, job, b.add(line, int64(1))))
        grab, inside, after = (b.append_basic_block(n) for n in ("grab", "inside", "after"))
        b.branch(grab)
        b.position_at_end(grab)
        first = b.atomic_rmw("add", following, chunk, "seq_cst")
        b.cbranch(b.icmp_signed("<", first, stop), inside, after)
        b.position_at_end(inside)
        rest = b.sub(stop, first)
        count = b.select(b.icmp_signed("<", rest, chunk), rest, chunk)
        b.call(piece, [context, first, count, scratch])
        b.branch(grab)
        b.position_at_end(after)


def _exchange(b: Any, pointer: Any, old: Any, new: Any) -> Any:
    """Make a word ``new`` if it is ``old``; whether it was."""
    old, new = (int64(x) if isinstance(x, int) else x for x in (old, new))
    return b.extract_value(b.cmpxchg(pointer, old, new, "seq_cst", "seq_cst"), 1)


def _pause(b: Any) -> None:
    """Tell the processor that this is a loop that waits."""
    machine = platform.machine().lower()
    given: list[Any] = []
    if machine in ("x86_64", "amd64"):
        name = "llvm.x86.sse2.pause"
    elif machine in ("aarch64", "arm64"):
        name, given = "llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)]
    else:
        return
    kind = ir.FunctionType(ir.VoidType(), [x.type for x in given])
    b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), given)


def _at(b: Any, address: Any, index: Any) -> Any:
    index = int64(index) if isinstance(index, int) else index
    return b.gep(b.inttoptr(address, _WORD.as_pointer()), [index])
