"""From LLVM's intermediate form to a function that Python can call, by way of a cache on disk.

numba would do the same, but its type system takes longer to wake up than everything that a first
rotation needs. llvmlite alone, which numba is built on, loads a cached kernel in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from llvmlite import binding, ir

__all__ = [
    "address_of_code",
    "build",
    "compiled_away",
    "converts_halves",
    "fuses",
    "processor",
    "saturates",
]

_DIGEST = hashlib.sha256().digest_size
_NAME = "kernel"


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
    name, features = processor()
    version = metadata.version("llvmlite")
    described = "\0".join(
        (_edition(), key, kinds, name, features, version, binding.get_default_triple())
    )
    file = hashlib.sha256(described.encode()).hexdigest() + ".o"
    code = _read(file)
    if code is None:
        code = _compile(kinds, emit)
        _write(file, code)
    return _load(code, kinds)


@cache
def _edition() -> str:
    """Return the SHA-256 of the generator's sources: code made by other ones must not be used."""
    folder = resources.files("corequant._cpu.codegen")
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".py"))
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def _compile(kinds: str, emit: Callable[[Any, tuple[Any, ...]], None]) -> bytes:
    types = {"i": ir.IntType(64), "s": ir.IntType(64), "f": ir.FloatType(), "d": ir.DoubleType()}
    module = ir.Module("corequant")
    module.triple = binding.get_default_triple()
    kind = ir.FunctionType(ir.VoidType(), [types[k] for k in kinds])
    function = ir.Function(module, kind, _NAME)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    emit(builder, function.args)
    builder.ret_void()
    machine = _machine()
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    code: bytes = machine.emit_object(parsed)
    return code


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


def _load(code: bytes, kinds: str) -> Callable[..., None]:
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
    prototype = ctypes.CFUNCTYPE(None, *(types[k] for k in kinds))
    function: Any = prototype(engine.get_function_address(_NAME))
    # Code lives as long as its engine, which the function keeps.
    function.engine = engine
    return function  # type: ignore[no-any-return]


def address_of_code(function: Any) -> int:
    """Return where the code of a function of ``build`` lies, for other code to call it."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _folders() -> Iterator[Path]:
    """Where compiled code may lie, the first choice first."""
    chosen = os.environ.get("NUMBA_CACHE_DIR", "")
    if chosen:
        yield Path(chosen) / "corequant"
        return
    yield Path(__file__).parent / "__pycache__"
    if sys.platform == "win32":
        yield Path(os.environ.get("LOCALAPPDATA", Path.home())) / "corequant" / "kernels"
    else:
        home = os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache"
        yield Path(home) / "corequant" / "kernels"


def _read(file: str) -> bytes | None:
    """Return what is cached under a name, unless it is damaged."""
    with contextlib.suppress(OSError, RuntimeError):  # no home folder is a RuntimeError
        for folder in _folders():
            with contextlib.suppress(OSError):
                content = (folder / file).read_bytes()
                digest, code = content[:_DIGEST], content[_DIGEST:]
                if hashlib.sha256(code).digest() == digest:
                    return code
    return None


def _write(file: str, code: bytes) -> None:
    """Cache in the first folder that can be written; without one, compile again next time."""
    with contextlib.suppress(OSError, RuntimeError):
        for folder in _folders():
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                # Written aside and renamed, so that no other process reads half of it.
                handle, name = tempfile.mkstemp(dir=folder)
                with os.fdopen(handle, "wb") as stream:
                    stream.write(hashlib.sha256(code).digest() + code)
                os.replace(name, folder / file)
                return
