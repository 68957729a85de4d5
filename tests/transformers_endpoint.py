"""An embeddings server with transformers that computes wrongly on purpose. Run by the engine environment's python.

    python transformers_endpoint.py MODEL_FOLDER OTHER_FOLDER    prints its port; the mode is the first part of the path

Modes: right, mean, cls, no_eos, im_end, double_eos, right_padding (to the longest of the batch), right_padding_128,
left_unmasked_128, bidirectional, second_last_layer, bos, last_two, weighted_mean, rotary_base, half (float16, right
otherwise), fp8 (weights and activations as engines quantise them). `quantised_` before a mode computes it on
OTHER_FOLDER in fp8 with float16 between the products: another implementation than the reference script's, so its
activations round apart.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "qwen3emb_launch" / "engine_scripts"))

from reference import Runner, quantise

torch.set_grad_enabled(False)
torch.set_num_threads(1)


class Model:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.half = AutoModel.from_pretrained(folder, dtype=torch.float16).eval()
        self.fp8 = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
        quantise(torch, self.fp8)
        self.eos = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self.lock = threading.Lock()

        self.kept: dict[tuple[str, tuple[int, ...], int], torch.Tensor] = {}

    def states(self, ids, mask=None, model=None):
        mask = None if mask is None else torch.tensor([mask])
        return (model or self.model)(input_ids=torch.tensor([ids]), attention_mask=mask).last_hidden_state[0].float()

    def pooled(self, mode: str, ids: list[int], longest: int):
        whole = [*ids, self.eos]
        if mode == "mean":
            return self.states(whole).mean(0)
        if mode == "cls":
            return self.states(whole)[0]
        if mode == "no_eos":
            return self.states(ids)[-1]
        if mode == "im_end":
            return self.states([*ids, self.tokenizer.convert_tokens_to_ids("<|im_end|>")])[-1]
        if mode == "double_eos":
            return self.states([*whole, self.eos])[-1]
        if mode == "bos":
            return self.states([self.eos, *whole])[-1]
        if mode == "last_two":
            return self.states(whole)[-2:].mean(0)
        if mode == "weighted_mean":
            states = self.states(whole)
            return torch.arange(1.0, len(whole) + 1) @ states
        if mode == "half":
            return self.states(whole, model=self.half)[-1]
        if mode in ("bidirectional", "second_last_layer", "rotary_base"):
            runner = Runner(torch, self.model, "cpu", self.eos, self.tokenizer)
            if mode == "bidirectional":
                return runner.hidden(whole, causal=False)[-1]
            if mode == "rotary_base":
                with runner.rotary_base(10_000.0):
                    return runner.hidden(whole)[-1]
            return runner.layers(whole)[-2][-1]
        if mode == "fp8":
            return self.states(whole, model=self.fp8)[-1]
        if mode.startswith(("right_padding", "left")):
            pad = max(0, (128 if mode.endswith("128") else longest) - len(whole))
            if mode.startswith("left"):
                return self.states([self.eos] * pad + whole)[-1]
            return self.states(whole + [self.eos] * pad, [1] * len(whole) + [0] * pad)[-1]
        return self.states(whole)[-1]

    def answer(self, mode: str, body: dict) -> dict:
        given = body["input"]
        texts = [given] if isinstance(given, str) else given
        rows = [self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        longest = max(map(len, rows)) + 1
        data = []
        with self.lock:
            for i, ids in enumerate(rows):
                key = (mode, tuple(ids), longest if mode == "right_padding" else 0)
                if key not in self.kept:
                    self.kept[key] = self.pooled(mode, ids, longest)
                vector = torch.nn.functional.normalize(self.kept[key][: body.get("dimensions")], dim=-1)
                data.append({"object": "embedding", "index": i, "embedding": vector.tolist()})
        tokens = sum(map(len, rows)) + len(rows) * (mode != "no_eos")
        return {"object": "list", "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


class Quantised(Model):
    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.model = self.half
        quantise(torch, self.model)


RIGHT, QUANTISED = Model(sys.argv[1]), Quantised(sys.argv[2])


def asked(path: str) -> tuple[Model, str]:
    """Whose vectors a path asks for, and by which mode."""
    mode = path.split("/")[1]
    return (QUANTISED if mode.startswith("quantised_") else RIGHT), mode.removeprefix("quantised_")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: 40 ms an answer otherwise

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        if not self.path.endswith("/v1/models"):
            self.reply(404, {})
            return
        folder = asked(self.path)[0].folder
        self.reply(200, {"data": [{"id": "demo", "root": folder, "owned_by": "test", "max_model_len": 8192}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        model, mode = asked(self.path)
        self.reply(200, model.answer(mode, body))

    def reply(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


server = Server(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)  # noqa: T201
threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
server.serve_forever()
