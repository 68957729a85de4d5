"""Downloads against a hub look-alike on the loopback, through the real clients of both hubs."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from loopback_hub import Fault, LoopbackHub, checkpoint, loopback_hub

from qwen3emb_launch import hub
from qwen3emb_launch.demo_model import make_demo_model
from qwen3emb_launch.errors import CheckFailedError, InvalidInputError, LaunchError, NetworkError, UnfitError
from qwen3emb_launch.hub import downloading, huggingface, inventory, modelscope, records
from qwen3emb_launch.hub.locking import exclusive
from qwen3emb_launch.hub.names import parse
from qwen3emb_launch.hub.transfer import Retries
from qwen3emb_launch.progress import SilentProgress

REPO = "Qwen/Qwen3-Embedding-0.6B"
SHARD = "model-00001-of-00002.safetensors"
BIG = 25 * 2**20
SOURCES = ["huggingface", "modelscope"]


class Waits(list[float]):
    """A sleep that only notes what it was asked for."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


class Shown(SilentProgress):
    """Progress that remembers."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.amounts: list[tuple[int, int | None]] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def update(self, done: int, total: int | None = None) -> None:
        self.amounts.append((done, total))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return checkpoint(make_demo_model(tmp_path_factory.mktemp("source") / "demo"), shards=(200_000, 80_000))


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return checkpoint(make_demo_model(tmp_path_factory.mktemp("source") / "demo"), shards=(BIG, 100_000))


@pytest.fixture
def server(small: dict[str, bytes], own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(own_folders / "data"))
    with loopback_hub() as running:
        running.repos[REPO] = dict(small)
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.url)
        yield running


def fetch(source: str = "huggingface", waits: Waits | None = None, **options: object) -> hub.DownloadResult:
    waits = Waits() if waits is None else waits
    progress = options.pop("progress", None) or SilentProgress()
    return downloading.download(parse(REPO), progress, source=source, retries=Retries(sleep=waits), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", SOURCES)
def test_only_what_serving_needs_is_fetched(server: LoopbackHub, source: str) -> None:
    """Configuration, tokenizer and safetensors arrive; pickles, ONNX and the card stay on the hub."""
    result = fetch(source)
    assert sorted(p.relative_to(result.path).as_posix() for p in result.path.rglob("*") if not p.is_dir()) == [
        "1_Pooling/config.json",
        "config.json",
        SHARD,
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name, content in server.repos[REPO].items():
        assert server.sent(name) == (len(content) if (result.path / name).exists() else 0), name
    assert result.bytes_fetched == result.bytes_total
    assert (result.commit, result.source) == (server.commit, source)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_cut_connections_are_resumed_and_no_byte_is_sent_twice(
    server: LoopbackHub, big: dict[str, bytes], source: str, reset: bool
) -> None:
    """A close or a reset at any byte costs none: the next request begins where the last one ended."""
    server.repos[REPO] = big
    server.faults = [Fault("model-00001", after=n, reset=reset) for n in (12_000_000, 1, 3_000_000)]
    if source == "huggingface":
        for fault in server.faults:
            fault.match = "/cdn/" + REPO + "/model-00001"
    waits, shown = Waits(), Shown()
    result = fetch(source, waits, progress=shown)
    assert [s.start for s in server.bodies(SHARD)] == [0, 12_000_000, 12_000_001, 15_000_001]
    assert server.sent(SHARD) == len(big[SHARD])
    assert (result.path / SHARD).read_bytes() == big[SHARD]
    assert waits == [1.0, 1.0, 1.0]
    assert shown.amounts[-1] == (result.bytes_total, result.bytes_total)


@pytest.mark.parametrize("source", SOURCES)
def test_a_second_run_goes_on_where_the_first_gave_up(server: LoopbackHub, source: str) -> None:
    """The bytes of a failed download stay and count as done."""
    match = f"/cdn/{REPO}/model-00001" if source == "huggingface" else "model-00001"
    server.faults = [Fault(match, after=150_000), *(Fault(match, after=0) for _ in range(5))]
    waits = Waits()
    with pytest.raises(NetworkError) as caught:
        fetch(source, waits)
    assert caught.value.code == "transfer_broken"
    assert "150000 of" in caught.value.message
    assert waits == [1.0, 1.0, 2.0, 4.0] or waits == [1.0, 2.0, 4.0, 8.0]
    assert hub.local(REPO) is None
    before = server.sent(SHARD)
    shown = Shown()
    result = fetch(source, progress=shown)
    assert server.sent(SHARD) - before == len(server.repos[REPO][SHARD]) - 150_000
    assert result.bytes_resumed >= 150_000
    assert result.bytes_fetched + result.bytes_resumed == result.bytes_total
    assert shown.amounts[-1] == (result.bytes_total, result.bytes_total)


def test_a_hub_that_ignores_ranges_is_read_from_the_start(server: LoopbackHub) -> None:
    server.faults = [
        Fault("/cdn/" + REPO + "/model-00001", after=100_000),
        Fault("/cdn/" + REPO + "/model-00001", ignore_range=True),
    ]
    result = fetch()
    assert (result.path / SHARD).read_bytes() == server.repos[REPO][SHARD]


def test_a_partial_file_longer_than_the_file_starts_over(server: LoopbackHub) -> None:
    listing = huggingface.describe(REPO, None)
    file = next(f for f in listing.files if f.path == SHARD)
    target = huggingface.target(listing, file)
    target.parent.mkdir(parents=True)
    Path(f"{target}{huggingface.PARTIAL}").write_bytes(b"x" * (file.size + 1))
    result = fetch()
    assert (result.path / SHARD).read_bytes() == server.repos[REPO][SHARD]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_content_with_the_wrong_hash_is_deleted_and_told(server: LoopbackHub, source: str, name: str) -> None:
    """Large files are checked by sha256, small ones by git's sha1: neither client does so over plain HTTP."""
    right = server.repos[REPO][name]
    match = f"/cdn/{REPO}/{name}" if name == SHARD and source == "huggingface" else name
    path = f"resolve/{server.commit}/{name}" if name != SHARD and source == "huggingface" else match
    server.faults = [Fault(path, body=bytes([right[0] ^ 1]) + right[1:])]
    with pytest.raises(NetworkError) as caught:
        fetch(source)
    assert caught.value.code == "hash_mismatch"
    assert name in caught.value.message
    assert "deleted" in caught.value.message
    assert hub.local(REPO) is None
    result = fetch(source)
    assert (result.path / name).read_bytes() == right


def test_a_file_that_is_longer_than_listed_is_refused(server: LoopbackHub) -> None:
    server.faults = [Fault(f"resolve/{server.commit}/tokenizer.json", body=b"x" * 100_000)]
    with pytest.raises(NetworkError) as caught:
        fetch()
    assert caught.value.code == "size_mismatch"


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_here_needs_no_network(server: LoopbackHub, source: str) -> None:
    """A complete model is reused without a single request, by download, resolve and local alike."""
    first = fetch(source)
    server.faults = [Fault("", status=500) for _ in range(50)]
    asked = len(server.seen)
    again = hub.download("0.6b", source=source)  # type: ignore[arg-type]
    facts = hub.resolve("0.6b", source=source)  # type: ignore[arg-type]
    assert again.already_here
    assert again.bytes_fetched == 0
    assert facts == hub.local("0.6b")
    assert (facts.path, facts.revision, facts.source) == (first.path, server.commit, source)
    assert (facts.name, facts.catalog_key, facts.eos_token_id) == ("0.6b", "0.6b", 256)
    assert len(server.seen) == asked


def test_the_cache_is_what_the_library_itself_would_have_made(server: LoopbackHub) -> None:
    """huggingface_hub finds the snapshot offline, by branch and commit, and its cache scan has no complaint."""
    from huggingface_hub import scan_cache_dir, snapshot_download

    result = fetch()
    for revision in ("main", server.commit):
        found = snapshot_download(REPO, revision=revision, cache_dir=huggingface.cache(), local_files_only=True)
        assert Path(found) == result.path
    scan = scan_cache_dir(huggingface.cache())
    assert not scan.warnings
    assert scan.size_on_disk == result.bytes_total


def test_what_the_library_has_fetched_is_taken_as_it_is(server: LoopbackHub) -> None:
    """A snapshot by another tool is adopted without a request, verified by its blobs' names, and removed whole."""
    from huggingface_hub import snapshot_download

    snapshot_download(REPO, cache_dir=huggingface.cache(), endpoint=server.url, ignore_patterns=["*.bin", "onnx/*"])
    asked = len(server.seen)
    assert hub.download("0.6b").already_here
    assert {f.state for f in hub.verify("0.6b").files} == {"ok"}
    assert hub.remove("0.6b").bytes_freed > 280_000
    assert hub.local("0.6b") is None
    assert len(server.seen) == asked


def test_a_revision_is_resolved_once_and_pinned(server: LoopbackHub) -> None:
    """The branch's commit is recorded; when the branch moves on, what is here stays, until a revision is asked for."""
    first = fetch(revision="main")
    old, server.commit = server.commit, "beef" + "1" * 36
    assert hub.resolve("0.6b").revision == old
    assert hub.resolve("0.6b", revision=old[:10]).revision == old
    second = fetch(revision=server.commit)
    assert (first.commit, second.commit) == (old, server.commit)
    assert second.bytes_fetched == 0, "equal content is one blob"
    assert hub.resolve("0.6b", revision=old).path == first.path
    hub.remove("0.6b", revision=old)
    assert hub.resolve("0.6b", allow_download=False).revision == server.commit


def refused(status: int, **headers: str) -> Fault:
    return Fault("/api/", status=status, headers=headers)


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        (refused(401), NetworkError, "hub_unauthorized"),
        (refused(403, **{"X-Error-Code": "GatedRepo"}), NetworkError, "gated_repo"),
        (refused(403), NetworkError, "hub_forbidden"),
        (refused(404, **{"X-Error-Code": "RepoNotFound"}), InvalidInputError, "unknown_repo"),
        (refused(404, **{"X-Error-Code": "RevisionNotFound"}), InvalidInputError, "unknown_revision"),
        (refused(429), NetworkError, "hub_busy"),
        (refused(503), NetworkError, "hub_unavailable"),
        (refused(418), NetworkError, "hub_refused"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_hugging_face_refusals_say_what_happened(
    server: LoopbackHub, fault: Fault, kind: type[LaunchError], code: str
) -> None:
    """Each refusal is an error of its own, with the status seen, even where the cache is empty."""
    fault.match = "/api/models"
    server.faults = [fault] * 4
    with pytest.raises(kind) as caught:
        fetch()
    assert caught.value.code == code
    assert caught.value.hint
    if "revision" not in code:
        assert str(fault.status) in caught.value.message


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (401, NetworkError, "hub_unauthorized"),
        (403, NetworkError, "hub_forbidden"),
        (404, InvalidInputError, "unknown_repo"),
        (418, NetworkError, "hub_refused"),
        (429, NetworkError, "hub_busy"),
        (503, NetworkError, "hub_unavailable"),
    ],
)
def test_modelscope_refusals_say_what_happened(
    server: LoopbackHub, monkeypatch: pytest.MonkeyPatch, status: int, kind: type[LaunchError], code: str
) -> None:
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)  # its own sleeps
    server.faults = [Fault("/api/v1", status=status) for _ in range(20)]
    with pytest.raises(kind) as caught:
        fetch("modelscope")
    assert caught.value.code == code


@pytest.mark.parametrize("source", SOURCES)
def test_a_busy_hub_is_asked_again(server: LoopbackHub, source: str) -> None:
    """503 and 429 in the middle of a download are waited out, as long as the hub asks for."""
    match = f"/cdn/{REPO}/model-00001" if source == "huggingface" else "FilePath=model-00001"
    server.faults = [Fault(match, status=503), Fault(match, status=429, headers={"Retry-After": "7"})]
    waits = Waits()
    fetch(source, waits)
    assert waits == [1.0, 7.0]


def test_nobody_at_the_address(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://user:secret@127.0.0.1:9")
    with pytest.raises(NetworkError) as caught:
        fetch()
    assert caught.value.code == "hub_unreachable"
    assert "secret" not in caught.value.message
    assert "http://127.0.0.1:9" in caught.value.message
    assert "qwen3emb download Qwen/Qwen3-Embedding-0.6B --source modelscope" in caught.value.hint, "up has no --source"


def test_a_socks_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """ALL_PROXY=socks5://… is what many proxy programs set: asked by both hubs' clients, and one that is not there is
    unreachable, no riddle."""
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1:9")
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:9")
    with pytest.raises(NetworkError, match="refused") as caught:
        fetch("huggingface")
    assert caught.value.code == "hub_unreachable"
    with pytest.raises(requests.ConnectionError, match="refused"):  # ModelScope's, without its pauses
        requests.get("http://192.0.2.1:9", timeout=5)


@pytest.mark.parametrize(
    "address",
    ["garbage", "hf-mirror.com", "http://", "ftp://hub.example", "me:secret@hub", "http://[::1", "http://hub:a"],
)
@pytest.mark.parametrize("source", ["auto", "huggingface"])
def test_an_address_that_is_none_is_refused_at_once(
    server: LoopbackHub, monkeypatch: pytest.MonkeyPatch, address: str, source: str
) -> None:
    """Invalid input, named by its variable, before anybody is asked or waited for; passwords are not shown."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    waits = Waits()
    with pytest.raises(InvalidInputError, match="HF_ENDPOINT") as caught:
        downloading.download(parse("0.6b"), SilentProgress(), source=source, retries=Retries(sleep=waits))  # type: ignore[arg-type]
    assert caught.value.code == "bad_endpoint"
    assert "secret" not in caught.value.message
    assert waits == []
    assert not server.seen


def test_a_web_page_instead_of_a_hub(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/api/v1/models/{REPO}")
    with pytest.raises(LaunchError) as caught:
        fetch()
    assert caught.value.exit in (2, 5)


def test_auto_goes_to_modelscope_when_hugging_face_does_not_answer(
    server: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent first hub is given up after its three seconds (here: a shorter probe of the same code)."""
    silent = threading.Event()
    server.faults = [Fault("/", wait=silent)]
    probe = huggingface.silence
    monkeypatch.setattr(huggingface, "silence", lambda: probe(0.2))
    shown = Shown()
    try:
        result = downloading.download(parse("0.6b"), shown)
    finally:
        silent.set()
    assert result.source == "modelscope"
    assert "did not answer within 0.2 s; asking ModelScope" in shown.steps[1]


@pytest.mark.parametrize(
    ("address", "why"),
    [("http://nosuchhost.invalid", "nosuchhost.invalid does not resolve"), ("http://127.0.0.1:9", "refused")],
)
def test_auto_says_why_it_goes_to_modelscope(
    server: LoopbackHub, monkeypatch: pytest.MonkeyPatch, address: str, why: str
) -> None:
    """A mirror's name with a slip in it, or a port where nobody listens, is no silence of three seconds."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    shown = Shown()
    assert downloading.download(parse("0.6b"), shown).source == "modelscope"
    assert "did not answer" not in shown.steps[1]
    assert why in shown.steps[1]
    assert shown.steps[1].endswith("; asking ModelScope")


def test_auto_never_crosses_over_for_names_outside_the_catalog(
    server: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same name on another hub may be somebody else's model."""
    server.repos["somebody/model"] = server.repos[REPO]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError):
        downloading.download(parse("somebody/model"), SilentProgress(), retries=Retries(sleep=Waits()))
    assert not [s for s in server.seen if s.path.startswith("/api/v1")]


def test_the_token_goes_to_the_hub_and_not_to_its_cdn(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = fetch()
    assert not [s for s in server.seen if s.path.startswith("/cdn/") and s.authorization]
    assert "hf_secret" not in repr(result)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    hub.remove("0.6b")
    with pytest.raises(NetworkError) as caught:
        fetch()
    assert "was not accepted" in caught.value.message
    assert "hf_wrong" not in repr(caught.value.to_dict())


@pytest.mark.parametrize("revision", ["../../../x", "", "/etc", "a/../b"])
def test_a_revision_is_no_path(server: LoopbackHub, revision: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        hub.download("0.6b", revision=revision)
    assert caught.value.code == "unknown_revision"
    assert not server.seen


@pytest.mark.parametrize("commit", ["", "../../evil", "main"])
def test_a_hub_cannot_choose_where_files_go(server: LoopbackHub, commit: str) -> None:
    """Commits and hashes become file names in the cache: only real ones are taken."""
    server.commit = commit
    with pytest.raises(NetworkError) as caught:
        fetch()
    assert caught.value.code == "hub_incomplete"
    assert server.sent() == 0


def test_offline_is_respected(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NetworkError) as caught:
        hub.download("0.6b")
    assert caught.value.code == "hub_offline"
    assert not server.seen


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "pickle_only"),
        ({"config.json": b"{}"}, "no_weights"),
        ({"README.md": b"x"}, "not_a_model"),
        ({"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x" * 10**6}, "not_qwen3"),
        ({"config.json": b"<html>", "model.safetensors": b"x" * 10**6}, "bad_config"),
    ],
)
def test_what_cannot_be_served_is_refused_before_its_weights_are_fetched(
    server: LoopbackHub, files: dict[str, bytes], code: str
) -> None:
    server.repos[REPO] = files
    with pytest.raises(InvalidInputError) as caught:
        fetch()
    assert caught.value.code == code
    assert server.sent("model.safetensors") == server.sent("pytorch_model.bin") == 0


@pytest.mark.parametrize("source", SOURCES)
def test_too_little_room_is_told_before_anything_is_fetched(
    server: LoopbackHub, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(downloading, "free_bytes", lambda _: 1000)
    with pytest.raises(UnfitError) as caught:
        fetch(source)
    assert caught.value.code == "disk_full"
    assert caught.value.details["free_bytes"] == 1000
    assert caught.value.details["needed_bytes"] > 280_000
    assert server.sent() == 0


def test_a_disk_that_fills_up_on_the_way(server: LoopbackHub) -> None:
    """The kernel's own ENOSPC, from /dev/full, is an unfit disk and not a broken network."""
    listing = huggingface.describe(REPO, None)
    target = huggingface.target(listing, next(f for f in listing.files if f.path == SHARD))
    target.parent.mkdir(parents=True)
    Path(f"{target}{huggingface.PARTIAL}").symlink_to("/dev/full")
    waits = Waits()
    with pytest.raises(UnfitError) as caught:
        fetch(waits=waits)
    assert caught.value.code == "disk_full"
    assert os.strerror(errno.ENOSPC) in caught.value.message
    assert not waits
    assert hub.local("0.6b") is None


def test_a_folder_that_cannot_be_written(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    with pytest.raises(UnfitError):
        fetch()


def test_dry_run_lists_and_fetches_nothing(server: LoopbackHub) -> None:
    result = fetch(dry_run=True)
    assert result.dry_run
    assert result.bytes_fetched == result.bytes_total == sum(len(server.repos[REPO][f.path]) for f in result.files)
    assert server.sent() == 0
    assert hub.local("0.6b") is None


def test_downloads_of_one_model_exclude_each_other(server: LoopbackHub) -> None:
    """Two at once send every byte once: the second waits, says for what, and finds everything there."""
    hold = threading.Event()
    server.faults = [Fault("/cdn/" + REPO + "/model-00001", wait=hold)]
    shown = [Shown(), Shown()]
    results: list[hub.DownloadResult] = []

    def run(progress: Shown) -> None:
        waiter = Retries(sleep=lambda _: hold.set())  # the second's wait for the lock lets the first go on
        results.append(downloading.download(parse("0.6b"), progress, source="huggingface", retries=waiter))

    threads = [threading.Thread(target=run, args=(progress,)) for progress in shown]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(r.already_here for r in results) == [False, True]
    assert server.sent(SHARD) == len(server.repos[REPO][SHARD])
    assert any("waiting for another process" in step for progress in shown for step in progress.steps)


def test_waiting_for_another_download_has_a_deadline(tmp_path: Path) -> None:
    times = iter([0.0, 1.0, 4000.0])
    with (
        exclusive(tmp_path / "lock", "4b", SilentProgress()),
        pytest.raises(UnfitError) as caught,
        exclusive(tmp_path / "lock", "4b", SilentProgress(), deadline=3600, sleep=Waits(), clock=lambda: next(times)),
    ):
        pass
    assert caught.value.code == "download_busy"


@pytest.mark.parametrize("source", SOURCES)
def test_verify_names_the_file_and_repair_brings_it_back(server: LoopbackHub, source: str) -> None:
    """A flipped bit and a lost file are found, told by name, and only they are fetched again."""
    result = fetch(source)
    assert {f.state for f in hub.verify("0.6b").files} == {"ok"}
    shard = result.path / SHARD
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (result.path / "modules.json").unlink()
    with pytest.raises(CheckFailedError) as caught:
        hub.verify("0.6b")
    assert caught.value.code == "corrupted_model"
    assert f"{SHARD} (damaged)" in caught.value.message
    assert "modules.json (missing)" in caught.value.message
    assert "--repair" in caught.value.hint
    before = server.sent()
    repaired = hub.verify("0.6b", repair=True)
    assert sorted(repaired.repaired) == [SHARD, "modules.json"]
    fetched_again = server.sent() - before
    assert fetched_again in (len(content), len(content) + len(server.repos[REPO]["modules.json"]))


@pytest.mark.parametrize("source", SOURCES)
def test_remove_frees_everything_and_the_next_download_starts_anew(server: LoopbackHub, source: str) -> None:
    result = fetch(source)
    freed = hub.remove("0.6b")
    assert freed.bytes_freed == result.bytes_total
    assert not result.path.exists()
    assert not records.read_all()
    with pytest.raises(UnfitError) as caught:
        hub.remove("0.6b")
    assert caught.value.code == "model_missing"
    assert "models list" in caught.value.hint, "nobody who removes wants to download"
    assert fetch(source).bytes_fetched == result.bytes_total


@pytest.mark.parametrize("source", SOURCES)
def test_remove_clears_away_an_interrupted_download(server: LoopbackHub, source: str) -> None:
    match = f"/cdn/{REPO}/model-00001" if source == "huggingface" else "model-00001"
    server.faults = [Fault(match, after=100_000), *(Fault(match, after=0) for _ in range(5))]
    with pytest.raises(NetworkError):
        fetch(source)
    assert hub.remove("0.6b").bytes_freed > 100_000
    left = [p for root in (huggingface.cache(), modelscope.repo_folder(REPO)) for p in root.rglob("*") if p.is_file()]
    assert [p for p in left if not p.name.endswith("lock")] == []


def test_a_broken_record_counts_as_none(server: LoopbackHub) -> None:
    """A record cut at any byte costs nothing: the shared cache is looked through instead."""
    fetch()
    (path,) = (huggingface.cache().parents[1] / "data" / "models" / "records").rglob("*.json")
    text = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    asked = len(server.seen)
    for length in range(0, len(text), 97):
        path.write_text(text[:length])
        assert hub.local("0.6b") is not None
    assert len(server.seen) == asked


def test_a_missing_model_that_may_not_be_downloaded_names_the_command(server: LoopbackHub) -> None:
    with pytest.raises(UnfitError) as caught:
        hub.resolve("4b", allow_download=False)
    assert (caught.value.code, caught.value.hint) == ("model_missing", "qwen3emb download 4b")
    assert not server.seen


def test_the_demo_model_is_made_verified_repaired_and_removed(server: LoopbackHub) -> None:
    assert hub.local("demo") is None
    facts = hub.resolve("demo")
    assert (facts.name, facts.source, facts.eos_token_id, facts.revision) == ("demo", "demo", 256, None)
    assert "Embedding" in str(facts.path)
    (facts.path / "config.json").write_text("{}")
    with pytest.raises(CheckFailedError):
        hub.verify("demo")
    assert hub.verify("demo", repair=True).repaired == ("config.json",)
    assert hub.remove("demo").bytes_freed > 2_000_000
    assert not server.seen


def test_every_row_of_the_list_is_there(server: LoopbackHub) -> None:
    server.repos["me/mine"] = server.repos[REPO]
    fetch()
    hub.download("me/mine")
    rows = {(r.model, r.here) for r in inventory.rows()}
    assert rows == {("0.6b", True), ("4b", False), ("8b", False), ("me/mine", True), ("demo", False)}
