"""How large a vector index is, by dimensions: what fewer dimensions really save."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3emb_launch.errors import InvalidInputError

DIMS = (128, 256, 512, 1024, 2560, 4096)
GRAPH_LINKS = 16  # HNSW's M
GRAPH_BYTES_A_LINK = 10  # hnswlib's parameter guide: M * 8 to 10 bytes an element


@dataclass(frozen=True)
class IndexSize:
    """Bytes of an index of `vectors` vectors. `hnsw` is float32 with a graph of M = 16; `share` against `full` dims."""

    dims: int
    vectors: int
    float32: int
    float16: int
    int8: int
    hnsw: int
    share: float


def index_sizes(vectors: int, full: int = 2560, dims: tuple[int, ...] = DIMS) -> list[IndexSize]:
    """Sizes by dimensions, up to `full`. Raises InvalidInputError (`bad_load`)."""
    if vectors < 1 or full < 1:
        raise InvalidInputError("bad_load", f"{vectors} vectors of {full} dimensions", "for example --vectors 10000000")
    chosen = sorted({d for d in dims if d < full} | {full})
    graph = GRAPH_LINKS * GRAPH_BYTES_A_LINK
    return [
        IndexSize(d, vectors, 4 * d * vectors, 2 * d * vectors, d * vectors, (4 * d + graph) * vectors, d / full)
        for d in chosen
    ]
