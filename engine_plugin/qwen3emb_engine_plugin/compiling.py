"""`torch.compile` that loads the compiler when a function is first called, not where it is decorated.

SGLang decorates some dozens of functions at import, of which an embedding server calls few or none; torch's compiler
(torch._inductor) is loaded for the first of them. What is compiled, and with which options, stays as asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Function = Callable[..., Any]


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """While this lasts, functions given to `torch.compile` are compiled at their first call. Modules are as ever."""
    import torch

    stock = torch.compile

    def compile_later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return lambda function: compile_later(function, **options)
        if isinstance(model, torch.nn.Module) or not callable(model):
            return stock(model, **options)
        return _later(model, lambda: stock(model, **options))

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = stock


def _later(function: Function, make: Callable[[], Function]) -> Function:
    compiled: list[Function] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(make())
        return compiled[0](*args, **kwargs)

    return call
