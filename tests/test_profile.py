"""Profiles as text: what is read, what is refused and where, and that nothing in a file can crash the reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3emb_launch.errors import Exit, InvalidInputError
from qwen3emb_launch.paths import shipped_profiles
from qwen3emb_launch.profile import Profile, Settings
from qwen3emb_launch.profile_text import LONGEST, parse_profile

SMALLEST = "schema: 1\nname: mine\ndescription: mine\nengine: {flavour: cpu}\n"
FILES = sorted(shipped_profiles().glob("*.yaml"))
SCHEMA = json.loads((Path(__file__).resolve().parents[1] / "docs" / "profile.schema.json").read_text())


def refused(text: str) -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught:
        parse_profile(text, "p.yaml")
    assert caught.value.exit is Exit.INVALID
    return caught.value


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_profiles_are_valid(path: Path) -> None:
    """By the reader and by the published JSON schema, and each is called like its file."""
    text = path.read_text(encoding="utf-8")
    profile = parse_profile(text, str(path))
    assert profile.name == path.stem
    jsonschema.validate(json.loads(json.dumps(yaml.safe_load(text), default=str)), SCHEMA)
    assert Profile.model_validate(yaml.safe_load(yaml.safe_dump(profile.to_dict()))).digest == profile.digest


def test_all_that_were_promised_are_shipped() -> None:
    """Twelve profiles; those with figures carry hardware, versions, date and command, the rest say none."""
    promised = "rtx3090 rtx4090 rtx5090 l4 a10 l40s a100-40g a100-80g h100 h200 cpu demo"
    assert {p.stem for p in FILES} == set(promised.split())


def test_the_published_schema_knows_every_setting() -> None:
    """What the reader knows, the schema knows, and the schema refuses what the reader refuses."""
    assert set(SCHEMA["$defs"]["Settings"]["properties"]) == set(Settings.model_fields)
    for wrong in (
        {"schema": 1},
        {**yaml.safe_load(SMALLEST), "colour": "red"},
        {**yaml.safe_load(SMALLEST), "schema": 2},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)


# Text after SMALLEST, line and column, what the message says.
PROBLEMS = [
    ("settings:\n  mem_fraction_statics: 0.5\n", 6, 3, "unknown key; did you mean mem_fraction_static?"),
    ("settings:\n  tp: '1'\n", 6, 3, "settings.tp: input should be a valid integer (got '1')"),
    ("settings:\n  tp: 0\n", 6, 3, "settings.tp: input should be greater than or equal to 1"),
    ("settings:\n  mem_fraction_static: .inf\n", 6, 3, "finite"),
    ("settings:\n  dtype: int4\n", 6, 3, "'bfloat16', 'float16' or 'float32' (got 'int4')"),
    ("settings: 3\n", 5, 1, "settings: should be a mapping of keys"),
    ("settings: []\n", 5, 1, "settings: should be a mapping of keys"),
    ("modle: 4b\n", 5, 1, "modle: unknown key; did you mean model?"),
    ("zzz: 4b\n", 5, 1, "zzz: unknown key; known: schema, name"),
    ("server: {port: 70000}\n", 5, 10, "server.port: input should be less than or equal to 65535"),
    ("env: {A: 1}\n", 5, 7, "env.A: input should be a valid string"),
    ("env: {'A B': x}\n", 5, 1, "'A B' is no name of an environment variable"),
    ("env: {HF_TOKEN: hf_x}\n", 5, 1, "HF_TOKEN is a secret"),
    ("variants:\n  lean: {settingz: 1}\n", 6, 3, "variants.lean.description: required and missing"),
    ("variants:\n  Lean: {description: x}\n", 6, 3, "variants.Lean"),
    ("evidence:\n  - what: x\n    value: fast\n", 6, 5, "7:5: evidence.0.value: input should be a valid number"),
    ("evidence: some\n", 5, 1, "evidence: input should be 'none' (got 'some')"),
    ("gpu: {names: [x], vram_gib: 1, min_vram_gib: 1, compute_capability: '9.0'}\n", 1, 1, "`gpu` is required with"),
    ("extra_args: --enable-metrics\n", 5, 1, "extra_args"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "column", "message"), PROBLEMS, ids=[p[0][:24] for p in PROBLEMS])
def test_a_problem_has_its_place(text: str, line: int, column: int, message: str) -> None:
    """Line, column, key, what is wrong, and the nearest key that exists."""
    error = refused(SMALLEST + text)
    assert error.code == "bad_profile"
    assert f"p.yaml:{line}:{column}: " in error.message
    assert message in error.message
    first = error.details["problems"][0]
    assert (first["line"], first["column"]) == (line, column)


def test_all_problems_are_told_at_once() -> None:
    """In the order of the file, each on its own line."""
    error = refused("schema: 1\nname: Mine!\nengine: {flavour: cpu, colour: 1}\nsettings: {tp: x}\n")
    lines = [(p["line"], p["path"]) for p in error.details["problems"]]
    assert lines == [(1, "description"), (2, "name"), (3, "engine.colour"), (4, "settings.tp")]
    assert len(error.message.splitlines()) == 4


# Text, line, column, what the message says.
BROKEN = [
    ("", 1, 1, "empty"),
    ("# nothing\n", 1, 1, "empty"),
    ("schema: 1\nname: [x\n", 3, 1, "expected"),
    ("schema: 1\n\tname: x\n", 2, 1, "cannot start any token"),
    ("schema: 1\nschema: 1\n", 2, 1, "'schema' stands here a second time"),
    ("a: &x {b: 1}\nc: *x\n", 2, 4, "alias *x"),
    ("a: !!python/object/apply:os.system ['true']\n", 1, 4, "python/object"),
    ("a: 2026-13-45\n", 1, 1, "cannot be read"),
    ("? [1]\n: 2\n", 1, 3, "unhashable"),
    ("a: \x00\n", 1, 1, "special characters"),
    ("a: 1\n---\nb: 2\n", 2, 1, "another document"),
    ("[" * 3000 + "]" * 3000, 1, 21, "nested more than 20 deep"),
    ("x" * (LONGEST + 1), None, None, "characters"),
]


@pytest.mark.parametrize(
    ("text", "line", "column", "message"), BROKEN, ids=[b[0][:16] + f"-{i}" for i, b in enumerate(BROKEN)]
)
def test_broken_yaml_has_its_place(text: str, line: int | None, column: int | None, message: str) -> None:
    """Broken, doubled, aliased, object-building, too deep or too long: refused with line and column."""
    error = refused(text)
    assert error.code == "bad_yaml"
    assert message in error.message
    if line:
        assert error.message.startswith(f"p.yaml:{line}:{column}: ")


@pytest.mark.parametrize("text", ["3", "[1, 2]", "just words"])
def test_what_is_no_mapping_is_no_profile(text: str) -> None:
    """A list or a word is refused for what it is."""
    assert "mapping" in refused(text).message


def test_a_newer_schema_asks_for_an_upgrade() -> None:
    """Its keys are not even looked at."""
    error = refused("schema: 2\nname: x\nwhatever: 1\n")
    assert (error.code, "pip install -U" in error.hint) == ("profile_newer_schema", True)


def test_variants_change_what_they_state_and_take_back_what_they_null() -> None:
    """Settings are laid over, extra_args appended, env merged, and null gives a decision back to the planner."""
    profile = parse_profile(
        SMALLEST + "settings: {tp: 1, dtype: bfloat16}\nextra_args: [--a]\nenv: {A: '1'}\n"
        "variants: {v: {description: v, settings: {tp: null, page_size: 64}, extra_args: [--b], env: {B: '2'}}}\n",
        "p.yaml",
    )
    varied = profile.variant("v")
    assert varied.name == "mine:v"
    assert varied.settings.given() == {"dtype": "bfloat16", "page_size": 64}
    assert varied.extra_args == ("--a", "--b")
    assert varied.env == {"A": "1", "B": "2"}
    assert varied.digest != profile.digest


def test_the_digest_follows_what_decides_the_launch() -> None:
    """A changed setting changes it; a changed description or evidence does not."""
    base = parse_profile(SMALLEST, "p").digest
    assert parse_profile(SMALLEST + "settings: {tp: 2}\n", "p").digest != base
    assert parse_profile(SMALLEST.replace("description: mine", "description: yours"), "p").digest == base
    assert parse_profile(SMALLEST + "evidence: none\n", "p").digest == base


RANGES = [
    (">=0.5.14,<0.6.0", {"0.5.13.post1": False, "0.5.14": True, "0.5.23": True, "0.6.0": False}),
    ("==0.5.15.post1", {"0.5.15": False, "0.5.15.post1": True}),
    (">0.5.15, <=0.5.16", {"0.5.15": False, "0.5.15.post1": True, "0.5.16": True}),
    (None, {"0.4.0": True}),
]


@pytest.mark.parametrize(("versions", "releases"), RANGES)
def test_version_ranges(versions: str | None, releases: dict[str, bool]) -> None:
    """Post releases sort after their release."""
    line = f"engine: {{flavour: cpu, versions: '{versions}'}}\n" if versions else "engine: {flavour: cpu}\n"
    profile = parse_profile(SMALLEST.replace("engine: {flavour: cpu}\n", line), "p")
    assert {r: profile.engine.admits(r) for r in releases} == releases


def problems(text: str) -> list[dict[str, Any]] | None:
    """What the reader finds wrong; empty for a profile it reads, None for one of a newer schema."""
    try:
        parse_profile(text, "p.yaml")
    except InvalidInputError as error:
        return error.details.get("problems") if error.code != "profile_newer_schema" else None
    return []


def has_places(text: str) -> bool:
    found = problems(text)
    return found is None or all(1 <= p["line"] <= text.count("\n") + 2 and p["column"] >= 1 for p in found)


SEARCH = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SEARCH
@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    """No text raises anything but our own error."""
    assert has_places(text)


@SEARCH
@given(st.text(alphabet="{}[]:,-?!&*#|>'\"%@` \n\tab01.~"))
def test_any_yaml_looking_text_is_read_or_refused(text: str) -> None:
    """Nor does text made of YAML's own signs, alone or after a good beginning."""
    assert has_places(text)
    assert has_places(SMALLEST + text)


KEYS = st.sampled_from([*Profile.model_fields, *Settings.model_fields, "schema", "lean", "x"])
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@SEARCH
@given(st.dictionaries(KEYS, TREES, max_size=6))
def test_any_data_is_read_or_refused_with_places(data: dict[str, Any]) -> None:
    """Right keys with any values: every problem points into the file."""
    assert has_places(yaml.safe_dump({**yaml.safe_load(SMALLEST), **data}, allow_unicode=True))


def test_what_is_read_is_written_back_the_same() -> None:
    """to_dict of a profile, as YAML, reads as the same profile."""
    for path in FILES:
        profile = parse_profile(path.read_text(encoding="utf-8"), str(path))
        again = parse_profile(yaml.safe_dump(profile.to_dict()), "again.yaml")
        assert again == profile


def test_every_key_is_documented() -> None:
    """docs/profiles.md names each setting and each key of a profile."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "profiles.md").read_text(encoding="utf-8")
    keys = [*SCHEMA["properties"], *Settings.model_fields]
    assert [key for key in keys if f"`{key}`" not in page] == []
