"""What a model's name means: a catalog key, a hub id, a folder, or the demo model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen3emb_launch.catalog import CatalogModel, find_model, unknown_model
from qwen3emb_launch.errors import InvalidInputError

DEMO = "demo"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_PATH_STARTS = ("/", "./", "../", "~")


@dataclass(frozen=True)
class ModelName:
    """A name, understood. `repo` is the hub id for kind `repo`, `folder` the absolute path for kind `folder`."""

    given: str
    kind: Literal["demo", "folder", "repo"]
    repo: str = ""
    folder: Path = Path()
    model: CatalogModel | None = None

    @property
    def short(self) -> str:
        """How to name it in a command: the catalog key where there is one."""
        return self.model.key if self.model else (self.repo or self.given)


def parse(given: str) -> ModelName:
    """Catalog names win over folders of the same name, folders over other hub ids (as everywhere around the hub).

    Raises InvalidInputError: `unknown_model`, `not_a_model` for a path where there is no folder, or `not_utf8`.
    """
    name = given.strip()
    if name == DEMO:
        return ModelName(given, "demo")
    known = find_model(name)
    if known:
        return ModelName(given, "repo", repo=known.hub_id, model=known)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if any("\udc80" <= letter <= "\udcff" for letter in str(path.absolute())):
            raise InvalidInputError(
                "not_utf8", f"{given!a} is no UTF-8 name, as state, logs and requests need", "rename the folder"
            )
        return ModelName(given, "folder", folder=path.absolute())
    if name.startswith(_PATH_STARTS):
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise InvalidInputError(
            "not_a_model",
            f"{path} {what}",
            "give the folder that holds config.json, tokenizer.json and the safetensors",
        )
    if _HUB_ID.fullmatch(name) and ".." not in name and "--" not in name:
        return ModelName(given, "repo", repo=name)
    raise unknown_model(given)
