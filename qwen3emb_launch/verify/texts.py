"""The texts that are asked. Constant, so that reference sets stay comparable from one version to the next."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3emb_launch.instructions import WEB_SEARCH, instruct

QUERIES = ("What is the capital of China?", "Explain gravity")
DOCUMENTS = (
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical objects and is "
    "responsible for the movement of planets around the sun.",
)
INSTRUCTED = tuple(instruct(q, WEB_SEARCH) for q in QUERIES)

# Queries x documents, as the model cards publish them (transformers).
GOLDEN: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "0.6b": ((0.76456, 0.14143), (0.13550, 0.59995)),
    "4b": ((0.7534, 0.1147), (0.0320, 0.6258)),
    "8b": ((0.74930, 0.07506), (0.08796, 0.63184)),
}

# The 8B overflows float16 on texts that begin like these (QwenLM/Qwen3-Embedding#164).
OVERFLOWING = ("import os\nimport sys\n", "import torch\nimport torch.nn as nn\n\nclass Net(nn.Module):\n    pass\n")
ONE_TOKEN = "a"  # noqa: S105 - a text
EMOJI = "🍕🚀 I ❤️ pizza on the moon 👩‍🚀"
MIXED = "量子计算 (quantum computing) 利用叠加态 superposition 来加速某些算法。"

# Asked one by one, then together, then by many at once. Lengths differ on purpose: padding faults need that.
BASE = (*INSTRUCTED, *DOCUMENTS, *QUERIES, ONE_TOKEN, EMOJI, MIXED, *OVERFLOWING)


@dataclass(frozen=True)
class Pair:
    """Two texts that mean different things; a server that answers one vector for both has the named fault."""

    a: str
    b: str
    fault: str


PAIRS = (
    Pair("The US and Polish teams", "the us and polish teams", "texts are lower-cased"),
    Pair("indented code", "    indented code", "leading white space is stripped"),
    Pair("a line of text", "a line of text\n", "trailing white space is stripped"),
    Pair("two words", "two  words", "runs of white space are collapsed"),
    Pair("first line\nsecond line", "first line second line", "line breaks are replaced by spaces"),
    Pair("I want 🍕 today", "I want 🚀 today", "emoji are dropped"),
    Pair("城市：北京", "城市：上海", "characters outside ASCII are dropped"),
    Pair("key\tvalue", "key value", "tabs are replaced by spaces"),
    Pair("Is it good?", "Is it good", "punctuation is stripped"),
    Pair("résumé", "resume", "accents are folded"),
    Pair("price 100", "price 900", "digits are dropped"),
    Pair("a <b>bold</b> claim", "a bold claim", "HTML tags are stripped"),
    Pair("Smith &amp; Sons", "Smith & Sons", "HTML entities are decoded"),
    Pair("ABC株式会社", "ＡＢＣ株式会社", "full-width characters are folded (NFKC)"),
    Pair(
        instruct("tax law", WEB_SEARCH),
        instruct(" tax law", WEB_SEARCH),
        "the query template is rewritten with a space after `Query:`",
    ),
    Pair(
        instruct("tax law", WEB_SEARCH),
        instruct("tax law", "Retrieve semantically similar text"),
        "the instruction is ignored or replaced",
    ),
)

_WORDS = (
    "contract", "liability", "tenant", "clause", "court", "appeal", "river", "stone", "energy", "signal", "market",
    "enzyme", "orbit", "harbour", "winter", "copper", "ledger", "census", "valley", "theorem", "garden", "engine",
    "museum", "tariff", "glacier", "protein", "lantern", "bridge",
)  # fmt: skip


def long_text(words: int, seed: int) -> str:
    """A text of that many words, the same for the same seed; two seeds share no run of words."""
    step = 2 * seed + 1
    return " ".join(_WORDS[(i * step + i // 7 + seed) % len(_WORDS)] for i in range(words))


# What transformers, saved references and `diff` compare: short and long, queries and documents, five scripts.
REFERENCE = (
    *BASE,
    *(pair.a for pair in PAIRS[:4]),
    *(pair.b for pair in PAIRS[:4]),
    PAIRS[-2].a,
    long_text(90, 3),
    long_text(700, 5),
)

# Documents and queries for `diff`, beside REFERENCE: near neighbours, so that rank agreement means something.
CORPUS = (
    "The tenant must give three months' written notice before leaving the flat.",
    "The landlord may raise the rent once a year, in line with the consumer price index.",
    "A deposit of two monthly rents is due when the lease is signed.",
    "Either party may terminate the employment contract with four weeks' notice.",
    "An employee is entitled to thirty days of paid leave a year.",
    "The supplier is liable for damage caused by gross negligence only.",
    "A patent grants its owner the exclusive right to use an invention for twenty years.",
    "Copyright protects the expression of an idea, not the idea itself.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "Mitochondria produce most of the energy that a cell uses.",
    "Enzymes lower the activation energy of a reaction without being used up.",
    "The Moon's gravity raises the tides twice a day.",
    "A black hole forms when a massive star collapses under its own weight.",
    "Water boils at a lower temperature on a high mountain.",
    "def quicksort(xs):\n    return xs if len(xs) < 2 else quicksort([x for x in xs[1:] if x < xs[0]])",
    "for (int i = 0; i < n; ++i) { sum += values[i]; }",
    "SELECT name, COUNT(*) FROM orders GROUP BY name HAVING COUNT(*) > 3;",
    "git rebase --interactive HEAD~3 rewrites the last three commits.",
    "北京是中华人民共和国的首都。",
    "上海是中国人口最多的城市。",
    "长城建于明朝，全长两万多公里。",
    "机器学习模型从数据中学习规律。",
    "東京は日本の首都であり、世界最大の都市圏です。",
    "La capitale de la France est Paris.",
    "Der Vertrag kann mit einer Frist von drei Monaten gekündigt werden.",
    "La fotosíntesis convierte la luz en energía química.",
    "Столица России — Москва.",
    "You can return an item within thirty days for a full refund.",
    "Standard delivery takes three to five working days.",
    "To reset your password, follow the link in the e-mail.",
    "Our support line is open from nine to six on working days.",
    "The card was charged twice for the same order.",
)
CORPUS_QUERIES = tuple(
    instruct(q, WEB_SEARCH)
    for q in (
        "How long is the notice period of a lease?",
        "days of holiday per year",
        "what do plants make from sunlight",
        "why are there tides",
        "sorting algorithm in python",
        "count rows per group in SQL",
        "中国的首都是哪里？",
        "how to send something back",
        "I forgot my password",
        "how long does a patent last",
        "capitale française",
        "double payment",
    )
)
ALL = tuple(dict.fromkeys((*REFERENCE, *CORPUS, *CORPUS_QUERIES)))
