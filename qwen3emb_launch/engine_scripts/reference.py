"""Embeddings by transformers alone, for `qwen3emb verify` to compare an endpoint with. Runs in the engine environment.

stdin: {"model": folder, "texts": [...], "dtypes": ["float32", "bfloat16", "fp8"], "device": "cpu",
"alternatives": bool}
stdout, last line: {"width", "layers", "eos", "appends_eos", "ids": [[...]], "vectors": {dtype: [base64 float32]},
"alternatives": {name: [base64 or null]}, "skipped": {dtype: reason}, "versions"}

Each text runs alone, unpadded: tokens, <|endoftext|> at the end, hidden state of the last token, length 1.
`alternatives` are the known wrong ways, for naming a fault: computed in the first dtype.
The checkpoint is read once where one dtype after another can be had by rounding what is loaded: widest first.

`fp8` is bfloat16 with each linear layer as engines quantise it at load time: e4m3 weights with one scale an output
channel, e4m3 activations with one scale a token, sums wide.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EOS = "<|endoftext|>"
E4M3_LARGEST = 448.0
DEFAULT_ROTARY_BASE = 10_000.0  # what loaders take where they miss a checkpoint's own; Qwen3's is 1,000,000
TEMPLATE = re.compile(r"\AInstruct: .*?\nQuery:", re.DOTALL)


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    gc.disable()  # modules are no garbage: a collector that walks them takes a third of the import
    import torch
    import transformers
    import transformers.models.qwen3.modeling_qwen3  # what AutoModel imports for a Qwen3
    from transformers import AutoModel, AutoTokenizer

    gc.freeze()
    gc.enable()
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    folder = request["model"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos = tokenizer.convert_tokens_to_ids(EOS)
    out: dict[str, Any] = {"vectors": {}, "alternatives": {}, "skipped": {}, "eos": eos}
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in request["texts"]]
    own = tokenizer("a")["input_ids"]
    out["appends_eos"] = bool(own) and own[-1] == eos
    out["ids"] = [[*i, eos] for i in ids]
    device = request.get("device", "cpu")
    model: Any = None
    for dtype in request["dtypes"]:
        arithmetic = torch.bfloat16 if dtype == "fp8" else getattr(torch, dtype)
        if model is None or model.dtype not in (torch.float32, arithmetic):
            model = None  # its memory is free again
            reason = no_room(folder, dtype, device, torch)
            if reason:
                out["skipped"][dtype] = reason
                continue
            stored = stored_dtype(folder)
            model = AutoModel.from_pretrained(folder, dtype=getattr(torch, stored) if stored else arithmetic)
            model = model.to(device).eval()
        recast(model, arithmetic)
        if dtype == "fp8":
            quantise(torch, model)
        runner = Runner(torch, model, device, eos, tokenizer)
        out["width"], out["layers"] = model.config.hidden_size, model.config.num_hidden_layers
        out["vectors"][dtype] = [encode(torch, runner.pooled([*i, eos])) for i in ids]
        if request.get("alternatives") and not out["alternatives"]:
            out["alternatives"] = runner.alternatives(request["texts"], ids)
        if dtype == "fp8":
            model = None
        del runner
        if device != "cpu":
            torch.cuda.empty_cache()
    out["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(out))
    return 0


def no_room(folder: str, dtype: str, device: str, torch: Any) -> str | None:
    """Why this format does not fit into memory, or None."""
    size = sum(e.stat().st_size for e in os.scandir(folder) if e.name.endswith(".safetensors"))
    needed = size * (2 if dtype == "float32" else 1) * 1.2 + 5e8
    if device == "cpu":
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):  # page cache counts as free
                free = int(line.split()[1]) * 1024
    else:
        free = torch.cuda.mem_get_info()[0]
    if needed > free:
        return f"needs {needed / 1e9:.1f} GB of {device} memory, {free / 1e9:.1f} GB are free"
    return None


def stored_dtype(folder: str) -> str | None:
    """The 16-bit format that all weights are stored in, or None.

    Loaded so, a checkpoint crosses to the device at half the size of float32, and widening it there loses nothing.
    """
    found = set()
    for file in Path(folder).glob("*.safetensors"):
        with file.open("rb") as data:  # eight bytes of header length, then a JSON header
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        found |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return {"BF16": "bfloat16", "F16": "float16"}.get(found.pop()) if len(found) == 1 else None


def recast(model: Any, dtype: Any) -> None:
    """Round or widen the weights. Buffers stay: transformers keeps the rotary frequencies in float32 in any dtype."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def quantise(torch: Any, model: Any) -> None:
    """Replace the product of every linear layer by one of e4m3 numbers; their sums and scales are float32."""

    def e4m3(rows: Any) -> tuple[Any, Any]:
        wide = rows.float()
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-10) / E4M3_LARGEST
        return (wide / scale).clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn), scale

    def product(layer: Any) -> Any:
        weight, channel = e4m3(layer.weight.data)
        layer.weight.data = weight.to(torch.bfloat16)  # holds every e4m3 number, and widens much faster on a CPU

        def forward(hidden: Any) -> Any:
            activation, token = e4m3(hidden)
            wide = activation.float() @ layer.weight.data.float().T * token * channel.T
            return wide.to(hidden.dtype)

        return forward

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.forward = product(layer)


def encode(torch: Any, vector: Any) -> str:
    return base64.b64encode(vector.to(torch.float32).cpu().numpy().astype("<f4").tobytes()).decode()


class Runner:
    """One loaded model. Vectors are float32 tensors of length 1."""

    def __init__(self, torch: Any, model: Any, device: str, eos: int, tokenizer: Any) -> None:
        self.torch, self.model, self.device, self.eos, self.tokenizer = torch, model, device, eos, tokenizer

    def layers(self, ids: list[int]) -> list[Any]:
        """What each layer adds up to, before the final norm: shapes (tokens, width), the embedding first."""
        seen: list[Any] = []
        hook = self.model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
        tensor = self.torch.tensor([ids], device=self.device)
        states = self.model(input_ids=tensor, use_cache=False, output_hidden_states=True).hidden_states
        hook.remove()
        return [*(s[0] for s in states[:-1]), seen[0]]

    def hidden(self, ids: list[int], mask: list[int] | None = None, causal: bool = True) -> Any:
        """Last hidden states of one sequence, shape (tokens, width), in the model's dtype."""
        torch = self.torch
        tensor = torch.tensor([ids], device=self.device)
        attention = None if mask is None else torch.tensor([mask], device=self.device)
        if not causal:  # a mask of four dims is taken as it is: added to the scores
            shape = (1, 1, len(ids), len(ids))
            attention = torch.zeros(shape, dtype=self.model.dtype, device=self.device)
        return self.model(input_ids=tensor, attention_mask=attention, use_cache=False).last_hidden_state[0]

    @contextmanager
    def rotary_base(self, base: float) -> Iterator[None]:
        """Positions turned by another base (`rope_theta`) than the checkpoint's."""
        rotary = self.model.rotary_emb
        own = rotary.inv_freq
        steps = self.torch.arange(len(own), dtype=own.dtype, device=own.device) / len(own)
        rotary.inv_freq = base**-steps
        try:
            yield
        finally:
            rotary.inv_freq = own

    def unit(self, vector: Any) -> Any:
        return self.torch.nn.functional.normalize(vector.float(), dim=-1)

    def pooled(self, ids: list[int]) -> Any:
        return self.unit(self.hidden(ids)[-1])

    def alternatives(self, texts: list[str], ids: list[list[int]]) -> dict[str, list[str | None]]:
        """Each known wrong way, for each text; None where it does not apply (no instruction to strip)."""
        rows: dict[str, list[str | None]] = {}
        for text, tokens in zip(texts, ids, strict=True):
            for name, vector in self.wrong_ways(text, tokens).items():
                rows.setdefault(name, []).append(None if vector is None else encode(self.torch, vector))
        return rows

    def wrong_ways(self, text: str, ids: list[int]) -> dict[str, Any]:
        """Each known wrong way of embedding one text, or None; `ids` are its tokens without <|endoftext|>."""
        eos = self.eos
        whole = [*ids, eos]
        states = self.hidden(whole)
        bare: Any = self.hidden(ids) if ids else None
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        layers = self.layers(whole)
        found = {
            "bidirectional": self.unit(self.hidden(whole, causal=False)[-1]),
            "no_final_norm": self.unit(layers[-1][-1]),
            "second_last_layer": self.unit(layers[-2][-1]),
            "mean_pooling": self.unit(states.float().mean(0)),
            "first_token": self.unit(states[0]),
            "max_pooling": self.unit(states.float().amax(0)),
            "no_eos": self.unit(bare[-1]) if ids else None,
            "mean_pooling_no_eos": self.unit(bare.float().mean(0)) if ids else None,
            "weighted_mean": self.unit(self.torch.arange(1.0, len(whole) + 1, device=self.device) @ states.float()),
            "last_two_mean": self.unit(states[-2:].float().mean(0)) if ids else None,
            "second_last_token": self.unit(states[-2]) if ids else None,
            "bos": self.pooled([eos, *whole]),
            "double_eos": self.pooled([*whole, eos]),
            "im_end": self.pooled([*ids, end]) if isinstance(end, int) and end != eos else None,
        }
        with self.rotary_base(DEFAULT_ROTARY_BASE):
            found["rotary_base"] = self.pooled(whole)
        for pad in (1, 8, 32):
            padded = whole + [eos] * pad
            found[f"right_padding_{pad}"] = self.unit(self.hidden(padded, [1] * len(whole) + [0] * pad)[-1])
        for length in (64, 128, 256, 512):
            pad = length - len(whole)
            fits = pad > 0
            mask = [1] * len(whole) + [0] * pad
            found[f"right_padding_to_{length}"] = (
                self.unit(self.hidden(whole + [eos] * pad, mask)[-1]) if fits else None
            )
            found[f"left_padding_unmasked_{length}"] = self.unit(self.hidden([eos] * pad + whole)[-1]) if fits else None
        for length in (128, 256, 512):
            found[f"truncated_{length}"] = self.pooled([*ids[: length - 1], eos]) if len(whole) > length else None
            found[f"truncated_no_eos_{length}"] = self.pooled(ids[:length]) if len(ids) > length else None
        for name, other in rewritten(text).items():
            same = other == text or not other
            found[name] = (
                None if same else self.pooled([*self.tokenizer(other, add_special_tokens=False)["input_ids"], eos])
            )
        return {name: None if v is None else v.to(self.torch.float32) for name, v in found.items()}


def rewritten(text: str) -> dict[str, str]:
    """What careless servers make of a text."""
    return {
        "instruction_stripped": TEMPLATE.sub("", text),
        "space_after_query": TEMPLATE.sub(lambda m: m.group() + " ", text),
        "lower_cased": text.lower(),
        "white_space_stripped": text.strip(),
        "white_space_collapsed": " ".join(text.split()),
        "line_breaks_replaced": text.replace("\n", " "),
        "ascii_only": text.encode("ascii", "ignore").decode(),
        "instruction_added": text
        if TEMPLATE.match(text)
        else "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:" + text,
    }


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the answer is out: taking torch and transformers down again would take a second
