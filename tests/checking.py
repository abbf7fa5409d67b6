"""What makes tests quick without checking less: shapes once per distinct call, Triton's language patched once.

jaxtyping's hook checks every call of a function anew, and makes its checkers at import whether the function is called
or not. Whether a call passes depends on the types, shapes and dtypes of what goes in and comes out, so here each
combination is checked when it first occurs. Triton's interpreter puts its own functions into ``triton.language`` and
takes them out again around every kernel and device function; here they stay.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import jaxtyping
import numpy as np
from torch import Tensor

_jaxtyped = jaxtyping.jaxtyped


def check_once_per_shape() -> None:
    """Let jaxtyping's import hook decorate with ``checked``."""
    jaxtyping.jaxtyped = lambda *, typechecker: functools.partial(checked, typechecker=typechecker)


def checked(what: Any, typechecker: Callable) -> Any:
    """A function, method, property or dataclass of which every new combination of shapes is checked."""
    if inspect.isclass(what):
        if dataclasses.is_dataclass(what):
            what.__init__ = checked(what.__init__, typechecker)
        return what
    if isinstance(what, classmethod | staticmethod):
        return type(what)(checked(what.__func__, typechecker))
    if isinstance(what, property):
        return property(*(part and checked(part, typechecker) for part in (what.fget, what.fset, what.fdel)))
    check = functools.cache(lambda: _jaxtyped(what, typechecker=typechecker))
    passed: dict[Any, set[Any]] = {}  # by what goes in, what came out

    @functools.wraps(what)
    def once_per_shape(*arguments: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        given = (*map(kind, arguments), *((name, kind(value)) for name, value in named.items()))
        known = passed.get(given)
        if known is None:
            out = check()(*arguments, **named)
            passed.setdefault(given, set()).add(kind(out))
            return out
        out = what(*arguments, **named)
        if (found := kind(out)) not in known:
            _jaxtyped(giving(out, what), typechecker=typechecker)(*arguments, **named)
            known.add(found)
        return out

    return once_per_shape


def giving(out: Any, like: Callable) -> Callable:
    """A function with the signature of another, and its module's names for it, that returns ``out``."""

    def made(*_: Any, **__: Any) -> Any:
        return out

    return functools.wraps(like)(FunctionType(made.__code__, like.__globals__, closure=made.__closure__))


def kind(value: Any) -> Any:
    """What decides whether a value passes: shape and dtype of a tensor, the kinds of items, the type of all else."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, tuple | list):
        return type(value), *map(kind, value)
    if isinstance(value, dict):
        return type(value), *((name, kind(item)) for name, item in value.items())
    return type(value)


def patch_triton_once() -> None:
    """Let Triton's interpreter patch ``triton.language`` once per module of kernels, and for good."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, nothing, done = interpreter._patch_lang, interpreter._LangPatchScope(), set()

    def once(function: Any) -> Any:
        if id(function.__globals__) not in done:
            done.add(id(function.__globals__))
            patch(function)
        return nothing

    interpreter._patch_lang = once
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = refuse_overflow


def refuse_overflow(self: Any, one: Any, other: Any, operation: Callable) -> None:
    """Triton's own check of a sum, difference or product of integers, in NumPy: the interpreter's takes as long as
    everything else."""
    integer = one.type.scalar
    if integer.int_bitwidth < 64:
        calculate = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
        found = calculate(one.handle.data.astype(np.int64), other.handle.data.astype(np.int64))
        least, most = integer.get_int_min_value(), integer.get_int_max_value()
        assert least <= found.min() and found.max() <= most, f"overflow in {operation.__name__} of {integer}"
