"""Secrets, known holes, dangerous calls, file modes: what SECURITY.md promises, checked on every run."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from supervised import Supervised, gateway_plan

from qwen3emb_launch.lifecycle import State

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*(ROOT / "qwen3emb_launch").rglob("*.py"), *(ROOT / "engine_plugin").rglob("*.py")]

# ---- secrets --------------------------------------------------------------------------------------------------------

# Every detector but the two that take each keyword argument named `key` and each public address for a secret.
LEFT_OUT = {"KeywordDetector", "IPPublicDetector"}
FILTERS = ("allowlist.is_line_allowlisted", "heuristic.is_indirect_reference", "heuristic.is_sequential_string")
GENERATED = re.compile(r"recorded_flags/|engines/locks/|requirements/|docs/(cli\.md|benchmarks/|.*\.json|.*\.ipynb)")
# What the detectors find and what it is: hashes of reference vectors and checkpoints; made-up logins in tests.
KNOWN = {
    ("qwen3emb_launch/verify/demo_reference.json", "Base64 High Entropy String"),
    ("qwen3emb_launch/verify/demo_reference.json", "Hex High Entropy String"),
    ("qwen3emb_launch/verify/fingerprint.py", "Hex High Entropy String"),
}
MADE_UP = {"Basic Auth Credentials", "Base64 High Entropy String", "Hex High Entropy String"}  # in tests/


def scan(path: Path) -> set[str]:
    """The kinds of secrets found in a file."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.core.scan import scan_file
    from detect_secrets.settings import transient_settings

    detectors = {c.__name__ for c in get_mapping_from_secret_type_to_class().values()} - LEFT_OUT
    settings = {
        "plugins_used": [{"name": name} for name in sorted(detectors)],
        "filters_used": [{"path": f"detect_secrets.filters.{name}"} for name in FILTERS],
    }
    with transient_settings(settings):
        return {secret.type for secret in scan_file(str(path))}


def committed() -> Iterator[str]:
    """Files of the repository, but for generated ones."""
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: there is no list of what would be published")
    yield from (name for name in listing.stdout.splitlines() if not GENERATED.search(name))


def test_no_secret_is_committed(request: pytest.FixtureRequest) -> None:
    """detect-secrets finds nothing but what is known to be harmless. Files seen before are not read again."""
    assert request.config.cache is not None
    mark = f"{version('detect-secrets')} {sorted(LEFT_OUT)}"
    seen = dict(request.config.cache.get("security/clean", {}))
    clean, found = {}, {}
    for name in committed():
        path = ROOT / name
        if not path.is_file():
            continue
        digest = hashlib.sha256(mark.encode() + path.read_bytes()).hexdigest()
        if seen.get(name) != digest:
            kinds = {kind for kind in scan(path) if (name, kind) not in KNOWN}
            kinds -= MADE_UP if name.startswith("tests/") else set()
            if kinds:
                found[name] = kinds
                continue
        clean[name] = digest
    request.config.cache.set("security/clean", clean)
    assert not found


@pytest.mark.parametrize(
    "secret",
    [
        "-----BEGIN RSA PRIVATE " + "KEY-----",
        "token = 'gh" + "p_" + "a1B2c3D4e5" * 3 + "F6g7h8'",
        "url = 'https://me:" + "Tr0ub4dor@example.com/simple'",
        "key = 'AK" + "IA" + "Q3EGZZ5WAQ7TFEXM'",
        "key = '" + hashlib.sha256(b"a key").hexdigest() + "'",
    ],
)
def test_the_scan_finds_secrets(tmp_path: Path, secret: str) -> None:
    """A key, a token, a password in an address, a random hex word: each is found."""
    path = tmp_path / "module.py"
    path.write_text(f"x = 1\n{secret}\n")
    assert scan(path)


# ---- known holes in dependencies ------------------------------------------------------------------------------------

HOLE = "pip==20.0.2"  # has known holes: a service that does not say so was not asked


def audit(requirements: Path, service: str) -> dict[str, list[str]] | None:
    """Packages with known holes and their names; None when the service cannot be asked."""
    command = [
        sys.executable, "-m", "pip_audit", "-r", str(requirements), "--disable-pip", "--no-deps", "-f", "json",
        "-s", service, "--timeout", "5", "--progress-spinner", "off",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        rows = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return None
    if any("skip_reason" in row for row in rows):
        return None
    return {row["name"]: [hole["id"] for hole in row["vulns"]] for row in rows if row["vulns"]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vulnerability service that answers, and knows of a hole that is known."""
    known = tmp_path_factory.mktemp("audit") / "known.txt"
    known.write_text(HOLE + "\n")
    for name in ("pypi", "osv"):
        if audit(known, name):
            return name
    pytest.skip("NOTHING WAS AUDITED: no vulnerability service (pypi.org, osv.dev) answers from here")


@pytest.mark.parametrize("file", ["launcher.txt", "dev.txt"])
def test_no_dependency_has_a_known_hole(service: str, file: str) -> None:
    """pip-audit knows of nothing in what is pinned."""
    found = audit(ROOT / "requirements" / file, service)
    assert found is not None, f"{service} answered before, and does not now"
    assert found == {}


# ---- what the code may not do ---------------------------------------------------------------------------------------

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
EVALUATING = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "torch.load", "os.system", "os.popen"}


def test_nothing_is_unpickled_or_evaluated() -> None:
    """No pickle, no eval or exec, no YAML but the safe loader's, no shell: in launcher and plugin."""
    found = [f"{path.relative_to(ROOT)}: {what}" for path in SOURCES for what in dangerous(path.read_text("utf-8"))]
    assert not found


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from marshal import loads", "eval(x)", "yaml.load(x)", "torch.load(x)", "run(x, shell=True)"],
)
def test_the_look_for_dangerous_calls_finds_them(code: str) -> None:
    """Each of them is seen."""
    assert dangerous(code)


def dangerous(code: str) -> Iterator[str]:
    """Imports and calls in a module's text that may run what somebody else wrote."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from {alias.name.split(".")[0] for alias in node.names} & PICKLES
        elif isinstance(node, ast.ImportFrom):
            yield from {(node.module or "").split(".")[0]} & PICKLES
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in EVALUATING or any(k.arg == "shell" and getattr(k.value, "value", True) for k in node.keywords):
                yield called


def test_code_of_a_checkpoint_is_run_only_when_asked() -> None:
    """`trust_remote_code` is a setting of people, and no shipped profile has it."""
    for path in (ROOT / "profiles").glob("*.yaml"):
        assert "trust_remote_code" not in path.read_text(encoding="utf-8")


# ---- files ----------------------------------------------------------------------------------------------------------


def test_every_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    """With a umask of 0: state, keys, sockets, logs and the gateway's cache are nobody else's, also where the state
    folder was made by somebody careless."""
    home = Path(os.environ["QWEN3EMB_STATE_DIR"])
    cache = tmp_path / "vectors"
    plan = gateway_plan()
    assert plan.gateway is not None
    before = os.umask(0)
    try:
        (home / "instances").mkdir(parents=True, mode=0o777)
        with Supervised(replace(plan, gateway={**plan.gateway, "disk_cache": str(cache)})) as run:
            run.reach(State.READY)
            seen = [run.claim.folder, *run.claim.folder.rglob("*"), *tmp_path.glob("vectors*")]
            modes = {}
            for path in seen:
                with contextlib.suppress(FileNotFoundError):  # one that was being written is renamed by now
                    modes[str(path)] = stat.S_IMODE(path.lstat().st_mode)
    finally:
        os.umask(before)
    assert {"lock", "plan.json", "instance.json", "engine.yaml", "gateway.json"} <= {Path(name).name for name in modes}
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}
