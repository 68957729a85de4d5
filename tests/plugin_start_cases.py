"""What the engine plugin does to a start. Run by the engine environment's python (see test_plugin.py)."""
# ruff: noqa: PT009 - unittest: the engine environment has no pytest

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from qwen3emb_engine_plugin.compiling import compiled_when_called


class Compiling(unittest.TestCase):
    def setUp(self) -> None:
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        patched = mock.patch.object(torch, "compile", self.stock)
        patched.start()
        self.addCleanup(patched.stop)

    def stock(self, model: Any = None, **options: Any) -> Any:
        self.asked.append((model, options))
        compiled: Callable[..., Any] = lambda *args: ("compiled", *args)  # noqa: E731
        return compiled if model is not None else lambda function: self.stock(function, **options)

    def test_a_function_is_compiled_when_it_is_first_called(self) -> None:
        """Once, with the options of its decorator, whether that was given any or not; its name stays."""
        with compiled_when_called():

            @torch.compile(dynamic=True, backend="inductor")
            def product(x: int) -> int:
                """A docstring."""
                return x

            @torch.compile
            def plain(x: int) -> int:
                return x

        self.assertEqual(self.asked, [])
        self.assertEqual((product.__name__, product.__doc__), ("product", "A docstring."))
        self.assertEqual([product(2), product(3)], [("compiled", 2), ("compiled", 3)])
        self.assertEqual([(model.__name__, options) for model, options in self.asked],
                         [("product", {"dynamic": True, "backend": "inductor"})])  # fmt: skip
        self.assertEqual(plain(4), ("compiled", 4))

    def test_a_method_stays_one(self) -> None:
        with compiled_when_called():

            class Norm:
                @torch.compile
                def forward(self, x: int) -> int:
                    return x

        norm = Norm()
        self.assertEqual(norm.forward(1), ("compiled", norm, 1))

    def test_modules_and_later_calls_are_the_stock_s(self) -> None:
        module = torch.nn.Identity()
        with compiled_when_called():
            torch.compile(module, mode="reduce-overhead")
        self.assertEqual(self.asked, [(module, {"mode": "reduce-overhead"})])
        self.assertEqual(torch.compile, self.stock)


if __name__ == "__main__":
    unittest.main()
