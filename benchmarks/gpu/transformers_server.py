"""The server one writes in an afternoon: transformers behind HTTP, what waits answered as one padded batch.

    python benchmarks/gpu/transformers_server.py --model DIR --port N [--device cuda] [--batch 64] [--tokens 16384]

bfloat16, PyTorch's own attention, last token, length 1. Padding stands to the right, where causal attention never
looks, so that no mask keeps the fast kernels away. `/v1/embeddings` with texts and `dimensions`, floats alone: a
baseline for harness.py, not a product. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import gc
import json
import queue
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

gc.disable()  # modules are no garbage: a collector that walks them takes a quarter of the start
import numpy as np
import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401 - what AutoModel imports
from transformers import AutoModel, AutoTokenizer

gc.freeze()
gc.enable()

try:
    from orjson import dumps
except ImportError:

    def dumps(value: Any) -> bytes:
        return json.dumps(value).encode()


Waiting = tuple[list[list[int]], "Future[np.ndarray]"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64, help="texts of one pass")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of one pass, padding included")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.to(args.device).eval()
    waiting: queue.Queue[Waiting] = queue.Queue(maxsize=4096)
    threading.Thread(target=work, args=(model, waiting, args.batch, args.tokens), daemon=True).start()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            try:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
                ids = tokenizer(texts)["input_ids"]
                future: Future[np.ndarray] = Future()
                waiting.put((ids, future))
                vectors = future.result()[:, : asked.get("dimensions")]
                vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
                data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors.tolist())]
                usage = dict.fromkeys(("prompt_tokens", "total_tokens"), sum(map(len, ids)))
                self.answer(200, {"object": "list", "model": asked.get("model"), "data": data, "usage": usage})
            except (ValueError, KeyError, TypeError) as error:
                self.answer(400, {"error": {"message": f"{type(error).__name__}: {error}"}})

        def answer(self, status: int, value: Any) -> None:
            body = dumps(value)
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024

    Server(("127.0.0.1", args.port), Handler).serve_forever()


def work(model: Any, waiting: queue.Queue[Waiting], batch: int, tokens: int) -> None:
    """Answer what waits, for ever: as many requests at once as fit into a pass."""
    left: Waiting | None = None
    while True:
        taken, left = [left or waiting.get()], None
        count, longest = len(taken[0][0]), max(map(len, taken[0][0]), default=0)
        while left is None:
            try:
                more = waiting.get_nowait()
            except queue.Empty:
                break
            longest_then = max(longest, max(map(len, more[0]), default=0))
            if count + len(more[0]) > batch or (count + len(more[0])) * longest_then > tokens:
                left = more
            else:
                taken.append(more)
                count, longest = count + len(more[0]), longest_then
        try:
            vectors = embed(model, [ids for texts, _ in taken for ids in texts])
        except Exception as error:  # noqa: BLE001 - the requests fail, the server goes on
            for _, future in taken:
                future.set_exception(ValueError(str(error)))
            continue
        at = 0
        for texts, future in taken:
            future.set_result(vectors[at : at + len(texts)])
            at += len(texts)


@torch.inference_mode()
def embed(model: Any, ids: list[list[int]]) -> np.ndarray:
    """Full-width vectors [texts, width] in float32, not normalised: hidden states of the last tokens."""
    lengths = torch.tensor([len(text) for text in ids])
    padded = torch.zeros((len(ids), int(lengths.max())), dtype=torch.long)
    for row, text in zip(padded, ids, strict=True):
        row[: len(text)] = torch.tensor(text)
    hidden = model(input_ids=padded.to(model.device), use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(ids), device=hidden.device), (lengths - 1).to(hidden.device)]
    found: np.ndarray = last.float().cpu().numpy()
    return found


if __name__ == "__main__":
    main()
