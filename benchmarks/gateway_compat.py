"""The real clients people use, unchanged, against the gateway: OpenAI for Node, LangChain, LlamaIndex.

    python benchmarks/gateway_compat.py [--folder ~/.cache/qwen3emb/compat] [--json]

Installs the pinned packages into the folder once (npm, pip), starts a null engine and a gateway with a tokenizer, and
compares every vector with what the engine gives for that text. LangChain's default client, which sends another
tokenizer's ids, must be refused with the hint that mends it. tests/test_gateway_compat.py runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from gateway import process

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwen3emb_launch.demo_model import make_demo_model
from qwen3emb_launch.engine_process.ports import private_port
from tests.null_engine import NullEngine

NODE = {"openai": "7.57.0"}
PYTHON = ROOT / "requirements" / "compat.txt"  # langchain-openai and llama-index-embeddings-openai
NO_REGISTRY = 75  # the exit status of a run that could not fetch the Node client: EX_TEMPFAIL of sysexits.h
OUT_OF_REACH = (
    "ENOTFOUND",
    "EAI_AGAIN",
    "ECONNREFUSED",
    "ECONNRESET",
    "ETIMEDOUT",
    "ERR_SOCKET_TIMEOUT",
    "ENETUNREACH",
)
TEXTS = ["how do I return a parcel?", "包裹没有到怎么办"]

NODE_SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({baseURL: process.argv[2], apiKey: "x", maxRetries: 0});
const texts = JSON.parse(process.argv[3]);
const full = await client.embeddings.create({model: "null", input: texts});
const asked = {model: "null", input: texts[0], dimensions: 64, encoding_format: "float"};
const small = await client.embeddings.create(asked);
let refused = "";
try { await client.embeddings.create({model: "null", input: ["a", " "]}); }
catch (error) { refused = `${error.status} ${error.code}`; }
console.log(JSON.stringify({vectors: full.data.map(d => d.embedding), small: small.data[0].embedding.length, refused}));
"""
LANGCHAIN_SCRIPT = """
import json, sys
from langchain_openai import OpenAIEmbeddings
texts = json.loads(sys.argv[2])
settings = dict(model="null", base_url=sys.argv[1], api_key="x", max_retries=0)
client = OpenAIEmbeddings(**settings, check_embedding_ctx_length=False)
vectors = client.embed_documents(texts)
small = len(OpenAIEmbeddings(**settings, check_embedding_ctx_length=False, dimensions=64).embed_query(texts[0]))
# What its default sends: token ids of OpenAI's table. The table itself is fetched from afar, so ids stand in for it.
refused = ""
try:
    client.client.create(model="null", input=[[4438, 656, 358, 471, 264, 33024, 30]])
except Exception as error:
    refused = f"{error.status_code} {error.code} {'check_embedding_ctx_length=False' in str(error)}"
print(json.dumps({"vectors": vectors, "small": small, "refused": refused}))
"""
LLAMA_INDEX_SCRIPT = """
import json, sys
from llama_index.embeddings.openai import OpenAIEmbedding
texts = json.loads(sys.argv[2])
settings = dict(model_name="null", api_base=sys.argv[1], api_key="x", max_retries=0)
vectors = OpenAIEmbedding(**settings).get_text_embedding_batch(texts)
small = len(OpenAIEmbedding(**settings, dimensions=64).get_query_embedding(texts[0]))
print(json.dumps({"vectors": vectors, "small": small, "refused": ""}))
"""


def installed(folder: Path) -> Path:
    """The python with the packages; node_modules lie in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp, wanted = folder / "installed.json", json.dumps([NODE, PYTHON.read_text(), sys.version])
    python = folder / "venv" / "bin" / "python"
    if not stamp.is_file() or stamp.read_text() != wanted:
        venv.create(folder / "venv", with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(PYTHON)], check=True)
        (folder / "package.json").write_text(json.dumps({"private": True, "type": "module", "dependencies": NODE}))
        _npm_install(folder)
        stamp.write_text(wanted)
    return python


def _npm_install(folder: Path) -> None:
    argv = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=1"]
    ran = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.stderr.write(ran.stderr[-3000:])
        raise SystemExit(NO_REGISTRY if any(code in ran.stderr for code in OUT_OF_REACH) else 1)


def ask(argv: list[str], script: str, suffix: str, folder: Path, port: int) -> dict[str, object]:
    """One client's run."""
    file = folder / f"client{suffix}"
    file.write_text(script)
    env = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    base = f"http://127.0.0.1:{port}/v1"
    command = [*argv, str(file), base, json.dumps(TEXTS)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, env=env, check=False)
    if ran.returncode:
        raise SystemExit(f"{file.name} failed:\n{ran.stderr[-3000:]}")
    found: dict[str, object] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, default=Path("~/.cache/qwen3emb/compat"))
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    if not shutil.which("npm"):
        raise SystemExit("npm is missing")
    folder = args.folder.expanduser()
    python = installed(folder)
    wanted = [NullEngine(256).vector(t) for t in TEXTS]
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = make_demo_model(Path(scratch) / "demo")
        engine, port = private_port("127.0.0.1"), private_port("127.0.0.1")
        null = [sys.executable, "tests/null_engine.py", "--port", str(engine), "--dims", "256"]
        gateway = [
            sys.executable, "-m", "qwen3emb_launch", "gateway", "--port", str(port), "--model-path", str(model),
            "--upstream", f"http://127.0.0.1:{engine}/v1", "--model", "null",
        ]  # fmt: skip
        with process(*null, port=engine), process(*gateway, port=port):
            for name, argv, script, suffix in (
                ("openai for Node", ["node"], NODE_SCRIPT, ".mjs"),
                ("LangChain", [str(python)], LANGCHAIN_SCRIPT, "_langchain.py"),
                ("LlamaIndex", [str(python)], LLAMA_INDEX_SCRIPT, "_llama_index.py"),
            ):
                found = ask(argv, script, suffix, folder, port)
                vectors: list[list[float]] = found["vectors"]  # type: ignore[assignment]
                pairs = [p for got, want in zip(vectors, wanted, strict=True) for p in zip(got, want, strict=True)]
                worst = float(max(abs(a - b) for a, b in pairs))
                assert worst < 1e-6, f"{name}: off by {worst}"
                assert found["small"] == 64, name
                rows[name] = {"off_by": worst, "refused": found["refused"]}
    if args.json:
        print(json.dumps({"node": NODE, "python": PYTHON.read_text().splitlines()[1:], "clients": rows}))
        return
    for name, row in rows.items():
        print(f"{name}: vectors right within {row['off_by']:.1e}; bad input: {row['refused'] or 'not asked'}")


if __name__ == "__main__":
    main()
