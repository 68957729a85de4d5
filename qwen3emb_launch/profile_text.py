"""A profile's YAML text, read with positions: every complaint names line, column and the nearest key that exists.

Only plain data is read: no tags that build objects, no aliases (a profile needs none, and they can be nested without
end), no key twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from qwen3emb_launch.errors import InvalidInputError, nearest

if TYPE_CHECKING:
    from qwen3emb_launch.profile import Profile

LONGEST = 256 * 1024  # characters; a profile is a page or two
DEEPEST = 20  # levels; a profile has five, and the YAML reader's time grows with the square of them
VALIDATE_HINT = (
    "qwen3emb profiles validate FILE shows every problem of a profile; docs/profile.schema.json has the keys"
)

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a profile; line and column count from one, as editors do."""

    line: int
    column: int
    path: str
    message: str

    def at(self, source: str) -> str:
        """`file:line:column: key: message`, the form editors and CI systems jump to."""
        where = f"{source}:{self.line}:{self.column}"
        return f"{where}: {self.path}: {self.message}" if self.path else f"{where}: {self.message}"


def parse_profile(text: str, source: str) -> Profile:
    """The profile in `text`. `source` is how messages call it (a path).

    Raises InvalidInputError: `bad_yaml`, `bad_profile` (details.problems lists all), `profile_newer_schema`.
    """
    from pydantic import ValidationError

    from qwen3emb_launch.profile import SCHEMA, Profile

    root = _compose(text, source)
    data = _construct(root, source)
    if not isinstance(data, dict):
        raise _bad_profile([_problem(root, (), "a profile is a mapping of keys, such as `schema: 1`")], source)
    schema = data.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        raise InvalidInputError(
            "profile_newer_schema",
            f"{source}: schema {schema} is newer than this launcher reads (schema {SCHEMA})",
            "upgrade the launcher: pip install -U qwen3emb-launch",
        )
    try:
        return Profile.model_validate(data)
    except ValidationError as exc:
        problems = [
            _problem(root, tuple(e["loc"]), e["msg"], e["type"])
            for e in exc.errors(include_url=False, include_context=False)
            if not _other_branch(data, tuple(e["loc"]), e["type"])
        ]
        raise _bad_profile(problems, source) from None


def _compose(text: str, source: str) -> yaml.Node:
    if len(text) > LONGEST:
        raise InvalidInputError(
            "bad_yaml", f"{source}: {len(text)} characters; a profile has at most {LONGEST}", VALIDATE_HINT
        )
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise _bad_yaml(source, event.start_mark, f"alias *{event.anchor}: write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise _bad_yaml(source, event.start_mark, f"nested more than {DEEPEST} deep")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as exc:
        raise _bad_yaml(source, exc.problem_mark or exc.context_mark, exc.problem or exc.context or "broken") from None
    except (yaml.YAMLError, ValueError) as exc:
        raise _bad_yaml(source, None, " ".join(str(exc).split())) from None
    if root is None:
        raise _bad_yaml(source, None, "empty: a profile starts with `schema: 1`")
    return root


def _construct(root: yaml.Node, source: str) -> Any:
    duplicate = _duplicate_key(root)
    if duplicate is not None:
        raise _bad_yaml(source, duplicate.start_mark, f"key {duplicate.value!r} stands here a second time")
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as exc:
        raise _bad_yaml(source, exc.problem_mark or exc.context_mark, exc.problem or "broken") from None
    except (yaml.YAMLError, ValueError, OverflowError) as exc:
        raise _bad_yaml(source, root.start_mark, f"a value that cannot be read: {exc}") from None
    finally:
        loader.dispose()


def _duplicate_key(node: yaml.Node) -> yaml.ScalarNode | None:
    """The second occurrence of a key within one mapping; YAML itself would keep the last without a word."""
    todo = [node]
    while todo:
        current = todo.pop()
        if isinstance(current, yaml.SequenceNode):
            todo += current.value
        elif isinstance(current, yaml.MappingNode):
            seen = set()
            for key, value in current.value:
                todo.append(value)
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        return key
                    seen.add(key.value)
    return None


def _other_branch(data: Any, loc: Path, kind: str) -> bool:
    """`evidence` may be the word `none` or a list: a complaint about the form that was not chosen says nothing."""
    if "evidence" not in loc or loc[-1] == "evidence":
        return False
    branch = str(loc[loc.index("evidence") + 1])
    chosen: Any = data
    for step in loc[: loc.index("evidence") + 1]:
        chosen = chosen[step]
    return branch.startswith("literal") if isinstance(chosen, list) else branch.startswith("tuple")


def _problem(root: yaml.Node, loc: Path, message: str, kind: str = "") -> Problem:
    from qwen3emb_launch.profile import keys_at

    path = tuple(step for step in loc if not str(step).startswith(("literal[", "tuple[")) and step != "[key]")
    node, key = _find(root, path)
    text = message[0].lower() + message[1:] if message else message
    text = text.removeprefix("value error, ")
    if kind == "extra_forbidden":
        known = keys_at(path[:-1])
        guess = nearest(str(path[-1]), known)
        text = "unknown key" + (f"; did you mean {guess}?" if guess else f"; known: {', '.join(known)}")
    elif kind == "missing":
        text = "required and missing"
    elif kind in ("model_type", "dict_type"):
        text = "should be a mapping of keys"
    elif isinstance(node, yaml.ScalarNode) and path:
        text += f" (got {node.value!r})"
    mark = (key or node).start_mark
    return Problem(mark.line + 1, mark.column + 1, ".".join(str(step) for step in path), text)


def _find(root: yaml.Node, path: Sequence[str | int]) -> tuple[yaml.Node, yaml.Node | None]:
    """The node at `path` and its key's, or the last ones on the way there that exist."""
    node, key = root, None
    for step in path:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(step)), None)
            if pair is None:
                break
            key, node = pair
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            key, node = None, node.value[step]
        else:
            break
    return node, key


def _bad_profile(problems: list[Problem], source: str) -> InvalidInputError:
    problems = sorted(problems, key=lambda p: (p.line, p.column))
    return InvalidInputError(
        "bad_profile",
        "\n".join(problem.at(source) for problem in problems),
        VALIDATE_HINT,
        {"problems": [vars(problem) for problem in problems]},
    )


def _bad_yaml(source: str, mark: Any, message: str) -> InvalidInputError:
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
    problem = Problem(line, column, "", message)
    return InvalidInputError("bad_yaml", problem.at(source), VALIDATE_HINT, {"problems": [vars(problem)]})
