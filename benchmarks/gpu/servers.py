"""Engine servers under measurement: started in a session of their own, awaited by a real embedding, weighed by NVML."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import Template
from typing import Any

from qwen3emb_launch.engine_process.rendezvous import Rendezvous


@dataclass
class Server:
    """One running server. Seconds and bytes; `gpu_bytes` is what its processes hold once it answers.

    While it starts, `ready_s` is None.
    """

    name: str
    pid: int
    port: int
    argv: list[str]
    ready_s: float | None
    gpu_bytes: int | None
    log: str

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


class StartError(RuntimeError):
    """The server died or did not answer in time; the message ends with its last log lines."""


def expand(values: Mapping[str, str]) -> dict[str, str]:
    """`${NAME}` in a configuration's environment, from this process's."""
    return {k: filled(str(v)) for k, v in values.items()}


def filled(text: str) -> str:
    """`${NAME}` from this process's environment; KeyError where it is not set."""
    return Template(text).substitute(os.environ)


def start(
    name: str,
    spec: Mapping[str, Any],
    model: Path,
    port: int,
    out: Path,
    began: Callable[[Server], None],
    deadline_s: float = 420,
) -> Server:
    """Start the server that `spec` describes, tell `began` of it, and wait for an embedding.

    Its `argv` may hold {model}, {name} (what the model is called in requests), {port} and {here}, this folder; it and
    `env` may hold ${NAME} from the environment.
    """
    log = out / f"{name}.log"
    places = {"model": str(model), "name": model.name, "port": str(port), "here": str(Path(__file__).resolve().parent)}
    argv = [filled(str(part)).format(**places) for part in spec["argv"]]
    with socket.socket() as probe:  # another server's answers would be taken for this one's
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StartError(f"{name}: port {port} is taken: {error}") from None
    place = Rendezvous().fresh(argv)  # a port that SGLang drew may be taken by the load when torch listens there
    env = {**place, **os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **expand(spec.get("env", {}))}
    before = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(argv, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True, env=env)
    server = Server(name, process.pid, port, argv, None, None, str(log))
    began(server)
    try:
        while not answers(port, model.name):
            if process.poll() is not None or time.monotonic() - before > deadline_s:
                raise StartError(f"no embedding within {time.monotonic() - before:.0f} s")
            time.sleep(0.25)
    except StartError as error:
        stop_group(process.pid)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        raise StartError(f"{name}: {error}\n{tail}") from None
    ready = time.monotonic() - before
    return replace(server, ready_s=round(ready, 1), gpu_bytes=gpu_bytes(process.pid))


def answers(port: int, model: str) -> bool:
    """Whether a real embedding comes back; StartError for a refusal, which waiting does not mend."""
    body = json.dumps({"model": model, "input": "ready?"}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/embeddings", data=body, headers={"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status == 200 and bool(json.load(answer)["data"][0]["embedding"])
    except urllib.error.HTTPError as error:
        if 400 <= error.code < 500 and error.code != 429:
            raise StartError(f"it refuses a request for model {model}: {error.code} {error.read()[:500]!r}") from None
        return False
    except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError):
        return False


def post(port: int, path: str, body: dict[str, Any]) -> None:
    """One POST to a server of ours; urllib.error.URLError where it refuses."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()


def descendants(pid: int) -> set[int]:
    """The process and everything below it, in any session."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        child, parent = int(text.split()[0]), int(text.rsplit(")", 1)[1].split()[1])
        parents.setdefault(parent, []).append(child)
    found, todo = {pid}, [pid]
    while todo:
        for child in parents.get(todo.pop(), []):
            if child not in found:
                found.add(child)
                todo.append(child)
    return found


def gpu_bytes(pid: int) -> int | None:
    """GPU memory the server's processes hold, by NVML; None where NVML does not tell processes apart."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        family = descendants(pid)
        held = [p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid in family]
    except pynvml.NVMLError:
        return None
    return sum(held) if held and all(h is not None for h in held) else None


def device_used_bytes() -> int:
    """Memory in use on the whole GPU, 0 without one: for the difference around a start where processes look alike."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


def stop_group(pid: int, deadline_s: float = 60) -> None:
    """KILL the server and everything below it, and wait until it is gone, its memory on the GPU with it."""
    handles = []
    for member in descendants(pid):
        with contextlib.suppress(ProcessLookupError):
            handles.append(os.pidfd_open(member))
            signal.pidfd_send_signal(handles[-1], signal.SIGKILL)
    deadline = time.monotonic() + deadline_s
    for handle in handles:  # readable once its process has ended, whoever's child it is
        select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
        os.close(handle)
    with contextlib.suppress(ChildProcessError):  # started by an earlier command
        os.waitpid(pid, 0)


def save(servers: list[Server], path: Path) -> None:
    """Remember running servers, so that a later command can load or stop them."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps([asdict(s) for s in servers], indent=1))
    fresh.replace(path)


def load(path: Path) -> list[Server]:
    """The servers an earlier command left running."""
    return [Server(**s) for s in json.loads(path.read_text())] if path.exists() else []
