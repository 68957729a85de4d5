"""Folders as models: what is accepted, and what is said of the rest. Also every foreign error's translation."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from loopback_hub import checkpoint, safetensors

from qwen3emb_launch import hub
from qwen3emb_launch.errors import InvalidInputError, LaunchError
from qwen3emb_launch.hub import huggingface, modelscope
from qwen3emb_launch.hub.checkpoint import appended_token
from qwen3emb_launch.hub.listing import RemoteFile
from qwen3emb_launch.hub.names import parse


@pytest.fixture
def folder(demo_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_model, tmp_path / "model"))


@pytest.fixture
def sharded(demo_model: Path, tmp_path: Path) -> Path:
    root = tmp_path / "sharded"
    for name, content in checkpoint(demo_model, shards=(1000, 500)).items():
        if not name.endswith((".bin", ".onnx", ".md")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    return root


def test_a_folder_is_a_model(folder: Path) -> None:
    facts = hub.resolve(str(folder))
    assert (facts.name, facts.path, facts.source, facts.revision) == (str(folder), folder, "folder", None)
    assert facts.weight_bytes == (folder / "model.safetensors").stat().st_size
    assert (facts.eos_token_id, facts.warnings) == (256, ())


def test_a_sharded_folder_is_a_model(sharded: Path) -> None:
    assert hub.resolve(str(sharded)).weight_bytes == sum(p.stat().st_size for p in sharded.glob("*.safetensors"))


def damage_shard(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def cut_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2] + "1")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("harm", "code", "named"),
    [
        (lambda f: (f / "config.json").unlink(), "not_a_model", "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "damaged_file", "config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "damaged_file", "config.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "not_qwen3", "bert"),
        (lambda f: (f / "config.json").write_text('{"model_type": "qwen3"}'), "bad_config", "num_attention_heads"),
        (lambda f: (f / "model.safetensors").unlink(), "no_weights", "model.safetensors"),
        (pickle_only, "pickle_only", "pytorch_model.bin"),
        (damage_shard, "damaged_shard", "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "damaged_shard", "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "damaged_shard", "model.safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), "missing_tokenizer", "tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("x"), "damaged_file", "tokenizer.json"),
        (cut_tokenizer, "damaged_file", "tokenizer.json"),
        (
            lambda f: (f / "tokenizer.json").write_text(
                '{"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "?"}}]}}'
            ),
            "damaged_file",
            "post_processor",
        ),
    ],
)
def test_a_folder_that_cannot_be_served_says_which_file(folder: Path, harm, code: str, named: str) -> None:
    harm(folder)
    with pytest.raises(InvalidInputError) as caught:
        hub.resolve(str(folder))
    assert caught.value.code == code
    assert named in caught.value.message


def test_a_token_named_like_the_setting_does_not_mislead(folder: Path) -> None:
    """The vocabulary may hold any word, and may stand before the settings."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["post_processor"] = 9
    reordered = {"model": tokenizer.pop("model"), **tokenizer}
    (folder / "tokenizer.json").write_text(json.dumps(reordered))
    assert hub.resolve(str(folder)).eos_token_id == 256


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidInputError) as caught:
        hub.local(str(sharded))
    assert caught.value.code == "missing_shard"
    assert caught.value.details == {"missing": ["model-00002-of-00002.safetensors"]}


def test_an_index_cannot_name_files_elsewhere(sharded: Path) -> None:
    index = {"weight_map": {"weight": "../model.safetensors"}}
    (sharded.parent / "model.safetensors").write_bytes(safetensors(b"x"))
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidInputError) as caught:
        hub.local(str(sharded))
    assert caught.value.code == "damaged_file"


def test_what_is_served_otherwise_than_its_author_meant_is_a_warning(sharded: Path) -> None:
    """No appended end token, another pooling, a dense layer behind it: served all the same, and said."""
    tokenizer = json.loads((sharded / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {"type": "ByteLevel"}
    (sharded / "tokenizer.json").write_text(json.dumps(tokenizer))
    (sharded / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (sharded / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    facts = hub.resolve(str(sharded))
    assert facts.eos_token_id is None
    assert [w.split()[0] for w in facts.warnings] == ["the", "1_Pooling/config.json", "modules.json"]


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<end>", "type_id": 0}}],
    "special_tokens": {"<end>": {"id": "<end>", "ids": [151643], "tokens": ["<end>"]}},
}


@pytest.mark.parametrize(
    ("post_processor", "token"),
    [
        (None, None),
        ({"type": "ByteLevel"}, None),
        (TEMPLATE, 151643),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}, 151643),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}]}, None),
        ({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}, None),
        ({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}, 2),
    ],
)
def test_the_appended_token_is_read_from_the_post_processor(post_processor, token: int | None) -> None:
    assert appended_token(post_processor) == token


@pytest.mark.parametrize(
    ("name", "kind", "short"),
    [
        ("4b", "repo", "4b"),
        ("4B", "repo", "4b"),
        ("qwen/qwen3-embedding-8b", "repo", "8b"),
        ("me/my-model_1.0", "repo", "me/my-model_1.0"),
        ("demo", "demo", "demo"),
    ],
)
def test_names_are_understood(name: str, kind: str, short: str) -> None:
    assert (parse(name).kind, parse(name).short) == (kind, short)


def test_a_folder_wins_over_a_hub_id_but_not_over_the_catalog(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("me/mine", "4b"):
        shutil.copytree(folder, tmp_path / name)
    assert (parse("me/mine").kind, parse("4b").kind, parse("./4b").kind) == ("folder", "repo", "folder")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("4bb", "unknown_model"),
        ("", "unknown_model"),
        ("a/b/c", "unknown_model"),
        ("../nowhere", "not_a_model"),
        ("/etc/passwd", "not_a_model"),
        ("a/..", "unknown_model"),
    ],
)
def test_names_that_mean_nothing(name: str, code: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        hub.local(name)
    assert caught.value.code == code


def test_a_folder_of_another_encoding_is_refused(tmp_path: Path) -> None:
    """Named on a system of another encoding: said, instead of a crash where its path is written down."""
    gbk = tmp_path / os.fsdecode("模型".encode("gbk"))
    gbk.mkdir()
    with pytest.raises(InvalidInputError, match="no UTF-8 name") as caught:
        hub.local(str(gbk))
    assert caught.value.code == "not_utf8"


def test_revisions_and_downloads_are_for_hubs_only(folder: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        hub.resolve(str(folder), revision="main")
    assert caught.value.code == "no_revisions"
    with pytest.raises(InvalidInputError) as caught:
        hub.download("demo")
    assert caught.value.code == "nothing_to_download"
    with pytest.raises(InvalidInputError) as caught:
        hub.remove(str(folder))
    assert caught.value.code == "not_ours"


def test_git_hashes_are_gits(tmp_path: Path) -> None:
    """`git hash-object` of "hello\\n" is the well-known ce013625…"""
    file = RemoteFile("x", 6, git_sha1="ce013625030ba8dba906f756967f9e9ca394464a")
    digest = file.hasher()
    digest.update(b"hello\n")
    assert file.found(digest) == file.expected


def leaves(kind: type[BaseException]) -> list[type[BaseException]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in leaves(child))]


def test_every_network_error_of_the_clients_is_told_as_one() -> None:
    """No class of theirs that means network, refusal or protocol ends as `garbled` or as a disk's error."""
    import httpx2
    import modelscope_hub as theirs
    import requests

    request = httpx2.Request("GET", "http://hub")
    translated = {}
    for kind in leaves(httpx2.HTTPError):
        error = kind.__new__(kind)
        Exception.__init__(error, "text")
        error.response = httpx2.Response(500, request=request)
        translated[kind] = huggingface.translate(error, "a/b", "main")
    for kind in [*leaves(theirs.APIError), *leaves(theirs.NetworkError), *leaves(requests.RequestException)]:
        error = kind("text", "", 0) if issubclass(kind, json.JSONDecodeError) else kind("text")
        translated[kind] = modelscope.translate(error, "a/b", "main")
    assert len(translated) > 50
    assert {k.__name__: e.code for k, e in translated.items() if e.code in ("hub_garbled", "disk_error")} == {}
    assert all(isinstance(e, LaunchError) and e.hint for e in translated.values())
