"""How often OpenAI's cl100k token ids are recognised by a Qwen tokenizer, and how often its own are taken for foreign.

    python benchmarks/gateway_foreign_ids.py --tokenizer Qwen3-Embedding-4B/tokenizer.json TEXT_FILES... [--json]

Needs tiktoken and its cl100k_base table (TIKTOKEN_CACHE_DIR). Pieces of random length are cut from the files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import tiktoken
from tokenizers import Tokenizer

from qwen3emb_launch.gateway.tokens import TokenRules

LENGTHS = (8, 20, 50, 200, 10**9)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokenizer", required=True)
    options.add_argument("--json", action="store_true")
    options.add_argument("files", nargs="+")
    args = options.parse_args()
    rules = TokenRules(Tokenizer.from_file(args.tokenizer))
    foreign = tiktoken.get_encoding("cl100k_base")
    source = random.Random(1)
    seen: dict[int, Counter[str]] = {n: Counter() for n in LENGTHS}
    for file in args.files:
        text = Path(file).read_text(encoding="utf-8", errors="ignore")
        for _ in range(20):
            length = source.choice((20, 40, 80, 200, 800, 3000))
            start = source.randrange(max(1, len(text) - length))
            piece = text[start : start + length].strip()
            theirs = foreign.encode(piece, disallowed_special=())
            own = rules.tokenizer.encode(piece, add_special_tokens=False).ids
            if len(theirs) < 2 or len(own) < 4:
                continue
            row = seen[next(n for n in LENGTHS if len(theirs) <= n)]
            row["lists"] += 1
            row["recognised"] += rules.looks_foreign(theirs)
            row["own_refused"] += rules.looks_foreign(own)
            row["own_cut_refused"] += rules.looks_foreign(own[1:-1])
    rows = {f"to {n} ids" if n < 10**9 else "longer": dict(row) for n, row in seen.items()}
    if args.json:
        print(json.dumps(rows))
        return
    print("| cl100k list | lists | recognised | own lists refused | own lists, cut, refused |\n|---|---|---|---|---|")
    for name, row in rows.items():
        count = row.get("lists", 0)
        share = f"{row.get('recognised', 0) / count:.0%}" if count else "-"
        print(f"| {name} | {count} | {share} | {row.get('own_refused', 0)} | {row.get('own_cut_refused', 0)} |")


if __name__ == "__main__":
    main()
