"""What the engine plugin does to a start. Run by the engine environment's python (see test_plugin.py)."""
# ruff: noqa: PT009 - unittest: the engine environment has no pytest

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from qwen3emb_engine_plugin import bytecode, card, one_tokenizer, prebuild, readahead, serve, switches, template, unused
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


class Bytecode(unittest.TestCase):
    """A package of one module, imported by an interpreter that is told to write no bytecode."""

    def setUp(self) -> None:
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)
        self.source = self.folder / "packages" / "engine" / "__init__.py"
        self.source.parent.mkdir(parents=True)
        self.write("found = 1")

    def add(self, *names: str) -> None:
        for name in names:
            (self.folder / "packages" / name).write_text("")

    def write(self, text: str) -> None:
        self.source.write_text(text)
        os.utime(self.source, (1_700_000_000, 1_700_000_000))

    def run_it(self, **environ: str) -> str:
        """What the package says, or why nothing is kept."""
        return self.run_code(
            "import sys; from qwen3emb_engine_plugin import bytecode; said = bytecode.keep('engine'); import engine\n"
            "print(engine.found, said, sys.dont_write_bytecode, sys.pycache_prefix)",
            **environ,
        )

    def run_code(self, program: str, **environ: str) -> str:
        """What a program prints that imports the package."""
        found = subprocess.run(
            [sys.executable, "-c", f"import os\n{program}"],
            env={
                "PYTHONPATH": os.pathsep.join([str(self.folder / "packages"), os.environ["PYTHONPATH"]]),
                "PYTHONDONTWRITEBYTECODE": "1",
                "QWEN3EMB_CACHE_DIR": str(self.folder / "cache"),
                **environ,
            },
            capture_output=True,
            text=True,
            check=True,
        )
        return found.stdout.strip()

    def kept(self) -> list[Path]:
        return sorted((self.folder / "cache").rglob("engine/*.pyc"))

    def test_it_is_kept_in_a_folder_of_its_own_and_used_from_there(self) -> None:
        """Nothing is written beside the source, and the interpreter's own settings are as they were."""
        self.assertEqual(self.run_it(), "1 None True None")
        (kept,) = self.kept()
        self.assertEqual([path.name for path in self.source.parent.iterdir()], ["__init__.py"])
        self.assertEqual((self.folder / "cache" / "bytecode").stat().st_mode & 0o777, 0o700)
        other = compile("found = 2", str(self.source), "exec")
        kept.write_bytes(importlib._bootstrap_external._code_to_timestamp_pyc(other, 1_700_000_000, 9))  # type: ignore[attr-defined]
        self.assertEqual(self.run_it(), "2 None True None")

    def test_a_changed_source_is_compiled_anew(self) -> None:
        self.run_it()
        self.write("found = 1 + 1")
        self.assertEqual(self.run_it(), "2 None True None")

    def test_what_lies_beside_the_source_is_used_and_where_python_writes_it_nothing_is_kept(self) -> None:
        self.assertEqual(self.run_it(PYTHONDONTWRITEBYTECODE=""), "1 None False None")
        self.assertTrue((self.source.parent / "__pycache__").is_dir())
        self.run_it()
        self.assertEqual(self.kept(), [])

    def test_a_folder_that_somebody_chose_is_theirs(self) -> None:
        chosen = str(self.folder / "chosen")
        self.assertEqual(self.run_it(PYTHONPYCACHEPREFIX=chosen), f"1 None True {chosen}")
        self.assertEqual(self.kept(), [])

    def test_a_folder_that_others_may_write_to_is_not_read(self) -> None:
        place = self.folder / "cache" / "bytecode"
        place.mkdir(parents=True)
        place.chmod(0o777)
        self.assertEqual(self.run_it(), f"1 others may write to {place} True None")
        self.assertEqual(self.kept(), [])

    def test_a_user_without_a_home_starts_as_ever(self) -> None:
        """An image's arbitrary user id, say."""
        with (
            mock.patch.dict(os.environ),
            mock.patch.object(sys, "dont_write_bytecode", True),
            mock.patch.object(sys, "pycache_prefix", None),
            mock.patch.object(Path, "home", side_effect=RuntimeError("Could not determine home directory.")),
        ):
            os.environ.pop("QWEN3EMB_CACHE_DIR", None)
            os.environ.pop("XDG_CACHE_HOME", None)
            self.assertEqual(bytecode.keep("json"), "Could not determine home directory.")

    def folders(self) -> list[Path]:
        return sorted(path for path in (self.folder / "cache" / "bytecode").glob("*/*") if path.is_dir())

    def test_other_packages_mean_another_folder_and_one_not_asked_for_in_a_week_goes(self) -> None:
        self.run_it()
        (old,) = self.folders()
        (self.folder / "packages" / "engine-2.dist-info").mkdir()
        self.run_it()
        self.assertEqual(len(self.folders()), 2)
        long_ago = time.time() - bytecode.UNUSED_FOR - 60
        for folder in self.folders():
            os.utime(folder, (long_ago, long_ago))
        self.run_it()
        (new,) = self.folders()
        self.assertNotEqual(old, new)
        self.assertLess(time.time() - new.stat().st_mtime, 3600)

    def test_the_folder_that_it_is_started_in_does_not_matter(self) -> None:
        """Each named instance starts in its own, which `-m` puts on the path."""
        kept = []
        for name in ("one", "two"):
            (self.folder / name).mkdir()
            self.run_it(PYTHONPATH=os.pathsep.join(
                [str(self.folder / name), str(self.folder / "packages"), os.environ["PYTHONPATH"]]
            ))  # fmt: skip
            kept += self.kept()
        self.assertEqual(len(kept), 2)
        self.assertEqual(kept[0], kept[1])

    def test_the_folders_of_an_interpreter_that_is_gone_go(self) -> None:
        """Others' stay: they may be of another engine, running."""
        gone, there = (self.folder / "cache" / "bytecode" / name for name in ("gone", "there"))
        self.run_it()
        for place, interpreter in ((gone, self.folder / "no-python"), (there, sys.executable)):
            (place / "packages").mkdir(parents=True)
            (place / bytecode.INTERPRETER).symlink_to(interpreter)
            os.utime(place, (0, 0))
        self.run_it()
        self.assertFalse(gone.exists())
        self.assertTrue((there / "packages").is_dir())

    def test_a_folder_removed_meanwhile_costs_only_time(self) -> None:
        """It is not made again: that would be with the rights of any folder."""
        found = self.run_code(
            "import shutil; from pathlib import Path; from qwen3emb_engine_plugin import bytecode\n"
            "said = bytecode.keep('engine'); shutil.rmtree(bytecode.folder_of(os.environ)); import engine\n"
            "print(engine.found, said, bytecode.folder_of(os.environ).exists())"
        )
        self.assertEqual(found, "1 None False")

    def test_two_threads_leave_the_interpreter_s_settings_as_they_were(self) -> None:
        """One that is in the midst of an import when another begins one."""
        self.add("engine/first.py", "engine/second.py")
        found = self.run_code(
            "import sys, threading; from importlib.machinery import SourceFileLoader\n"
            "stock = SourceFileLoader.get_code; first, second, left = (threading.Event() for _ in range(3))\n"
            "def slow(self, name):\n"
            "    if name == 'engine.first':\n"
            "        first.set(); second.wait(0.3)\n"
            "    if name == 'engine.second':\n"
            "        second.set(); left.wait(10)\n"
            "    return stock(self, name)\n"
            "SourceFileLoader.get_code = slow\n"
            "from qwen3emb_engine_plugin import bytecode; bytecode.keep('engine'); import engine\n"
            "def one():\n"
            "    try: import engine.first\n"
            "    finally: left.set()\n"
            "thread = threading.Thread(target=one); thread.start(); first.wait(10); import engine.second\n"
            "thread.join(); print(sys.pycache_prefix, sys.dont_write_bytecode)",
        )
        self.assertEqual(found, "None True")

    def test_a_process_forked_in_the_midst_of_an_import_imports(self) -> None:
        """The thread that was importing is not there to give back what it held."""
        self.add("engine/first.py", "other.py")
        found = self.run_code(
            "import signal, sys, threading; from importlib.machinery import SourceFileLoader\n"
            "stock = SourceFileLoader.get_code; begun, forked = threading.Event(), threading.Event()\n"
            "def slow(self, name):\n"
            "    if name == 'engine.first':\n"
            "        begun.set(); forked.wait(10)\n"
            "    return stock(self, name)\n"
            "SourceFileLoader.get_code = slow\n"
            "from qwen3emb_engine_plugin import bytecode; bytecode.keep('engine'); import engine\n"
            "def one(): import engine.first\n"
            "thread = threading.Thread(target=one); thread.start(); begun.wait(10)\n"
            "pid = os.fork()\n"
            "if not pid:\n"
            "    signal.alarm(10); settings = sys.pycache_prefix, sys.dont_write_bytecode\n"
            "    import other; os._exit(settings != (None, True))\n"
            "forked.set(); thread.join(); print(os.waitpid(pid, 0)[1])",
        )
        self.assertEqual(found, "0")

    def test_a_folder_beside_the_source_that_may_not_be_looked_into_is_passed_by(self) -> None:
        """As by Python itself: its `Path.exists` would raise, and end the import."""
        found = self.run_code(
            "from pathlib import Path; from qwen3emb_engine_plugin import bytecode; bytecode.keep('engine')\n"
            "stat = os.stat\n"
            "def refused(path, *args, **kwargs):\n"
            "    if '__pycache__' in str(path):\n"
            "        raise PermissionError(13, 'Permission denied')\n"
            "    return stat(path, *args, **kwargs)\n"
            "os.stat = refused; import engine; print(engine.found)"
        )
        self.assertEqual((found, len(self.kept())), ("1", 1))

    def test_a_folder_that_cannot_be_made_starts_as_ever(self) -> None:
        (self.folder / "cache").write_text("a file")
        self.assertIn("Not a directory True None", self.run_it(QWEN3EMB_CACHE_DIR=str(self.folder / "cache" / "x")))

    def test_the_folder_is_the_launcher_s_or_the_user_s(self) -> None:
        def place(environ: dict[str, str]) -> Path:
            return bytecode.folder_of(environ, []).parents[1]

        self.assertEqual(place({"QWEN3EMB_CACHE_DIR": "/one"}), Path("/one/bytecode"))
        self.assertEqual(place({"XDG_CACHE_HOME": "/two"}), Path("/two/qwen3emb/bytecode"))
        self.assertEqual(place({}), Path.home() / ".cache/qwen3emb/bytecode")


class OneTokenizer(unittest.TestCase):
    def setUp(self) -> None:
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = scratch.name
        (Path(scratch.name) / "tokenizer.json").write_text("{}")
        self.loaded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.is_fast = True

    def get_tokenizer(  # the engine's signature
        self,
        tokenizer_name: str,
        *args: Any,
        tokenizer_mode: str = "auto",
        trust_remote_code: bool = False,
        tokenizer_revision: str | None = None,
        tokenizer_backend: str = "huggingface",
        **kwargs: Any,
    ) -> Any:
        self.loaded.append((args, kwargs))
        return types.SimpleNamespace(is_fast=self.is_fast, number=len(self.loaded))

    def places(self, **loaders: Any) -> list[Any]:
        """Modules in place of the engine's, which import the loader by name."""
        stock = self.get_tokenizer
        modules = {name: types.SimpleNamespace(get_tokenizer=loaders.get(name, stock)) for name in ("one", "two")}
        patched = (
            mock.patch.object(one_tokenizer, "PLACES", tuple(modules)),
            mock.patch.object(one_tokenizer.importlib, "import_module", modules.__getitem__),
        )
        for patch in patched:
            patch.start()
            self.addCleanup(patch.stop)
        return list(modules.values())

    def test_only_plain_arguments_have_it_loaded(self) -> None:
        """An embedding server of a local folder, and no option that asks for another tokenizer."""
        asked = one_tokenizer.folder_asked_for
        plain = ["--is-embedding", "--model-path", self.folder, "--port", "1"]
        self.assertEqual(asked(plain), self.folder)
        self.assertEqual(asked(["--is-embedding", f"--model-path={self.folder}"]), self.folder)
        self.assertEqual(asked([*plain, "--tokenizer-path", f"{self.folder}/"]), f"{self.folder}/")
        self.assertIsNone(asked(plain[1:]))
        self.assertIsNone(asked([*plain, "--tokenizer-path", "Qwen/Qwen3-Embedding-0.6B"]))
        self.assertIsNone(asked(["--is-embedding", "--model-path"]))
        for option in one_tokenizer.OTHERWISE:
            self.assertIsNone(asked([*plain, option]), option)
            self.assertIsNone(asked([*plain, f"{option}=x"]), option)

    def test_the_call_that_asks_for_just_it_is_given_it(self) -> None:
        """In every process and place; any other call loads as ever."""
        one, two = self.places()
        self.assertIsNone(one_tokenizer.load(self.folder))
        self.assertEqual(len(self.loaded), 1)
        self.assertEqual(one.get_tokenizer(self.folder, **one_tokenizer.ASKED).number, 1)
        self.assertEqual(two.get_tokenizer(self.folder, **one_tokenizer.ASKED).number, 1)
        self.assertEqual(two.get_tokenizer(self.folder, **{**one_tokenizer.ASKED, "revision": "main"}).number, 2)
        self.assertEqual(two.get_tokenizer(self.folder).number, 3)
        self.assertEqual(two.get_tokenizer("elsewhere", **one_tokenizer.ASKED).number, 4)

    def test_an_engine_that_is_not_the_one_read_loads_as_ever(self) -> None:
        def other(name: str) -> None: ...

        one, two = self.places(two=other)
        self.assertEqual(one_tokenizer.load(self.folder), "get_tokenizer is not one function everywhere")
        one.get_tokenizer = other
        self.assertIn("other(name) instead of (tokenizer_name", one_tokenizer.load(self.folder) or "")
        self.assertEqual((one.get_tokenizer, two.get_tokenizer, self.loaded), (other, other, []))

    def test_a_slow_one_is_not_shared(self) -> None:
        one, _ = self.places()
        self.is_fast = False
        self.assertEqual(one_tokenizer.load(self.folder), "SimpleNamespace is no fast tokenizer")
        self.assertEqual(one.get_tokenizer(self.folder, **one_tokenizer.ASKED).number, 2)

    def test_a_file_that_cannot_be_read_is_the_workers_to_report(self) -> None:
        """The start goes on, and the log says why nothing is shared."""

        def fails(folder: str) -> None:
            raise OSError("broken tokenizer.json")

        with (
            mock.patch.object(sys, "argv", ["serve", "--is-embedding", "--model-path", self.folder]),
            mock.patch.object(one_tokenizer, "load", fails),
            self.assertLogs("qwen3emb_engine_plugin") as said,
        ):
            serve.load_tokenizer()
        self.assertIn("tokenizer stands aside: OSError: broken tokenizer.json", said.output[0])

    def test_its_switch_leaves_it_out(self) -> None:
        self.places()
        with (
            mock.patch.object(sys, "argv", ["serve", "--is-embedding", "--model-path", self.folder]),
            mock.patch.dict(os.environ, {"QWEN3EMB_PLUGIN_TOKENIZER": "0"}),
        ):
            serve.load_tokenizer()
        self.assertEqual(self.loaded, [])


class StartAnew(unittest.TestCase):
    """`serve` before a stand-in of SGLang: what an import that fails comes to."""

    def setUp(self) -> None:
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)
        self.imports = self.folder / "imports"
        self.model = self.folder / "model"
        self.model.mkdir()
        told = f"import os; open({str(self.imports)!r}, 'a').write(f'{{os.getpid()}} {{__name__}}\\n')\n"
        refused = "if 'QWEN3EMB_PLUGIN_TEMPLATE' not in os.environ:\n"
        self.refused = told + refused + "    raise RuntimeError('not this way')\n"
        launcher = (
            "import os, sys\n"
            "if 'FAILS' in os.environ:\n"
            "    import sglang.srt.server_args\n"
            "    raise SystemExit('failed for good')\n"
            "parts = {name for name in os.environ if name.startswith(('QWEN3EMB', 'OPENBLAS', 'SGLANG'))}\n"
            "print(os.getpid(), sys.argv[1:], sorted(parts))\n"
        )
        modules = [name.replace(".", "/") for name in (*template.MODULES, serve.CLASSES_OF_QWEN3)]
        self.write(**dict.fromkeys([*modules, *(f"{Path(name).parent}/__init__" for name in modules)], ""))
        self.write(**{
            "torch": "class version: cuda = None\ncompile = None\n",
            "sglang/__init__": "",
            "sglang/launch_server": launcher,
        })  # fmt: skip

    def write(self, **modules: str) -> None:
        for name, text in modules.items():
            path = self.folder / "packages" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def serve(self, **environ: str) -> tuple[int, subprocess.CompletedProcess[str]]:
        """The process id of a start, and how it went."""
        packages = os.pathsep.join([str(self.folder / "packages"), os.environ["PYTHONPATH"]])
        main = subprocess.Popen(
            [sys.executable, "-m", "qwen3emb_engine_plugin.serve", "--model-path", str(self.model), "--port", "1"],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": packages, "HOME": str(self.folder), **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )
        out, err = main.communicate(timeout=60)
        return main.pid, subprocess.CompletedProcess(main.args, main.returncode, out, err)

    def test_an_import_that_fails_is_followed_by_a_plain_start(self) -> None:
        """Of the same process and arguments, without what the template had set; the log has one line about it."""
        self.write(**{"sglang/srt/server_args": self.refused})
        pid, found = self.serve()
        switches_set = sorted(serve.PLAIN_IMPORT)
        self.assertEqual(
            found.stdout, f"{pid} {['--model-path', str(self.model), '--port', '1']} {switches_set}\n", found.stderr
        )
        self.assertEqual(found.stderr, "qwen3emb plugin: starts anew without a template: RuntimeError: not this way\n")
        self.assertEqual(self.imports.read_text(), f"{pid} sglang.srt.server_args\n")

    def test_the_second_failure_is_the_last(self) -> None:
        """Twice imported, by one process, and not a third time."""
        self.write(**{"sglang/srt/server_args": self.refused})
        pid, found = self.serve(FAILS="1")
        self.assertEqual((found.returncode, found.stderr.count("starts anew")), (1, 1))
        self.assertIn("failed for good", found.stderr)
        self.assertEqual(self.imports.read_text(), f"{pid} sglang.srt.server_args\n" * 2)

    def test_a_class_that_sglang_would_only_log_is_asked_for(self) -> None:
        """Where the scheduler would end for want of it."""
        (self.model / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
        self.write(**{"sglang/srt/models/qwen3": self.refused})
        pid, found = self.serve(QWEN3EMB_PLUGIN_UNUSED="0")
        self.assertTrue(found.stdout.startswith(f"{pid} "), found)
        self.assertIn("starts anew without a template: RuntimeError: not this way", found.stderr)

    def test_an_import_that_asks_to_end_ends(self) -> None:
        """SGLang's own exit, or Ctrl-C, is no failure of the template."""
        self.write(**{"sglang/srt/server_args": "raise SystemExit(3)"})
        _, found = self.serve()
        self.assertEqual((found.returncode, found.stdout, found.stderr), (3, "", ""))

    def test_the_reader_of_the_weights_is_ended_before(self) -> None:
        """It would be nobody's child to take note of."""
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        with mock.patch.object(os, "execve") as anew:
            serve.start_anew({"KEPT": "1"}, pid)
        self.assertFalse(Path(f"/proc/{pid}").exists())
        ((program, words, environ),) = (call.args for call in anew.call_args_list)
        self.assertEqual((program, words[0]), (sys.executable, sys.executable))
        self.assertEqual(environ, {"KEPT": "1", **serve.PLAIN_IMPORT})


STOCK_FIRST_CARD = card.first_visible_card  # which `Card` replaces


class Card(unittest.TestCase):
    """What is asked of the GPU during the import, on a machine that has none."""

    def setUp(self) -> None:
        facts = SimpleNamespace(major=9, minor=0, name="a card", total_memory=1 << 30, multi_processor_count=132)
        for patched in (
            mock.patch.object(torch.version, "cuda", "13.0"),
            mock.patch.object(card, "first_visible_card", return_value=facts),
        ):
            patched.start()
            self.addCleanup(patched.stop)

    def test_torch_is_told_what_nvml_knows(self) -> None:
        """The rest is asked as ever; afterwards everything is."""
        stock = torch.cuda.get_device_properties, torch.cuda.is_available
        real = mock.Mock(return_value=SimpleNamespace(L2_cache_size=7))
        with mock.patch.object(torch.cuda, "get_device_properties", real), card.answered_by_nvml():
            properties = torch.cuda.get_device_properties("cuda")
            self.assertTrue(torch.cuda.is_available())
            self.assertEqual((properties.name, properties.multi_processor_count), ("a card", 132))
            real.assert_not_called()
            self.assertEqual(properties.L2_cache_size, 7)
        self.assertEqual((torch.cuda.get_device_properties, torch.cuda.is_available), stock)

    @unittest.skipUnless(importlib.util.find_spec("cuda"), "cuda-python is not installed here")
    def test_the_driver_is_told_it_too(self) -> None:
        """As CUTLASS asks when it is imported. Any other question begins CUDA, and is asked of it."""
        from cuda.bindings import driver

        which = driver.CUdevice_attribute
        begun, asked = mock.Mock(), mock.Mock(return_value="its own answer")
        with mock.patch.multiple(driver, cuInit=begun, cuDeviceGetAttribute=asked):
            with card.answered_by_nvml():
                self.assertEqual(driver.cuInit(0), (driver.CUresult.CUDA_SUCCESS,))
                fine, device = driver.cuDeviceGet(0)
                major = driver.cuDeviceGetAttribute(which.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
                self.assertEqual((fine, major), (driver.CUresult.CUDA_SUCCESS, (driver.CUresult.CUDA_SUCCESS, 9)))
                begun.assert_not_called()
                other = driver.cuDeviceGetAttribute(which.CU_DEVICE_ATTRIBUTE_WARP_SIZE, device)
            self.assertEqual((other, begun.call_count), ("its own answer", 1))
            self.assertIs(driver.cuInit, begun)

    def test_what_is_known_can_be_copied(self) -> None:
        """Without a word to CUDA."""
        real = mock.Mock()
        copied = copy.copy(card._Properties(SimpleNamespace(major=9), real))
        self.assertEqual(copied.major, 9)
        real.assert_not_called()

    def test_an_index_among_unlike_cards_says_nothing(self) -> None:
        """CUDA's first is the fastest, NVML's the one in the first slot: a desktop's small card, as often as not. And
        what is known of a card is not what a slice of it has.
        """
        nvml = mock.Mock(NVMLError=OSError, NVML_DEVICE_MIG_ENABLE=1)
        nvml.nvmlDeviceGetCudaComputeCapability.return_value = (8, 9)
        nvml.nvmlDeviceGetHandleByIndex.side_effect = nvml.nvmlDeviceGetHandleByUUID.side_effect = str
        nvml.nvmlDeviceGetNumGpuCores.return_value = 16384
        nvml.nvmlDeviceGetMigMode.side_effect = OSError("not supported")
        nvml.nvmlDeviceGetMemoryInfo.return_value.total = 24 << 30
        for names, environ, found in (
            (["T400", "RTX 4090"], {}, None),
            (["T400", "RTX 4090"], {"CUDA_VISIBLE_DEVICES": "1"}, None),
            (["T400", "RTX 4090"], {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, "RTX 4090"),
            (["T400", "RTX 4090"], {"CUDA_VISIBLE_DEVICES": "GPU-1"}, "RTX 4090"),
            (["RTX 4090", "RTX 4090"], {"CUDA_VISIBLE_DEVICES": "1,0"}, "RTX 4090"),
            (["RTX 4090"], {"CUDA_VISIBLE_DEVICES": "3"}, None),
        ):
            nvml.nvmlDeviceGetCount.return_value = len(names)
            nvml.nvmlDeviceGetName.side_effect = lambda handle, names=names: names[int(handle[-1])]
            card._first_of.cache_clear()
            with mock.patch.dict(sys.modules, pynvml=nvml), mock.patch.dict(os.environ, environ, clear=True):
                self.assertEqual(getattr(STOCK_FIRST_CARD(), "name", None), found, (names, environ))
        nvml.nvmlDeviceGetMigMode.side_effect, calls = [(0, 0), (1, 1)], nvml.nvmlDeviceGetMigMode.call_count
        self.addCleanup(card._first_of.cache_clear)
        with mock.patch.dict(sys.modules, pynvml=nvml), mock.patch.dict(os.environ, clear=True):
            for found in (True, False):
                card._first_of.cache_clear()
                self.assertEqual(bool(STOCK_FIRST_CARD()), found)
                self.assertIs(STOCK_FIRST_CARD(), STOCK_FIRST_CARD())
        self.assertEqual(nvml.nvmlDeviceGetMigMode.call_count, calls + 2)

    def test_cores_are_counted_as_multiprocessors(self) -> None:
        """An A100's 6,912 are 108, an H200's 16,896 are 132, a 4090's 16,384 are 128."""
        for capability, cores, found in (((8, 0), 6912, 108), ((9, 0), 16896, 132), ((8, 9), 16384, 128)):
            self.assertEqual(cores // card._cores_of_one(*capability), found)


class Unused(unittest.TestCase):
    def test_only_a_plain_qwen3_is_served_without(self) -> None:
        plain = {"architectures": ["Qwen3ForCausalLM"]}
        self.assertTrue(unused.fits(plain, ["--quantization", "fp8"]))
        self.assertFalse(unused.fits({}, []))
        self.assertFalse(unused.fits({**plain, "quantization_config": {"quant_method": "torchao"}}, []))
        self.assertFalse(unused.fits(plain, ["--torchao-config", "int4wo-128"]))
        self.assertFalse(unused.fits(plain, ["--model-impl=transformers"]))

    def test_transformers_is_told_so_while_it_is_imported(self) -> None:
        """Who asked meanwhile is answered no for good; afterwards the answers are the stock ones."""
        import transformers.utils
        from transformers.utils import import_utils

        stock = [getattr(import_utils, name) for name in unused.QUESTIONS]
        with unused.said_to_be_missing():
            during = [getattr(place, name) for place in (transformers.utils, import_utils) for name in unused.QUESTIONS]
        self.assertEqual([ask() for ask in during], [False] * 6)
        self.assertEqual([getattr(import_utils, name) for name in unused.QUESTIONS], stock)
        self.assertEqual([getattr(transformers.utils, name) for name in unused.QUESTIONS], stock)


class ReadAhead(unittest.TestCase):
    def setUp(self) -> None:
        # Beside this file, not in /tmp: that may be memory.
        scratch = tempfile.TemporaryDirectory(dir=Path(__file__).parent)
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)
        self.weights = self.folder / "model.safetensors"
        self.weights.write_bytes(os.urandom(40 << 20))

    def forget(self) -> None:
        """Have the kernel drop what it keeps of the file; some file systems are memory."""
        with self.weights.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if self.in_memory():
            self.skipTest("this file system keeps its files in memory")

    def in_memory(self) -> bool:
        with self.weights.open("rb") as file:
            return all(readahead.in_memory(file.fileno(), offset) for offset in range(0, 40 << 20, 1 << 20))

    def test_what_is_not_in_memory_is_read_and_what_is_is_not(self) -> None:
        self.forget()
        self.assertGreaterEqual(readahead.read([self.weights]), 32 << 20)  # the last 8 MB may come with those before
        self.assertTrue(self.in_memory())
        self.assertEqual(readahead.read([self.weights]), 0)

    def test_a_process_reads_them_and_ends(self) -> None:
        self.forget()
        pid = readahead.start(self.folder)
        assert pid
        self.assertEqual(os.waitpid(pid, 0)[1], 0)
        self.assertTrue(self.in_memory())

    def test_its_end_is_noted_by_whoever_comes_first(self) -> None:
        pid = readahead.start(self.folder)
        assert pid
        readahead.reap(pid)
        for thread in threading.enumerate():
            if thread.name == "readahead":
                thread.join(30)
        self.assertFalse(Path(f"/proc/{pid}").exists())
        readahead._wait(pid)

    def test_it_does_not_pass_for_a_second_server(self) -> None:
        """By its command line, which is the engine's at first; with no way to say another, none is begun."""
        code = (
            "import setproctitle, sys, time; from pathlib import Path; from qwen3emb_engine_plugin import readahead\n"
            "readahead.read = lambda files: time.sleep(60)\n"
            "pid = readahead.start(Path(sys.argv[1])); words = Path(f'/proc/{pid}/cmdline')\n"
            "end = time.monotonic() + 40\n"
            "while b'-c' in words.read_bytes().split(b'\\0') and time.monotonic() < end: time.sleep(0.01)\n"
            "print(words.read_bytes().strip(b'\\0').decode()); readahead.stop(pid); print(words.exists())"
        )
        found = subprocess.run(
            [sys.executable, "-c", code, str(self.folder)], capture_output=True, text=True, timeout=60, check=True
        )
        self.assertEqual(found.stdout, "sglang::readahead\nFalse\n")
        with mock.patch.dict(sys.modules, {"setproctitle": None}):
            self.assertIsNone(readahead.start(self.folder))

    def test_cores_are_those_that_the_control_group_pays_for(self) -> None:
        with (
            mock.patch.object(readahead, "CGROUP", self.folder),
            mock.patch.object(os, "sched_getaffinity", return_value=set(range(8))),
        ):
            self.assertTrue(readahead.cores_to_spare())  # nothing is said there
            for text, spare in (("max 100000", True), ("200000 100000", False), ("400000 100000", True)):
                (self.folder / "cpu.max").write_text(text + "\n")
                self.assertEqual(readahead.cores_to_spare(), spare, text)

    def test_nothing_is_read_that_would_not_stay(self) -> None:
        """No weights, too little memory, or a folder that is none."""
        with mock.patch.object(readahead, "free_memory", return_value=64 << 20):
            self.assertIsNone(readahead.start(self.folder))
        self.weights.unlink()
        self.assertIsNone(readahead.start(self.folder))
        self.assertIsNone(readahead.start(self.folder / "none"))

    def test_memory_is_the_machine_s_or_the_control_group_s(self) -> None:
        meminfo = self.folder / "meminfo"
        meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:   4000 kB\n")
        with mock.patch.object(readahead, "MEMORY", meminfo), mock.patch.object(readahead, "CGROUP", self.folder):
            self.assertEqual(readahead.free_memory(), 4000 << 10)
            for limit, free in (("max", 4000 << 10), (str(3000 << 10), 2000 << 10), (str(9000 << 10), 4000 << 10)):
                (self.folder / "memory.max").write_text(limit + "\n")
                (self.folder / "memory.current").write_text(f"{1000 << 10}\n")
                self.assertEqual(readahead.free_memory(), free)

    def test_the_weights_of_the_model_that_is_named(self) -> None:
        """Not where the engine draws its own, nor for a name that is no folder."""
        asked: list[Path] = []
        (self.folder / "config.json").write_text("{}")
        named = ["serve", "--model-path", str(self.folder)]
        with (
            mock.patch.object(readahead, "start", asked.append),
            mock.patch.dict(os.environ, {"QWEN3EMB_PLUGIN_READAHEAD": "1"}),
        ):
            for argv in (named, [*named, "--load-format", "dummy"], ["serve", "--model-path", "Qwen/none"], ["serve"]):
                with mock.patch.object(sys, "argv", argv):
                    serve.read_ahead()
            os.environ["QWEN3EMB_PLUGIN_READAHEAD"] = "0"
            with mock.patch.object(sys, "argv", named):
                serve.read_ahead()
        self.assertEqual(asked, [self.folder])


class Prebuild(unittest.TestCase):
    def kernels(self, **kernels: Any) -> None:
        patched = mock.patch.object(prebuild, "KERNELS", kernels)
        patched.start()
        self.addCleanup(patched.stop)

    def test_the_kernels_of_the_layers_that_this_server_runs(self) -> None:
        """Where `attention` runs, queries and keys are not the stock kernels' work."""
        stock = ["norm", "activation", "qknorm", "rope"]
        for version, capability, environ, found in (
            ("0.5.16", (9, 0), {}, ["norm", "activation"]),
            ("0.5.16", (9, 0), {"QWEN3EMB_PLUGIN_ATTENTION": "0"}, stock),
            ("0.5.16", (8, 9), {}, stock),
            ("0.5.14", (9, 0), {}, stock),
        ):
            facts = types.SimpleNamespace(major=capability[0], minor=capability[1])
            with (
                mock.patch.object(prebuild, "sglang_version", return_value=version),
                mock.patch.object(prebuild, "first_visible_card", return_value=facts),
                mock.patch.dict(os.environ, environ),
            ):
                self.assertEqual(prebuild.names(), found)

    def test_a_release_that_has_them_elsewhere_is_not_asked_for_them(self) -> None:
        """From 0.5.17 on: builders that can only fail would say so at every start."""
        with mock.patch.object(prebuild, "JIT", "sglang.kernels_of_another_release"):
            self.assertEqual(prebuild.names(), ["norm"])

    def test_a_kernel_that_cannot_be_built_is_left_to_its_first_use(self) -> None:
        built: list[str] = []
        self.kernels(good=lambda: lambda: built.append("good"), other=lambda: None, bad=lambda: lambda: 1 / 0)
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.dict(os.environ, QWEN3EMB_CACHE_DIR=folder),
            mock.patch("setproctitle.setproctitle"),
            self.assertLogs("qwen3emb_engine_plugin") as said,
        ):
            for name in ("good", "other", "bad"):
                prebuild.build(name)
            marked = [name for name in ("good", "other", "bad") if prebuild.mark(name, os.environ).exists()]
        self.assertEqual(built, ["good"])
        self.assertEqual(marked, ["good", "other"])
        self.assertEqual(len(said.output), 1)
        self.assertIn("bad is left to its first use: ZeroDivisionError", said.output[0])

    def test_what_is_built_is_marked_for_this_card_release_and_cache(self) -> None:
        """Anything else, and it is built again."""
        environ = {"QWEN3EMB_CACHE_DIR": "/cache", "HOME": "/home/one"}
        card = SimpleNamespace(name="one card")
        found = []
        for change, other_card, release in (
            ({}, card, "1"), ({}, card, "1"), ({}, SimpleNamespace(name="another"), "1"), ({}, card, "2"),
            ({"TVM_FFI_CACHE_DIR": "/elsewhere"}, card, "1"),
        ):  # fmt: skip
            with (
                mock.patch.object(prebuild, "first_visible_card", return_value=other_card),
                mock.patch.object(prebuild, "_release", return_value=release),
            ):
                found.append(prebuild.mark("norm", {**environ, **change}))
        self.assertEqual(found[0], found[1])
        self.assertEqual(len(set(found)), 4)
        self.assertNotEqual(prebuild.mark("rope", environ), prebuild.mark("norm", environ))

    def test_the_engine_s_functions_are_the_ones_read(self) -> None:
        """What each part of it would call, found in this engine; none is called."""
        for name in ("activation", "qknorm", "rope"):
            self.assertTrue(callable(prebuild.KERNELS[name]()), name)
        with (
            mock.patch.dict(prebuild.KERNELS, qknorm=lambda: prebuild._of_sglang("norm", "rmsnorm", "dtype")),
            mock.patch("setproctitle.setproctitle"),
            self.assertLogs("qwen3emb_engine_plugin") as said,
        ):
            prebuild.build("qknorm")
        self.assertIn("TypeError: rmsnorm(input weight out eps) instead of (dtype)", said.output[0])

    def test_it_is_not_needed_without_a_template_or_a_card(self) -> None:
        self.assertEqual(prebuild.prebuild(), switches.NOT_NEEDED)
        with (
            mock.patch.object(prebuild.template, "running", return_value=True),
            mock.patch.object(prebuild, "first_visible_card", return_value=None),
        ):
            self.assertEqual(prebuild.prebuild(), switches.NOT_NEEDED)
        self.assertEqual(prebuild.await_builders(), switches.NOT_NEEDED)

    def test_who_takes_too_long_is_ended_with_its_compilers(self) -> None:
        """Those that have ended, or whose id is nobody's, are not waited for."""
        ended = subprocess.Popen(["true"])
        ended.wait()
        slow = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
        assert slow.stdout
        compiler = int(slow.stdout.readline())
        with self.assertLogs("qwen3emb_engine_plugin") as said:
            prebuild.wait({prebuild.BUILDERS: f"{ended.pid}:1,{slow.pid}:{prebuild._began(slow.pid)}"}, 0.0)
        self.assertEqual(slow.wait(10), -9)
        self.assertIn("not built after 0 s", said.output[0])
        slow.stdout.close()
        deadline = time.monotonic() + 60
        while Path(f"/proc/{compiler}").exists() and "Z" not in Path(f"/proc/{compiler}/stat").read_text():
            self.assertLess(time.monotonic(), deadline, "its compiler goes on")

    def test_an_id_that_was_given_again_is_not_waited_for_nor_ended(self) -> None:
        other = subprocess.Popen(["sleep", "60"])
        self.addCleanup(other.wait)
        self.addCleanup(other.kill)
        began = prebuild._began(other.pid)
        assert began
        with self.assertNoLogs("qwen3emb_engine_plugin"):
            prebuild.wait({prebuild.BUILDERS: f"{other.pid}:{int(began) - 1}"}, 0.0)
        self.assertIsNone(other.poll())

    def hooked(self, part: Callable[[], str | None]) -> Callable[..., Any]:
        """What a part has SGLang call."""
        from sglang.srt.plugins.hook_registry import HookRegistry

        with mock.patch.object(HookRegistry, "register") as register:
            self.assertIsNone(part())
        return register.call_args.args[1]  # type: ignore[no-any-return]

    def test_builders_that_cannot_be_started_or_awaited_do_not_end_the_engine(self) -> None:
        """Its hooks give back what SGLang's functions returned, and say what went wrong."""
        with (
            mock.patch.object(prebuild.template, "running", return_value=True),
            mock.patch.object(prebuild, "first_visible_card", return_value=object()),
            mock.patch.object(torch.version, "cuda", "13.0"),
        ):
            started = self.hooked(prebuild.prebuild)
        with mock.patch.dict(os.environ, {prebuild.BUILDERS: "of another shape"}):
            loaded = self.hooked(prebuild.await_builders)
            with self.assertLogs("qwen3emb_engine_plugin") as said:
                self.assertEqual(loaded("loaded"), "loaded")
            with (
                mock.patch.object(prebuild, "names", side_effect=ConnectionRefusedError("no template")),
                self.assertLogs("qwen3emb_engine_plugin", logging.WARNING) as more,
            ):
                self.assertEqual(started("set"), "set")
        self.assertIn("left to their first use: ValueError", said.output[0])
        self.assertIn("left to their first use: ConnectionRefusedError: no template", more.output[0])

    def test_builders_come_from_the_template_and_are_waited_for(self) -> None:
        """Each in a process of its own; one that fails is no reason to wait, or to fail."""
        code = (
            "import os, sys\n"
            "from qwen3emb_engine_plugin import prebuild, template\n"
            "folder = sys.argv[1]\n"
            "def built(name):\n"
            "    open(os.path.join(folder, name), 'w').write(f'{os.getpid()} {os.getppid()}')\n"
            "prebuild.KERNELS = {'one': lambda: lambda: built('one'), 'two': lambda: lambda: built('two'),\n"
            "    'bad': lambda: lambda: 1 / 0}\n"
            "prebuild.names = lambda: list(prebuild.KERNELS)\n"
            "assert template.start(modules=[]) is None\n"
            "prebuild.start()\n"
            "prebuild.wait(os.environ)\n"
            "print(sorted(os.listdir(folder)), os.environ[prebuild.BUILDERS], template.running())\n"
            "began = []\n"
            "prebuild._began = lambda pid: began.append(pid)\n"
            "prebuild.start()\n"
            "print(len(began))\n"  # what failed alone
        )
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
            found = subprocess.run(
                [sys.executable, "-c", code, folder], env={**os.environ, "QWEN3EMB_CACHE_DIR": cache},
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            self.assertEqual(found.returncode, 0, found.stderr)
            self.assertEqual(found.stdout.split()[-1], "1", "what is built is not built again")
            builders = found.stdout.split("] ")[1].split()[0].split(",")
            self.assertTrue(found.stdout.startswith("['one', 'two']"), found.stdout)
            one, two = (Path(folder, name).read_text().split() for name in ("one", "two"))
        self.assertEqual([one[0], two[0]], [builder.partition(":")[0] for builder in builders[:2]])
        self.assertEqual(one[1], two[1])
        self.assertIn("bad is left to its first use: ZeroDivisionError", found.stderr)


if __name__ == "__main__":
    unittest.main()
