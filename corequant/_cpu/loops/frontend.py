"""From a kernel to LLVM's intermediate form, by numba; imported only to compile.

numba has a target of ours beside its own: a processor's, but for the optimisation of each function
on its own, its machine code and its wrappers for Python, which take most of numba's time.
A kernel and all that it calls become one module, optimised once by ``codegen.compiler``.

The extension of targets is that of numba's ``tests/test_target_extension.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import (
    codegen,
    cpu,
    externals,
    fastmathpass,
    typed_passes,
    types,
    untyped_passes,
)
from numba.core.compiler import CompilerBase
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import PassManager
from numba.core.dispatcher import Dispatcher
from numba.core.registry import CPUTarget
from numba.core.target_extension import (
    CPU,
    dispatcher_registry,
    jit_registry,
    target_override,
    target_registry,
)
from numba.core.typing.context import Context
from numba.extending import typeof_impl
from numba.np import arrayobj

from corequant._cpu.codegen.compiler import NAME
from corequant._cpu.loops.intrinsics import register
from corequant._cpu.loops.source import ALLOCATE, FAILED, FREE, UNABLE, Source

__all__ = ["lower"]

_TARGET = "corequant"
_WORD = ir.IntType(64)
_BYTE = ir.IntType(8)

_ANYWHERE = ctypes.cast(ctypes.pythonapi.PyLong_FromLong, ctypes.c_void_p).value
"""An address for numba to take for that of a wrapper, which is never called."""

_LINE = 64
"""Bytes of a line of cache, on which arrays start."""

_REORDERED = {"reassoc", "nsz", "contract"}


class _Target(CPU):
    """What numba calls the hardware."""


class _Library(codegen.CPUCodeLibrary):
    """A module that is linked but neither optimised nor compiled."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_specific(self) -> None:
        pass

    def get_pointer_to_function(self, name: str) -> Any:
        return _ANYWHERE

    @property
    def module(self) -> Any:
        """The module with everything that it calls."""
        with global_compiler_lock:
            self._ensure_finalized()
        return self._final_module


class _Codegen(codegen.JITCPUCodegen):
    _library_class: Any = _Library

    def _add_module(self, module: Any) -> None:
        pass

    def _check_llvm_bugs(self) -> None:
        pass

    def set_env(self, env_name: str, env: Any) -> None:
        pass


class _Context(cpu.CPUContext):
    def init(self) -> None:
        self.is32bit = False
        self._internal_codegen = _Codegen(_TARGET)
        externals.c_math_functions.install(self)

    def load_additional_registries(self) -> None:
        # What kernels use; all that numba has would take ten times as long, and SciPy with it.
        from numba.core import optional  # noqa: F401
        from numba.cpython import iterators, mathimpl, numbers, rangeobj, slicing, tupleobj  # noqa: F401
        from numba.np import arrayobj, npyimpl  # noqa: F401

        self.install_registry(mathimpl.registry)
        self.install_registry(npyimpl.registry)

    def post_lowering(self, mod: Any, library: Any) -> None:
        # Without numba's runtime, which counts atomically: ``_runtime`` stands for it.
        if self.fastmath:
            fastmathpass.rewrite_module(mod, self.fastmath)


class _Descriptor(CPUTarget):
    # Without a lock of its own: the compiler's is held.
    @property
    def target_context(self) -> Any:
        return _target_context()

    @property
    def typing_context(self) -> Any:
        return _typing_context()


@cache
def _typing_context() -> Any:
    return Context()


@cache
def _target_context() -> Any:
    return _Context(_typing_context(), _TARGET)


class _Compiler(CompilerBase):
    """numba's passes but for those that find nothing in kernels, half of what it does before types.

    They have no closures, no objects with contexts and no loops over types, and don't compute with
    whole arrays.
    """

    def define_pipelines(self) -> list[Any]:
        passes = PassManager("kernel")
        for one in (
            untyped_passes.TranslateByteCode,
            untyped_passes.FixupArgs,
            untyped_passes.IRProcessing,
            untyped_passes.GenericRewrites,
            untyped_passes.ReconstructSSA,
            untyped_passes.DeadBranchPrune,
            typed_passes.NopythonTypeInference,
            typed_passes.PreLowerStripPhis,
            typed_passes.IRLegalization,
            typed_passes.NativeLowering,
            typed_passes.NoPythonBackend,
        ):
            passes.add_pass(one, one.__name__)
        passes.finalize()
        return [passes]


class _Dispatcher(Dispatcher):
    targetdescr = _Descriptor(_TARGET)

    def compile(self, sig: Any) -> Any:
        with target_override(_TARGET):
            return super().compile(sig)


_OPTIONS = {"nopython": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def _njit(*functions: Any, **options: Any) -> Any:
    """Stand in for ``numba.njit`` where numba compiles a function of its own."""
    for unknown in ("cache", "_target"):
        options.pop(unknown, None)

    def made(function: Any) -> Any:
        return _Dispatcher(function, targetoptions={**options, **_OPTIONS})

    return made(*functions) if functions else made


target_registry[_TARGET] = _Target
dispatcher_registry[_Target] = _Dispatcher
jit_registry[_Target] = _njit


@cache
def _dispatcher(kernel: Source) -> Any:
    fastmath = _REORDERED if kernel.reordered else False
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath, **_OPTIONS}
    return _Dispatcher(kernel.function, targetoptions=options, pipeline_class=_Compiler)


@typeof_impl.register(Source)
def _typeof_kernel(value: Source, context: Any) -> Any:
    return types.Dispatcher(_dispatcher(value))


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Look for no garbage meanwhile, of which numba makes little, so that compiling takes less."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def lower(kernel: Source, arguments: tuple[Any, ...]) -> Any:
    """Return a module whose one function unpacks arguments like these and runs the kernel."""
    with global_compiler_lock, _without_collector():
        register()
        signature = tuple(_type_of(a) for a in arguments)
        dispatcher = _dispatcher(kernel)
        dispatcher.compile(signature)
        compiled = dispatcher.overloads[signature]
        context = compiled.target_context
        module = binding.parse_assembly(str(_entry(context, compiled)))
        module.link_in(binding.parse_bitcode(compiled.library.module.as_bitcode()))
    module.link_in(binding.parse_assembly(str(_runtime(context))))
    for function in module.functions:
        if not function.is_declaration and function.name != NAME:
            function.linkage = binding.Linkage.internal
    return module


def _type_of(value: Any) -> Any:
    """Return numba's type, of arrays as if they might be written to."""
    if isinstance(value, np.ndarray):
        element: Any = numba.from_dtype(value.dtype)
        layout: Any = "C" if value.flags.c_contiguous else "A"
        return types.Array(element, value.ndim, layout, aligned=value.flags.aligned)
    if isinstance(value, tuple):
        parts = [_type_of(v) for v in value]
        kind = type(value)
        return types.NamedTuple(parts, kind) if kind is not tuple else types.Tuple(parts)
    return numba.typeof(value)


def _entry(context: Any, compiled: Any) -> Any:
    """Write the function that is called: it unpacks arguments, calls, and returns a word."""
    signature = compiled.signature
    module = context.create_module("entry")
    function = ir.Function(module, ir.FunctionType(_WORD, [_WORD]), NAME)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    if not isinstance(signature.return_type, (types.Integer, types.Boolean, types.NoneType)):
        builder.ret(_WORD(UNABLE))
        return module
    words = _Words(context, builder, function.args[0])
    values = [words.take(kind) for kind in signature.args]
    kind = context.call_conv.get_function_type(signature.return_type, signature.args)
    called = ir.Function(module, kind, compiled.fndesc.llvm_func_name)
    status, result = context.call_conv.call_function(
        builder, called, signature.return_type, signature.args, values
    )
    with builder.if_then(status.is_error, likely=False):
        builder.ret(_WORD(FAILED))
    if isinstance(signature.return_type, types.NoneType):
        builder.ret(_WORD(0))
    else:
        builder.ret(context.cast(builder, result, signature.return_type, types.int64))
    return module


class _Words:
    """Arguments in the order in which ``jit`` packs them, words of 8 bytes."""

    def __init__(self, context: Any, builder: Any, address: Any) -> None:
        self.context, self.builder = context, builder
        self.base = builder.inttoptr(address, _WORD.as_pointer())
        self.taken = 0

    def take(self, kind: Any) -> Any:
        """Return the next argument, of one of numba's types."""
        if isinstance(kind, types.Array):
            return self._array(kind)
        if isinstance(kind, types.BaseTuple):
            members: Any = kind
            parts = [self.take(part) for part in members]
            return self.context.make_tuple(self.builder, kind, parts)
        if isinstance(kind, types.NoneType):
            return self.context.get_dummy_value()
        if isinstance(kind, types.Float):
            word = self.builder.bitcast(self._word(), ir.DoubleType())
            return self.context.cast(self.builder, word, types.float64, kind)
        if isinstance(kind, types.Boolean):
            return self.builder.trunc(self._word(), ir.IntType(1))
        return self.context.cast(self.builder, self._word(), types.int64, kind)

    def _word(self) -> Any:
        place = self.builder.gep(self.base, [_WORD(self.taken)])
        self.taken += 1
        return self.builder.load(place)

    def _array(self, kind: Any) -> Any:
        array = arrayobj.make_array(kind)(self.context, self.builder)
        data = self.builder.inttoptr(self._word(), array.data.type)
        shape, strides = ([self._word() for _ in range(kind.ndim)] for _ in range(2))
        size = self.context.get_abi_sizeof(self.context.get_data_type(kind.dtype))
        arrayobj.populate_array(
            array, data=data, shape=shape, strides=strides, itemsize=_WORD(size), meminfo=None
        )
        return array._getvalue()


def _runtime(context: Any) -> Any:
    """Write what numba's arrays need of a runtime: memory that is counted, aligned and freed.

    Arrays of the caller have no counter. Others belong to one thread, so that counting is plain,
    and folded into nothing where it can be.
    """
    module = context.create_module("runtime")
    pointer = _BYTE.as_pointer()
    allocate = ir.Function(module, ir.FunctionType(pointer, [_WORD]), ALLOCATE)
    free = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer]), FREE)
    kind = ir.FunctionType(pointer, [_WORD, ir.IntType(32)])
    function = ir.Function(module, kind, "NRT_MemInfo_alloc_aligned")
    b = ir.IRBuilder(function.append_basic_block())
    memory = b.call(allocate, [b.add(function.args[0], _WORD(3 * _LINE))])
    with b.if_then(b.icmp_unsigned("==", memory, pointer(None)), likely=False):
        b.ret(memory)
    header = b.bitcast(memory, _WORD.as_pointer())
    after = b.add(b.ptrtoint(memory, _WORD), _WORD(2 * _LINE - 1))
    for place, value in ((0, _WORD(1)), (3, b.and_(after, _WORD(-_LINE)))):
        b.store(value, b.gep(header, [_WORD(place)]))
    b.ret(memory)
    function = ir.Function(module, ir.FunctionType(pointer, [pointer]), "NRT_MemInfo_data_fast")
    b = ir.IRBuilder(function.append_basic_block())
    header = b.bitcast(function.args[0], _WORD.as_pointer())
    b.ret(b.inttoptr(b.load(b.gep(header, [_WORD(3)])), pointer))
    for name, step in (("NRT_incref", 1), ("NRT_decref", -1)):
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer]), name)
        function.attributes.add("alwaysinline")
        b = ir.IRBuilder(function.append_basic_block())
        [memory] = function.args
        with b.if_then(b.icmp_unsigned("!=", memory, pointer(None))):
            counter = b.bitcast(memory, _WORD.as_pointer())
            count = b.add(b.load(counter), _WORD(step))
            b.store(count, counter)
            if step < 0:
                with b.if_then(b.icmp_unsigned("==", count, _WORD(0)), likely=False):
                    b.call(free, [memory])
        b.ret_void()
    return module
