"""From LLVM's intermediate form to a function that Python can call, by way of a cache on disk.

numba would do the same, but its type system takes longer to wake up than everything that a first
rotation needs. llvmlite alone, which numba is built on, loads a cached kernel in milliseconds.

Code is read from every folder, so that one filled beforehand serves where nothing can be written.
It is written to the first folder that takes it; without one, each process compiles for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding, ir

__all__ = [
    "NAME",
    "address_of",
    "address_of_code",
    "build",
    "cache_folders",
    "cached",
    "compilation_lock",
    "compiled_away",
    "converts_halves",
    "edition",
    "fuses",
    "processor",
    "read_cached",
    "saturates",
    "write_cached",
]

NAME = "kernel"
"""Of the one function of a module that is called from outside."""

_DIGEST = hashlib.sha256().digest_size

_PATIENCE = 20.0
"""Seconds for which a process waits for another one that compiles; no kernel takes as long."""

_LOOK = 0.005
"""Seconds between looks at whether another process has finished."""


@cache
def compiled_away() -> bool:
    """Return whether compilation is switched off, by numba's own variable."""
    return os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


@cache
def processor() -> tuple[str, str]:
    """Name and features of the processor to compile for; NUMBA_CPU_NAME overrides them."""
    name = os.environ.get("NUMBA_CPU_NAME", "")
    if name:
        return name, os.environ.get("NUMBA_CPU_FEATURES", "")
    return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()


def build(
    key: str, kinds: str, emit: Callable[[Any, tuple[Any, ...]], None]
) -> Callable[..., None]:
    """Return the function that ``emit`` writes, from the cache if it has been compiled before.

    Parameters
    ----------
    key : str
        Tells this function from all others of this version of the package.
    kinds : str
        A letter for each parameter: ``i`` for an integer (not negative) or an address, ``s`` for
        the address of a bytes object, ``f`` and ``d`` for float32 and float64.
    emit : callable
        Is given an IRBuilder at the start of the body, and the parameters.
    """
    described = f"{edition('corequant._cpu.codegen')}\0{key}"
    return cached(described, kinds, None, lambda: _emitted(kinds, emit))


def cached(described: str, kinds: str, result: Any, make: Callable[[], Any]) -> Callable[..., Any]:
    """Return the function named ``NAME`` of a module, from the cache if it has been compiled.

    Parameters
    ----------
    described : str
        All that the code depends on but the processor and the compiler.
    kinds : str
        Parameters, as for ``build``.
    result : ctypes type or None
        What the function returns.
    make : callable
        Returns the module, where it isn't cached.
    """
    name, features = processor()
    version = metadata.version("llvmlite")
    parts = (described, kinds, name, features, version, binding.get_default_triple())
    file = hashlib.sha256("\0".join(parts).encode()).hexdigest() + ".o"
    code = read_cached(file)
    if code is None:
        with compilation_lock(file) as waited:
            code = read_cached(file) if waited else None
            if code is None:
                code = _compile(make())
                write_cached(file, code)
    return _load(code, kinds, result)


@cache
def edition(*packages: str) -> str:
    """Return the SHA-256 of packages' sources: code made by other ones must not be used."""
    digest = hashlib.sha256()
    for package in packages:
        folder = resources.files(package)
        for name in sorted(f.name for f in folder.iterdir() if f.name.endswith(".py")):
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _emitted(kinds: str, emit: Callable[[Any, tuple[Any, ...]], None]) -> Any:
    types = {"i": ir.IntType(64), "s": ir.IntType(64), "f": ir.FloatType(), "d": ir.DoubleType()}
    module = ir.Module("corequant")
    module.triple = binding.get_default_triple()
    kind = ir.FunctionType(ir.VoidType(), [types[k] for k in kinds])
    function = ir.Function(module, kind, NAME)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    emit(builder, function.args)
    builder.ret_void()
    # The target machine is made first: it initialises LLVM.
    _machine()
    return binding.parse_assembly(str(module))


def _compile(module: Any) -> bytes:
    machine = _machine()
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    foreign = [f.name for f in module.functions if f.is_declaration and _is_foreign(f.name)]
    if foreign:
        raise RuntimeError(f"kernels must not call numba's runtime or Python, got {foreign}")
    code: bytes = machine.emit_object(module)
    return code


def _is_foreign(name: str) -> bool:
    """Return whether a function is numba's, which cached code runs without, or needs the GIL."""
    return name.startswith(("NRT_", "numba_", "Py", "_Py"))


@cache
def converts_halves() -> bool:
    """Return whether the processor converts float16; LLVM would call a library that isn't there."""
    module = binding.parse_assembly(
        "define float @widen(half %x) {\n %y = fpext half %x to float\n ret float %y\n}"
    )
    assembly: str = _machine().emit_assembly(module)
    return not any(name in assembly for name in ("__extendhfsf2", "__gnu_h2f_ieee"))


@cache
def fuses() -> bool:
    """Return whether the processor multiplies and adds with one rounding; else a library would."""
    module = binding.parse_assembly(
        "declare float @llvm.fma.f32(float, float, float)\n"
        "define float @fused(float %x) {\n"
        " %y = call float @llvm.fma.f32(float %x, float %x, float %x)\n ret float %y\n}"
    )
    assembly: str = _machine().emit_assembly(module)
    return "fmaf" not in assembly


@cache
def saturates() -> bool:
    """Return whether the processor narrows 64 bytes of integers with saturation (AVX-512)."""
    module = binding.parse_assembly(
        "define <64 x i8> @more(<64 x i8> %x) {\n %y = add <64 x i8> %x, %x\n ret <64 x i8> %y\n}"
    )
    return "%zmm" in _machine().emit_assembly(module)


@cache
def _machine() -> Any:
    return _new_machine()


def _new_machine() -> Any:
    # Newer releases of llvmlite initialise the core on import and raise here.
    with contextlib.suppress(RuntimeError):
        binding.initialize()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, features = processor()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(
        cpu=name, features=features, opt=3, reloc="default", codemodel="jitdefault", jit=True
    )


def _load(code: bytes, kinds: str, result: Any) -> Callable[..., Any]:
    # An engine destroys its machine when it is destroyed, so that each has one of its own.
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _new_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    # Integers pass as pointers, which ctypes converts three times faster.
    types: dict[str, Any] = {
        "i": ctypes.c_void_p,
        "s": ctypes.c_char_p,
        "f": ctypes.c_float,
        "d": ctypes.c_double,
    }
    # ctypes releases the interpreter lock while the function runs.
    prototype = ctypes.CFUNCTYPE(result, *(types[k] for k in kinds))
    function: Any = prototype(engine.get_function_address(NAME))
    # Code lives as long as its engine, which the function keeps.
    function.engine = engine
    return function  # type: ignore[no-any-return]


def address_of_code(function: Any) -> int:
    """Return where the code of a function of ``build`` lies, for other code to call it."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_pointer_at = ctypes.c_void_p.from_address
_FIELD = object.__basicsize__
"""Offset of the data pointer in an array object: it follows what every Python object has."""


def _by_interface(x: Any) -> int:
    return int(x.ctypes.data)


def _by_field(x: Any) -> int:
    return _pointer_at(id(x) + _FIELD).value or 0


def _choose() -> Callable[[Any], int]:
    """Read the pointer from the object if that is where it is, in a sixth of the time."""
    probe = np.zeros(4)[1:]
    head = ctypes.string_at(id(probe) + _FIELD, ctypes.sizeof(ctypes.c_void_p))
    same = int.from_bytes(head, "little") == probe.ctypes.data
    return _by_field if same else _by_interface


address_of: Callable[[Any], int] = _choose()
"""Address of an array's first number."""


def cache_folders() -> list[Path]:
    """Return where compiled code may lie, the first choice first.

    ``NUMBA_CACHE_DIR`` where that is set; else beside the package, then the user's cache.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR", "")
    if chosen:
        return [Path(chosen) / "corequant"]
    found = [Path(__file__).parent / "__pycache__"]
    with contextlib.suppress(RuntimeError):  # no home folder
        if sys.platform == "win32":
            found.append(
                Path(os.environ.get("LOCALAPPDATA", Path.home())) / "corequant" / "kernels"
            )
        else:
            home = os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache"
            found.append(Path(home) / "corequant" / "kernels")
    return found


def read_cached(file: str) -> bytes | None:
    """Return what is cached under a name, unless it is damaged."""
    for folder in cache_folders():
        with contextlib.suppress(OSError):
            content = (folder / file).read_bytes()
            digest, code = content[:_DIGEST], content[_DIGEST:]
            if hashlib.sha256(code).digest() == digest:
                return code
    return None


def write_cached(file: str, code: bytes) -> None:
    """Cache in the first folder that can be written."""
    for folder in cache_folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            # Written aside and renamed, so that no other process reads half of it.
            handle, name = tempfile.mkstemp(dir=folder)
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(hashlib.sha256(code).digest() + code)
                os.replace(name, folder / file)
                return
            except OSError:  # a full disk, or on Windows a file that another process reads
                os.unlink(name)
                raise


@contextlib.contextmanager
def compilation_lock(file: str) -> Iterator[bool]:
    """Let one process at a time compile what a file will hold; yields whether it had to wait.

    A file beside it holds the machine and the process that is at work. Nobody waits where none can
    be made, for a process that has ended, or longer than ``_PATIENCE``.
    """
    lock, waited = _take_lock(file)
    try:
        yield waited
    finally:
        if lock is not None:
            lock.unlink(missing_ok=True)


def _take_lock(file: str) -> tuple[Path | None, bool]:
    """Make the file that locks; returns it, or None, and whether another process had made it."""
    for folder in cache_folders():
        lock = folder / (file + ".lock")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.write(handle, _holder().encode())
            os.close(handle)
            return lock, False
        except FileExistsError:
            _wait(lock)
            # What the other compiled is read; if it failed, each one that waited does it itself.
            return None, True
        except OSError:
            continue
    return None, False


def _holder() -> str:
    return f"{platform.node()} {os.getpid()}"


def _wait(lock: Path) -> None:
    end = time.monotonic() + _PATIENCE
    with contextlib.suppress(OSError):
        while time.monotonic() < end and time.time() - lock.stat().st_mtime < _PATIENCE:
            if _has_ended(lock.read_text()):
                break
            time.sleep(_LOOK)
        lock.unlink(missing_ok=True)


def _has_ended(holder: str) -> bool:
    """Return whether a process is known to have ended; False of other machines and systems."""
    node, _, process = holder.rpartition(" ")
    if os.name != "posix" or node != platform.node() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False
