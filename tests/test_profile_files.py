"""Profiles on disk, and the `profiles` commands: shipped and own, found, copied, shown, explained, checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from planning_cases import card

from qwen3emb_launch import gpu, profile_files
from qwen3emb_launch.cli.app import run
from qwen3emb_launch.engines import releases
from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.paths import paths, shipped_profiles

OWN = "schema: 1\nname: {name}\ndescription: mine\nengine: {{flavour: cpu}}\n"


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, no engine, no model: what commands say there does not depend on the machine that runs the tests."""
    monkeypatch.setattr(gpu, "inventory", lambda environ=None: [])
    for name in ("QWEN3EMB_DATA_DIR", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def own(name: str, text: str | None = None) -> Path:
    folder = paths().profiles
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(OWN.format(name=name) if text is None else text, encoding="utf-8")
    return path


def code(name: str) -> tuple[str, str]:
    with pytest.raises(InvalidInputError) as caught:
        profile_files.load(name)
    return caught.value.code, caught.value.hint


def test_own_profiles_win_over_shipped_ones() -> None:
    """The same name in the user's folder hides the shipped file, and the list says so."""
    path = own("h100")
    assert profile_files.load("h100").description == "mine"
    entry = next(e for e in profile_files.available() if e.name == "h100")
    assert (entry.path, entry.origin, entry.shadows) == (path, "user", shipped_profiles() / "h100.yaml")
    assert profile_files.profiles()[0].description == "mine"


def test_load_by_path_and_variant(tmp_path: Path) -> None:
    """A file may be called anything, and a variant is named behind a colon."""
    copy = tmp_path / "copy.yml"
    shutil.copy(shipped_profiles() / "rtx4090.yaml", copy)
    assert profile_files.load(str(copy)).name == "rtx4090"
    assert profile_files.load(f"{copy}:lean").name == "rtx4090:lean"
    assert profile_files.load("rtx4090:lean").settings.kv_pool == "none"


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    """Unknown name, unknown variant, missing file, folder, no text, file of another name, newer schema."""
    assert code("rtx409")[1] == "did you mean rtx4090?"
    assert code("nothing-like-it")[0] == "unknown_profile"
    assert code("../etc/passwd")[0] == "profile_unreadable"
    assert code("rtx4090:lea") == ("unknown_variant", "did you mean rtx4090:lean?")
    assert code("cpu:lean")[0] == "unknown_variant"
    assert code("")[0] == "unknown_profile"
    assert code(":")[0] == "unknown_profile"
    assert code(str(tmp_path / "none.yaml"))[0] == "profile_unreadable"
    assert code(f"{tmp_path}/")[0] == "profile_unreadable"
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert code(str(binary))[0] == "profile_unreadable"
    own("other", OWN.format(name="mine"))
    assert code("other") == ("bad_profile", "rename the file, or say `name: other`")
    own("future", "schema: 7\n")
    assert code("future")[0] == "profile_newer_schema"


def test_a_broken_own_profile_is_listed_with_its_error() -> None:
    """One broken file does not hide the others."""
    own("broken", "schema: [")
    entries = {e.name: e for e in profile_files.available()}
    assert entries["broken"].error.code == "bad_yaml"
    assert entries["h100"].profile is not None


def test_create_copies_with_comments_and_without_evidence() -> None:
    """The copy keeps the source's comments, takes the new name and model, and claims no figures."""
    path = profile_files.create("office", source="rtx4090", model="0.6b")
    text = path.read_text(encoding="utf-8")
    profile = profile_files.load("office")
    assert "# spelled fp8_e4m3" in text
    assert (profile.model, profile.evidence, profile.settings.mem_fraction_static) == ("0.6b", "none", 0.85)
    assert path.stat().st_mode & 0o777 == 0o600
    assert profile_files.load("office:lean").name == "office:lean"


def test_create_drops_measured_figures_of_the_source() -> None:
    """Figures measured for one profile are not claimed by its copy."""
    figures = (
        "evidence:\n  - what: texts/s\n    value: 1\n    unit: 1/s\n    hardware: x\n    versions: {sglang: '0'}\n"
        "    date: 2026-01-01\n    command: c\n"
    )
    own("measured", OWN.format(name="measured") + figures + "model: 4b\n")
    profile_files.create("copy", source="measured")
    assert (profile_files.load("copy").evidence, profile_files.load("copy").model) == ("none", "4b")


def test_create_from_a_variant_takes_it_in() -> None:
    """The variant's settings become the copy's own."""
    profile_files.create("lean-office", source="rtx4090:lean")
    profile = profile_files.load("lean-office")
    assert (profile.settings.kv_pool, profile.settings.mem_fraction_static, profile.variants) == ("none", None, {})


def test_create_refuses_bad_names_and_existing_files() -> None:
    """Nothing is overwritten."""
    for name in ("Bad Name", "../x", "", "-x"):
        with pytest.raises(InvalidInputError) as caught:
            profile_files.create(name, source="cpu")
        assert caught.value.code == "bad_profile_name"
    before = own("mine").read_text()
    with pytest.raises(InvalidInputError) as caught:
        profile_files.create("mine", source="cpu")
    assert (caught.value.code, own_text("mine")) == ("profile_exists", before)
    with pytest.raises(InvalidInputError):
        profile_files.create("other", source="cpuu")


def own_text(name: str) -> str:
    return (paths().profiles / f"{name}.yaml").read_text()


def test_an_unwritable_folder_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file where the folder should be: exit status 3, nothing left behind."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("QWEN3EMB_CONFIG_DIR", str(blocked))
    with pytest.raises(UnfitError):
        profile_files.create("mine", source="cpu")
    assert blocked.read_text() == ""


def envelope(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    status = run(["profiles", *words, "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return status, json.loads(out)


def test_list_marks_the_profile_of_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one whose GPU is here matches, and every row says where it comes from and what was measured."""
    monkeypatch.setattr(gpu, "inventory", lambda environ=None: [card("NVIDIA L4", 22.5, (8, 9))])
    status, body = envelope(capsys, "list")
    assert status == 0
    assert [row["name"] for row in body["result"] if row["matches"]] == ["l4"]
    assert {row["origin"] for row in body["result"]} == {"shipped"}
    assert run(["profiles", "list"]) == 0
    assert "* l4, l4:pooled, l4:fp8\t4b" in capsys.readouterr().out


def test_show_prints_the_file_or_the_resolved_variant(capsys: pytest.CaptureFixture[str]) -> None:
    """stdout is YAML that reads as the profile."""
    assert run(["profiles", "show", "rtx4090"]) == 0
    assert capsys.readouterr().out == (shipped_profiles() / "rtx4090.yaml").read_text()
    assert run(["profiles", "show", "rtx4090:lean"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["name"], shown["settings"]["kv_pool"]) == ("rtx4090:lean", "none")
    assert envelope(capsys, "show", "demo")[1]["result"]["model"] == "demo"


@pytest.mark.parametrize("name", sorted(p.stem for p in shipped_profiles().glob("*.yaml")))
def test_explain_works_on_a_bare_machine(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Every shipped profile can be explained where neither GPU, engine nor model is; what is assumed is said, and is
    what `engine install` would bring."""
    status, body = envelope(capsys, "explain", name)
    assert status == 0, body
    result = body["result"]
    assert all(s["origin"] and s["reason"] for s in result["plan"]["settings"])
    assert result["command"].split()[1:3] == ["-m", "qwen3emb_engine_plugin.serve"]
    version = releases.build(profile_files.load(name).engine.flavour).version
    assert any(f"engine is installed: sglang {version} with plugin" in note for note in result["assumptions"])


def test_explain_of_a_profile_for_other_releases(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the release that would be installed is not for the profile, a recorded one that is."""
    own(
        "newer",
        "schema: 1\nname: newer\ndescription: mine\nmodel: 4b\nengine: {flavour: cuda, versions: '>=0.5.20'}\n"
        "gpu: {names: [NVIDIA H100*], vram_gib: 80, min_vram_gib: 70, compute_capability: '9.0'}\n",
    )
    status, body = envelope(capsys, "explain", "newer")
    assert status == 0, body
    assert any("sglang 0.5.23 is assumed" in note for note in body["result"]["assumptions"])


def test_explain_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with origin and reason, the memory's arithmetic, the command, and that nothing was measured."""
    monkeypatch.setenv("QWEN3EMB_SET_MAX_RUNNING_REQUESTS", "32")
    assert run(["profiles", "explain", "rtx4090:lean", "--model", "8b", "--set", "page_size=1"]) == 0
    out = capsys.readouterr().out
    assert "max_running_requests\t32\tenv\tQWEN3EMB_SET_MAX_RUNNING_REQUESTS" in out
    assert "page_size\t1\tflag\t--set page_size=1" in out
    assert "weights 15.13 GB + unused lm_head 1.24 GB" in out
    assert "--prefill-only-disable-kv-cache" in out
    assert "evidence: none" in out


def test_explain_shows_measured_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """Evidence is shown with its hardware, date and command."""
    own(
        "measured",
        OWN.format(name="measured")
        + "model: demo\nevidence:\n  - {what: short queries, value: 610, unit: texts/s, hardware: H100, "
        "versions: {sglang: 0.5.16}, date: 2026-11-22, command: qwen3emb bench}\n",
    )
    assert run(["profiles", "explain", "measured"]) == 0
    assert "short queries: 610 texts/s on H100, 2026-11-22; again by `qwen3emb bench`" in capsys.readouterr().out


@pytest.mark.parametrize("entry", profile_files.available(), ids=lambda entry: entry.name)
def test_explain_says_plainly_what_was_measured(
    entry: profile_files.ProfileFile, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every shipped profile: each figure with hardware, date and command, or that there is none."""
    assert run(["profiles", "explain", entry.name]) == 0
    said = capsys.readouterr().out.split("\nevidence:")[1]
    if entry.profile.evidence == "none":
        assert said == " none. Nobody has measured this profile on its hardware yet.\n"
        return
    lines = [line for line in said.splitlines() if line]
    assert len(lines) == len(entry.profile.evidence)
    for line, figure in zip(lines, entry.profile.evidence, strict=True):
        assert all(word in line for word in (figure.what, figure.hardware, str(figure.date), figure.command)), line


def test_explain_of_a_model_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    """A hub id that is not on disk has no known shape."""
    status, body = envelope(capsys, "explain", "h100", "--model", "owner/tuned")
    assert (status, body["error"]["code"]) == (2, "unknown_model")
    assert "qwen3emb download owner/tuned" in body["error"]["hint"]


def test_validate_tells_good_from_bad(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Schema, engine options, known-bad combinations and the fit on its own card; every file is reported."""
    good = shipped_profiles() / "h100.yaml"
    h100 = yaml.safe_load(good.read_text())
    bad = {
        "flag": {**h100, "extra_args": ["--enable-prompt-trust-remote-code"]},
        "combination": {**h100, "model": "8b", "settings": {"dtype": "float16"}},
        "memory": {**h100, "gpu": {**h100["gpu"], "vram_gib": 8, "min_vram_gib": 7}},
        "key": {**h100, "settings": {"tpp": 1}},
        "variant": {**h100, "variants": {"x": {"description": "x", "extra_args": ["--nope"]}}},
    }
    files = []
    for name, data in bad.items():
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(data), encoding="utf-8")
    assert envelope(capsys, "validate", str(good))[0] == 0
    status, body = envelope(capsys, "validate", str(good), *map(str, files), str(tmp_path / "missing.yaml"))
    assert (status, body["error"]["code"]) == (2, "bad_profile")
    found = {Path(r["profile"]).stem: r["problems"] for r in body["result"]}
    assert found.pop("h100") == []
    for name, word in {
        "flag": "--trust-remote-code", "combination": "float16", "memory": "does not fit", "key": "settings.tpp",
        "variant": "h100:x: this engine has no option --nope", "missing": "No such file",
    }.items():  # fmt: skip
        assert word in " ".join(found[name]), name


def test_validate_takes_names_and_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Shipped profiles, one's own, variants and files in one call; a name is a profile's before it is a file's."""
    monkeypatch.chdir(tmp_path)
    profile_files.create("office", source="rtx4090")
    text = (shipped_profiles() / "h100.yaml").read_text()
    for file in ("plain", "a:b.yaml", "two.yaml"):
        (tmp_path / file).write_text(text)
    (tmp_path / "l4").write_text("nonsense: 1")
    words = ["h100", "rtx4090:lean", "office", "l4", "plain", "./plain", "a:b.yaml", "./a:b.yaml", "two.yaml:fp8"]
    assert run(["profiles", "validate", *words]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{word}: ok" for word in words]
    status, body = envelope(capsys, "validate", "office", "h10", "rtx4090:leen", "./l4", "./gone:fp8")
    assert (status, body["error"]["code"]) == (2, "bad_profile")
    assert body["error"]["message"].startswith("4 of 5 profiles are not valid: h10, rtx4090:leen, ./l4")
    said = {r["profile"]: " ".join(r["problems"]) for r in body["result"]}
    assert said.pop("office") == ""
    for word, name in {
        "did you mean h100?": "h10", "did you mean rtx4090:lean?": "rtx4090:leen", "nonsense": "./l4",
        "No such file": "./gone:fp8",
    }.items():  # fmt: skip
        assert word in said[name]


def test_new_makes_a_profile_that_validates(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --from it copies the one for this machine; its path is the data on stdout."""
    status, body = envelope(capsys, "new", "here")
    assert (status, Path(body["result"]["path"]).name) == (0, "here.yaml")
    assert profile_files.load("here").engine.flavour == "cpu"
    assert run(["profiles", "validate", "here", body["result"]["path"]]) == 0
    capsys.readouterr()
    assert envelope(capsys, "new", "here")[1]["error"]["code"] == "profile_exists"
