"""The catalog's numbers agree with each other and with the published ones."""

from __future__ import annotations

import pytest

from qwen3emb_launch.catalog import CATALOG, find_model, shape_from_config, unknown_model
from qwen3emb_launch.errors import InvalidInputError

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151669,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("key", CATALOG)
def test_published_file_sizes_are_two_bytes_a_parameter(key: str) -> None:
    """The safetensors are 2 x parameters and a header of tens of kilobytes: the shape is the checkpoint's."""
    model = CATALOG[key]
    assert 0 < model.file_bytes - 2 * model.shape.parameters < 60_000


@pytest.mark.parametrize(
    ("key", "parameters", "kv", "gflop"),
    [
        ("0.6b", 595_776_512, 114_688, (0.94, 1.12, 1.82)),
        ("4b", 4_021_774_336, 147_456, (7.42, 7.87, 9.68)),
        ("8b", 7_567_295_488, 147_456, (14.04, 14.50, 16.31)),
    ],
)
def test_computed_facts_are_the_documented_ones(
    key: str, parameters: int, kv: int, gflop: tuple[float, float, float]
) -> None:
    shape = CATALOG[key].shape
    assert (shape.parameters, shape.kv_bytes_per_token()) == (parameters, kv)
    assert tuple(round(shape.flops_per_token(n) / 1e9, 2) for n in (512, 2048, 8192)) == gflop


@pytest.mark.parametrize("name", ["4b", "4B", " 4b ", "Qwen/Qwen3-Embedding-4B", "qwen/qwen3-embedding-4b"])
def test_models_are_found_by_either_name(name: str) -> None:
    assert find_model(name) is CATALOG["4b"]


def test_a_mistyped_name_gets_the_nearest_one() -> None:
    assert "'Qwen/Qwen3-Embedding-4B'" in unknown_model("Qwen/Qwen3-Embeding-4B").hint
    assert find_model("4") is None


def test_a_config_gives_the_catalogs_shape() -> None:
    assert shape_from_config(CONFIG) == CATALOG["0.6b"].shape


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
def test_a_config_without_a_number_names_it(missing: str) -> None:
    with pytest.raises(InvalidInputError, match=missing):
        shape_from_config({k: v for k, v in CONFIG.items() if k != missing})


@pytest.mark.parametrize("key", CATALOG)
def test_larger_models_score_higher(key: str) -> None:
    """A row copied into the wrong model would break the order that the authors published."""
    order = list(CATALOG)
    if key != order[0]:
        smaller = CATALOG[order[order.index(key) - 1]]
        for bench, score in CATALOG[key].scores.items():
            assert score > smaller.scores[bench]
