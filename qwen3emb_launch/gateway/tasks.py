"""Named tasks: instruction, role and dims behind a model alias such as `qwen3-embedding:faq_match`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen3emb_launch.errors import InvalidInputError, nearest
from qwen3emb_launch.gateway.api_errors import ApiError, invalid
from qwen3emb_launch.instructions import TASKS, TEMPLATE

Role = Literal["query", "document"]
ROLES = ("query", "document")
SHIPPED = Path(__file__).with_name("data") / "tasks.yaml"


@dataclass(frozen=True)
class GatewayTask:
    """One row of the table. `dims` None is the full width."""

    name: str
    role: Role
    instruction: str | None
    dims: int | None = None

    def apply(self, text: str, role: Role | None = None) -> str:
        """The exact text to embed."""
        if (role or self.role) == "document" or self.instruction is None:
            return text
        return TEMPLATE.format(task=self.instruction, query=text)


@dataclass(frozen=True)
class Chosen:
    """What a request's model name and headers come to."""

    model: str
    task: GatewayTask | None
    role: Role | None = None


@dataclass(frozen=True)
class TaskTable:
    """All tasks, and the one that a request gets which names none."""

    tasks: dict[str, GatewayTask]
    default: str | None = None

    def choose(self, model: str, task: str | None = None, role: str | None = None) -> Chosen:
        """Take `model[:task[:role]]` apart; the headers count where the name is silent. Raises ApiError 404, 400."""
        base, _, rest = model.partition(":")
        alias_task, _, alias_role = rest.partition(":")
        name = alias_task or task or self.default
        role = alias_role or role or None
        if role is not None and role not in ROLES:
            raise invalid(
                f"unknown role {_short(role)!r}: query or document", "model" if alias_role else None, "bad_role"
            )
        if name is None:
            if role == "query":  # whose instruction would it be?
                known = ", ".join(sorted(self.tasks))
                raise ApiError(404, "task_not_found", f"role 'query' without a task: there are {known}", param="model")
            return Chosen(base, None, None)
        found = self.tasks.get(name)
        if found is None:
            guess = nearest(_short(name), set(self.tasks))
            hint = f"; did you mean {guess!r}?" if guess else ""
            known = ", ".join(sorted(self.tasks))
            raise ApiError(404, "task_not_found", f"no task {_short(name)!r}: there are {known}{hint}", param="model")
        return Chosen(base, found, role)  # type: ignore[arg-type]


def _short(word: str) -> str:
    return word if len(word) <= 80 else word[:80] + "..."


def load(path: Path | None = None) -> TaskTable:
    """Read a table, the shipped one by default. Raises InvalidInputError (`bad_tasks`) with line and column."""
    import yaml

    file = path or SHIPPED
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise _bad(file, str(exc)) from exc
    except UnicodeDecodeError as exc:
        raise _bad(file, f"not UTF-8: {exc}") from exc
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _bad(file, where + str(getattr(exc, "problem", exc))) from exc
    except RecursionError as exc:
        raise _bad(file, "nested too deeply") from exc
    except ValueError as exc:  # a number of thousands of digits
        raise _bad(file, str(exc)) from exc
    return _table(data, file)


def _table(data: Any, file: Path) -> TaskTable:
    if not isinstance(data, dict):
        raise _bad(file, "must be a mapping with `schema` and `tasks`")
    _only(data, {"schema", "default", "tasks"}, "", file)
    if data.get("schema") != 1:
        raise _bad(file, f"schema is {data.get('schema')!r}, this version reads 1")
    rows = data.get("tasks")
    if not isinstance(rows, dict) or not rows:
        raise _bad(file, "`tasks` must be a mapping of at least one task")
    tasks = {str(name): _task(str(name), row, file) for name, row in rows.items()}
    default = data.get("default")
    if default is not None and default not in tasks:
        raise _bad(file, f"`default` names {default!r}, which is not among the tasks")
    return TaskTable(tasks, default)


def _task(name: str, row: Any, file: Path) -> GatewayTask:
    if not name or ":" in name or any(c.isspace() for c in name):
        raise _bad(file, f"task name {name!r} must be a word without spaces and colons")
    row = {} if row is None else row
    if not isinstance(row, dict):
        raise _bad(file, f"task {name}: must be a mapping")
    _only(row, {"dims", "role", "instruction"}, f"task {name}: ", file)
    role = row.get("role", "query")
    if role not in ROLES:
        raise _bad(file, f"task {name}: role {role!r} is neither query nor document")
    dims = row.get("dims")
    if dims is not None and (type(dims) is not int or not 1 <= dims <= 65536):
        raise _bad(file, f"task {name}: dims {dims!r} is not a number of dimensions")
    instruction = row.get("instruction", TASKS[name].instruction if name in TASKS else None)
    if instruction is not None and (not isinstance(instruction, str) or not instruction.strip()):
        raise _bad(file, f"task {name}: instruction must be a sentence")
    if role == "query" and instruction is None:
        raise _bad(file, f"task {name}: a query task needs an instruction")
    return GatewayTask(name, role, instruction, dims)


def _only(row: dict[Any, Any], known: set[str], where: str, file: Path) -> None:
    for key in row:
        if key not in known:
            guess = nearest(str(key), known)
            raise _bad(file, f"{where}unknown key {key!r}" + (f", did you mean {guess!r}?" if guess else ""))


def _bad(file: Path, what: str) -> InvalidInputError:
    return InvalidInputError("bad_tasks", f"{file}: {what}", "see docs/tasks.md for the table's form")
