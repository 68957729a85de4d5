"""Token counts, EOS, truncation and foreign token ids, with the model's own tokenizer.

The `tokenizers` package loads a checkpoint's tokenizer.json; the engine does the same, so the counts agree. Without a
checkpoint at hand (an upstream elsewhere) nothing here is known: the engine's own refusals are passed on.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.gateway.api_errors import ApiError, invalid
from qwen3emb_launch.gateway.openapi import HIGHEST_ID

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Overflow = Literal["refuse", "truncate"]
Foreign = Literal["refuse", "decode", "accept"]

INLINE_CHARS = 4_000  # up to here tokenising on the event loop is cheaper than a thread (about 1 ms)
COMPOSING = 4  # normalisation may join that many characters into one (Hangul, accents)
CHECKED_IDS = 512  # of a list of ids, that many are looked at to tell whose they are
PARTS_OF_A_CHARACTER = 3  # ids that a cut may have left of one
SAMPLES = (  # what tokenizers disagree about: spaces, composed and wide letters, digits, marks of other models
    "Which vectors do you make?",
    "  spaces before,\n\n\tbetween  and after ",
    "nai\u0308ve caf\u00e9 \uff21\uff22 \u00bd",
    "包裹没有到怎么办？東京 서울",
    "def f(x): return x**2  # 12345.678",
    "🙂👩‍👧 عربي हिन्दी",
    "I'LL don't <|endoftext|> <|im_start|>",
)
BROKEN = "\ufffd"  # what incomplete bytes decode to

LANGCHAIN_HINT = (
    "send text instead; with LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False), "
    "which otherwise sends OpenAI's cl100k token ids"
)


@dataclass(frozen=True)
class Prepared:
    """One input, ready for the engine. `tokens` counts EOS; `exact` is False where nobody could count.

    `ids` are a text's own, EOS included, for an engine that takes them: it need not tokenise again.
    """

    payload: str | list[int]
    tokens: int
    exact: bool
    truncated: bool = False
    ids: list[int] | None = field(default=None, compare=False)

    def wire(self, as_ids: bool) -> str | list[int]:
        """What goes to an engine."""
        return self.ids if as_ids and self.ids is not None else self.payload


class TokenRules:
    """What an input must keep to. All of it optional: what is not known is not checked here."""

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        *,
        max_tokens: int | None = None,
        vocab_size: int | None = None,
        eos_id: int | None = None,
        overflow: Overflow = "refuse",
        foreign: Foreign = "refuse",
    ) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.highest_id = vocab_size - 1 if vocab_size is not None else HIGHEST_ID
        self.eos_id = eos_id
        self.overflow = overflow
        self.foreign = foreign
        self._foreign_decoder = _cl100k() if foreign == "decode" else None
        self._longest_token = 1
        self._own_highest_id = 0
        if tokenizer is not None:
            tokenizer.no_truncation()
            tokenizer.no_padding()
            vocabulary = tokenizer.get_vocab()
            self._longest_token = max(map(len, map(str.encode, vocabulary)), default=1)
            self._own_highest_id = max(vocabulary.values(), default=0)

    @classmethod
    def from_model(
        cls,
        folder: Path,
        *,
        context_length: int | None,
        overflow: Overflow = "refuse",
        foreign: Foreign = "refuse",
    ) -> TokenRules:
        """The rules of a checkpoint on disk. Raises InvalidInputError (`no_tokenizer`, `bad_config`)."""
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as exc:
            raise InvalidInputError(
                "no_tokenizer", f"cannot read {file}: {exc}", "give the model's folder, or leave --model-path out"
            ) from exc
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            vocab = int(config["vocab_size"])
            longest = int(config["max_position_embeddings"])
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise InvalidInputError(
                "bad_config", f"{folder / 'config.json'} gives no vocabulary size and length: {exc}", "is it complete?"
            ) from exc
        appended = tokenizer.encode("").ids
        return cls(
            tokenizer,
            max_tokens=(context_length or longest) - 1,  # the engine takes one fewer than its context, EOS included
            vocab_size=vocab,
            eos_id=appended[-1] if appended else None,
            overflow=overflow,
            foreign=foreign,
        )

    # -- texts

    def quick(self, texts: list[str]) -> bool:
        """Whether counting these on the event loop is cheaper than on a thread."""
        return self.tokenizer is None or sum(map(len, texts)) <= INLINE_CHARS

    def texts_now(self, texts: list[str]) -> list[Prepared | ApiError]:
        """Count (and cut, where that is allowed) texts; a text that is refused has its error in its place."""
        if self.tokenizer is None:
            return [Prepared(t, estimate(t), exact=False) for t in texts]
        limit = self.max_tokens
        out: list[Prepared | ApiError] = []
        refused = {i: e for i, t in enumerate(texts) if (e := self._surely_too_long(t))}
        counted = [t for i, t in enumerate(texts) if i not in refused]
        codes = iter(self.tokenizer.encode_batch_fast(counted))
        for index, text in enumerate(texts):
            if index in refused:
                out.append(refused[index])
                continue
            code = next(codes)
            count = len(code)
            if limit is None or count <= limit:
                out.append(Prepared(text, count, exact=True, ids=code.ids))
            elif self.overflow == "truncate":
                out.append(Prepared(self._cut(code.ids), limit, exact=True, truncated=True))
            else:
                out.append(self._too_long(count))
        return out

    def _surely_too_long(self, text: str) -> ApiError | None:
        """Refuse without tokenising what no tokenizer could bring under the limit."""
        if self.max_tokens is None or self.overflow == "truncate":
            return None
        least = len(text) // (COMPOSING * self._longest_token)
        return self._too_long(least, "at least ") if least > self.max_tokens else None

    def _too_long(self, count: int, at_least: str = "") -> ApiError:
        return invalid(
            f"the input is {at_least}{count} tokens long, its end token included; at most {self.max_tokens} fit",
            "input",
            "context_length_exceeded",
        )

    def _cut(self, ids: list[int]) -> list[int]:
        """As many tokens as fit, EOS kept: it is the token that the model pools."""
        kept = self.max_tokens or len(ids)
        return ids[:kept] if self.eos_id is None else [*ids[: kept - 1], self.eos_id]

    # -- token ids

    def samples(self) -> list[Prepared]:
        """Texts with their ids, to see whether an engine makes the same ids of them; empty where none may be sent."""
        if self.tokenizer is None or self._own_highest_id > self.highest_id:
            return []
        return [p for p in self.texts_now(list(SAMPLES)) if isinstance(p, Prepared) and p.ids]

    def ids(self, ids: list[int]) -> Prepared:
        """Check a list of token ids and give it its EOS. Raises ApiError 400."""
        low, high = min(ids), max(ids)
        if low < 0 or high > self.highest_id:
            bad, span = low if low < 0 else high, f"[0, {self.highest_id}]"
            raise invalid(f"token id {bad} is outside the vocabulary {span}; {LANGCHAIN_HINT}", "input", "bad_token_id")
        if self.foreign != "accept" and self.looks_foreign(ids):
            if self._foreign_decoder is None:
                raise invalid(
                    f"these token ids are not what this model's tokenizer makes of their text; {LANGCHAIN_HINT}",
                    "input",
                    "foreign_token_ids",
                )
            decoded = self.texts_now([self._foreign_decoder.decode(ids)])[0]
            if isinstance(decoded, ApiError):
                raise decoded
            return decoded
        if self.eos_id is not None and ids[-1] != self.eos_id:
            ids = [*ids, self.eos_id]
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            if self.overflow == "refuse":
                raise self._too_long(len(ids))
            return Prepared(self._cut(ids), self.max_tokens, exact=True, truncated=True)
        return Prepared(ids, len(ids), exact=True)

    def looks_foreign(self, ids: list[int]) -> bool:
        """Whether these ids are not what our tokenizer makes of the text they stand for.

        Its own ids, whole or cut anywhere, always come back from text as they were. Ids of another tokenizer decode
        to a text that ours cuts up differently: the longer the list, the surer (docs/gateway.md has the rates for
        OpenAI's cl100k). Two lists joined are seen too, and rightly: the model never saw such a joint in training.
        """
        if self.tokenizer is None:
            return False
        sample = ids[:CHECKED_IDS]
        if self.eos_id is not None and sample[-1] == self.eos_id:
            sample = sample[:-1]
        if not sample or self._comes_back(sample):
            return False
        whole = self._whole_characters(sample)
        return bool(whole) and not self._comes_back(whole)

    def _comes_back(self, ids: list[int]) -> bool:
        if self.tokenizer is None:
            return True
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        again: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return again == ids

    def _whole_characters(self, ids: list[int]) -> list[int]:
        """Without the ids at either end that hold only a part of a character: a cut went through it."""
        if self.tokenizer is None:
            return ids
        for _ in range(PARTS_OF_A_CHARACTER):
            if ids and self.tokenizer.decode(ids).startswith(BROKEN):
                ids = ids[1:]
            if ids and self.tokenizer.decode(ids).endswith(BROKEN):
                ids = ids[:-1]
        return ids


def estimate(text: str) -> int:
    """Tokens of a text when nobody can count: four bytes a token, plus EOS. For sizing batches, not for bills."""
    return len(text.encode("utf-8", "surrogatepass")) // 4 + 1


class _Decoder:
    """OpenAI's cl100k table from tiktoken, for the `decode` policy."""

    def __init__(self) -> None:
        tiktoken = importlib.import_module("tiktoken")  # an extra of the user's own
        self._encoding = tiktoken.get_encoding("cl100k_base")

    def decode(self, ids: list[int]) -> str:
        text: str = self._encoding.decode(ids)
        return text


def _cl100k() -> _Decoder:
    try:
        return _Decoder()
    except Exception as exc:
        raise InvalidInputError(
            "no_cl100k",
            f"--foreign-ids decode needs tiktoken and its cl100k_base table: {exc}",
            "pip install tiktoken (its table is fetched once; TIKTOKEN_CACHE_DIR names its folder), or use refuse",
        ) from exc
