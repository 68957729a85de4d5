"""A package index in a folder: minimal wheels. Its `sglang` and `torch` answer the inspection script."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import zipfile
from pathlib import Path

EPOCH = (2020, 1, 1, 0, 0, 0)  # the same content is the same bytes
SERVER_ARGS = """
class ServerArgs:
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--model-path", "--model")
        parser.add_argument("--host")
        parser.add_argument("--port", type=int)
        parser.add_argument("--is-embedding", action="store_true")
        parser.add_argument("--dtype", choices=["auto", "bfloat16"])
"""
TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0)
class version:
    cuda = "13.0"
"""


def wheel(folder: Path, name: str, version: str, files: dict[str, str], requires: tuple[str, ...] = ()) -> Path:
    """Write one pure-Python wheel."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {r}\n" for r in requires)
    content = files | {
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    return _pack(folder / f"{name}-{version}-py3-none-any.whl", {k: v.encode() for k, v in content.items()}, info)


def sglang(folder: Path, version: str, server_args: str = SERVER_ARGS) -> Path:
    """An sglang that imports and knows a handful of flags."""
    files = {
        "sglang/__init__.py": "",
        "sglang/srt/__init__.py": "",
        "sglang/srt/server_args.py": server_args,
        "sglang/srt/entrypoints/__init__.py": "",
        "sglang/srt/entrypoints/http_server.py": "import torch\n",
    }
    return wheel(folder, "sglang", version, files)


def repack(folder: Path, name: str) -> Path:
    """The wheel of a package installed beside the tests, put together again: pip, without asking an index."""
    dist = importlib.metadata.distribution(name)
    info = f"{name}-{dist.version}.dist-info"
    drop = {f"{info}/{n}" for n in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")}
    content = {
        str(file): Path(str(file.locate())).read_bytes()
        for file in dist.files or ()
        if ".." not in file.parts and file.suffix != ".pyc" and str(file) not in drop
    }
    return _pack(folder / f"{name}-{dist.version}-py3-none-any.whl", content, info)


def _pack(path: Path, content: dict[str, bytes], info: str) -> Path:
    rows = [f"{name},{_hash(data)},{len(data)}" for name, data in content.items()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD", EPOCH), "\n".join([*rows, f"{info}/RECORD,,"]) + "\n")
    return path


def _hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
