"""API keys: who may call, how much, compared without telling by timing how much of a guess was right."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from time import monotonic

from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.gateway.api_errors import ApiError
from qwen3emb_launch.gateway.config import KEYS_VARIABLE

log = logging.getLogger(__name__)

OPTIONS = ("rpm", "tpm")


class Allowance:
    """So much a minute, with a minute's worth to save up. None is without limit."""

    def __init__(self, per_minute: int | None) -> None:
        self.per_minute = per_minute
        self._left = float(per_minute or 0)
        self._at = monotonic()

    def take(self, amount: float, now: float) -> float:
        """Take `amount`: 0 when there was enough, else the seconds until there will be.

        More than a minute's worth at once passes when nothing else was taken, and is paid off afterwards.
        """
        if self.per_minute is None:
            return 0.0
        rate = self.per_minute / 60.0
        self._left = min(float(self.per_minute), self._left + (now - self._at) * rate)
        self._at = now
        needed = min(amount, self.per_minute)
        if self._left < needed:
            return (needed - self._left) / rate
        self._left -= amount
        return 0.0


@dataclass
class Client:
    """Who asks. `name` is what logs and metrics may show, never the key."""

    name: str
    admin: bool = False
    requests: Allowance = field(default_factory=lambda: Allowance(None))
    tokens: Allowance = field(default_factory=lambda: Allowance(None))

    def check_rate(self, tokens: int) -> None:
        """Raise ApiError 429 when this client's allowance is used up. `tokens` may be an estimate."""
        now = monotonic()
        for what, allowance, amount in (("requests", self.requests, 1), ("tokens", self.tokens, tokens)):
            seconds = allowance.take(amount, now)
            if seconds:
                message = f"the limit of {allowance.per_minute} {what} a minute is used up"
                raise ApiError(429, "rate_limit_exceeded", message, retry_after=seconds)


class Keyring:
    """The known keys. Empty means anybody may call."""

    def __init__(self, clients: Mapping[str, Client]) -> None:
        self._salt = secrets.token_bytes(32)
        # Looked up by a digest under a secret salt: how long that takes says nothing about a guess's characters.
        self._clients = {self._digest(key): client for key, client in clients.items()}

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def limited(self) -> bool:
        """Whether any key may do only so much a minute."""
        return any(c.requests.per_minute or c.tokens.per_minute for c in self._clients.values())

    def _digest(self, key: str) -> bytes:
        return blake2b(key.encode("utf-8", "surrogatepass"), key=self._salt, digest_size=32).digest()

    def who(self, authorization: str | None) -> Client:
        """The client of an Authorization header. Raises ApiError 401."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "invalid_api_key", "this endpoint wants `Authorization: Bearer YOUR_API_KEY`")
        client = self._clients.get(self._digest(key.strip()))
        if client is None:
            raise ApiError(401, "invalid_api_key", "this API key is not known here")
        return client


def load(path: Path | None, environ: Mapping[str, str] | None = None) -> Keyring:
    """Keys of a file (`[NAME] KEY [rpm=N] [tpm=N] [admin]` a line, # for comments) and of the environment (by commas).

    Raises InvalidInputError (`bad_keys`) with the line's number, never its text.
    """
    clients: dict[str, Client] = {}
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            if path.stat().st_mode & 0o077:
                log.warning("the keys file %s can be read by others: chmod 600 %s", path, path)
        except (OSError, UnicodeDecodeError) as exc:
            raise _bad(f"cannot read the keys file {path}: {getattr(exc, 'strerror', None) or 'not UTF-8'}") from None
        for number, line in enumerate(lines, 1):
            words = line.split()
            if words and not words[0].startswith("#"):
                key, client = _client(words, f"{path}, line {number}")
                if key in clients:
                    raise _bad(f"{path}, line {number}: this key was given before")
                clients[key] = client
        if not clients:
            raise _bad(f"{path} holds no key")
    given = (os.environ if environ is None else environ).get(KEYS_VARIABLE, "")
    for number, key in enumerate(filter(None, map(str.strip, given.split(","))), 1):
        _check_key(key, f"{KEYS_VARIABLE}, key {number}")
        clients.setdefault(key, Client(f"env-{number}"))
    return Keyring(clients)


def _client(words: list[str], where: str) -> tuple[str, Client]:
    bare = [w for w in words if "=" not in w.rstrip("=") and w != "admin"]
    if not 1 <= len(bare) <= 2:
        raise _bad(f"{where}: wanted `[NAME] KEY [rpm=N] [tpm=N] [admin]`")
    limits: dict[str, int] = {}
    for word in words:
        name, is_option, value = word.partition("=")
        if is_option and word not in bare:
            if name not in OPTIONS or not (value.isascii() and value.isdigit()) or int(value) < 1:
                raise _bad(f"{where}: options are rpm=N and tpm=N, N at least 1")
            limits[name] = int(value)
    _check_key(bare[-1], where)
    name = bare[0] if len(bare) == 2 else f"key-{where.rsplit(' ', 1)[-1]}"
    client = Client(name, "admin" in words, Allowance(limits.get("rpm")), Allowance(limits.get("tpm")))
    return bare[-1], client


def _check_key(key: str, where: str) -> None:
    if not (key.isascii() and key.isprintable()):
        raise _bad(f"{where}: a key is made of visible ASCII characters, the ones that HTTP carries safely")


def _bad(what: str) -> InvalidInputError:
    return InvalidInputError("bad_keys", what, "one key a line: NAME KEY [rpm=N] [tpm=N] [admin]")
