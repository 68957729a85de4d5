"""The hooks of the HTTP process: the answer built once, and the fast route."""

from __future__ import annotations

import contextvars
import logging
import os
import sys
from typing import Any

import orjson
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin import template
from qwen3emb_engine_plugin.answer import AnswerWriter
from qwen3emb_engine_plugin.engine_calls import EngineCalls
from qwen3emb_engine_plugin.prebuild import prebuild
from qwen3emb_engine_plugin.route import PATH, EmbeddingsRoute
from qwen3emb_engine_plugin.switches import NOT_NEEDED, misfit

logger = logging.getLogger("qwen3emb_engine_plugin")

SERVING = "sglang.srt.entrypoints.openai.serving_embedding.OpenAIServingEmbedding"
_encoding_format: contextvars.ContextVar[str] = contextvars.ContextVar("encoding_format", default="float")


def _writer() -> AnswerWriter | str:
    """A writer proven to print what FastAPI prints for a probe, or why there is none."""
    from fastapi.encoders import jsonable_encoder
    from sglang.srt.entrypoints.openai.protocol import EmbeddingObject, EmbeddingResponse, UsageInfo

    probe = [[0.1, -2.0, 1e-7, 0.012329101562], [3.0, float("nan")]]
    stock = EmbeddingResponse(
        data=[EmbeddingObject(embedding=vector, index=i) for i, vector in enumerate(probe)],
        model='a "model"',
        usage=UsageInfo(prompt_tokens=7, total_tokens=7),
    )
    writer = AnswerWriter(jsonable_encoder(UsageInfo()))
    expected = orjson.dumps(jsonable_encoder(stock))
    found = writer.write(probe, 7, 'a "model"', "float")
    return writer if found == expected else f"answers would differ: {found!r} instead of {expected!r}"


def answer() -> str | None:
    """Whatever takes the stock route: the answer as ready bytes, base64 where asked on every version."""
    from sglang.srt.entrypoints.openai.serving_embedding import OpenAIServingEmbedding as Serving
    from starlette.responses import Response

    build = Serving._build_embedding_response
    writer = _writer()
    problem = (
        misfit(build, "self ret", 'ret_item["embedding"]', "model=self.tokenizer_manager.model_path")
        and misfit(
            build, "self ret encoding_format", 'ret_item["embedding"]', "model=self.tokenizer_manager.model_path"
        )
    ) or misfit(Serving._handle_non_streaming_request, "self adapted_request request raw_request")
    if problem or isinstance(writer, str):
        return problem or str(writer)

    def build_response(self: Any, ret: list[Any], encoding_format: str | None = None) -> Response:
        vectors = [item["embedding"] for item in ret]
        tokens = sum(item.get("meta_info", {}).get("prompt_tokens", 0) for item in ret)
        body = writer.write(
            vectors, tokens, self.tokenizer_manager.model_path, encoding_format or _encoding_format.get()
        )
        return Response(body, media_type="application/json")

    async def handle(original: Any, self: Any, adapted_request: Any, request: Any, raw_request: Any) -> Any:
        # Up to 0.5.16 the format does not reach the builder: it travels in the task's context.
        token = _encoding_format.set(request.encoding_format)
        try:
            return await original(self, adapted_request, request, raw_request)
        finally:
            _encoding_format.reset(token)

    HookRegistry.register(f"{SERVING}._build_embedding_response", build_response, HookType.REPLACE)
    HookRegistry.register(f"{SERVING}._handle_non_streaming_request", handle, HookType.AROUND)
    return None


def route() -> str | None:
    """The fast route, put in when the application starts; what it needs of the server is looked at then."""
    from sglang.srt.entrypoints.openai.serving_embedding import OpenAIServingEmbedding as Serving
    from sglang.srt.managers.tokenizer_manager import TokenizerManager as Manager

    problem = (
        misfit(Serving.__init__, "self tokenizer_manager template_manager")
        or misfit(Manager._init_req_state, "self obj request", "obj.received_time", "self.rid_to_state")
        or misfit(Manager._validate_one_request, "self obj input_ids", "_validate_for_matryoshka_dim")
        or misfit(
            Manager._create_tokenized_object,
            "self obj input_text input_ids input_embeds mm_inputs token_type_ids",
            "TokenizedEmbeddingReqInput",
            "self.rid_to_state[obj.rid].time_stats",
        )
        or misfit(Manager.freeze_gc, "self", "FreezeGCReq")
        or misfit(Manager._send_one_request, "self tokenized_obj")
        or misfit(Manager._send_batch_request, "self tokenized_objs", "BatchTokenizedEmbeddingReqInput")
        or misfit(Manager._handle_abort_finish_reason, "self out state is_stream")
        or misfit(Manager._handle_batch_output, "self recv_obj", "state.out_list.append(out_dict)", "s.event.set()")
    )
    if problem:
        return problem
    HookRegistry.register(f"{SERVING}.__init__", _install, HookType.AFTER)
    return None


def _install(_: None, serving: Any, manager: Any, template_manager: Any = None) -> None:
    """Put the route first. An AFTER hook of the serving object's constructor: the loop runs, the app is there."""
    try:
        problem = _install_or_reason(serving, manager)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        logger.warning("qwen3emb plugin: route stands aside: %s", problem)
    else:
        logger.info("qwen3emb plugin: POST %s is answered by the fast route", PATH)


def _install_or_reason(serving: Any, manager: Any) -> str | None:
    from sglang.srt.managers import tokenizer_manager as module
    from sglang.srt.managers.io_struct import EmbeddingReqInput

    args = manager.server_args
    reasons = {
        "no embedding model": manager.is_generation,
        "a multimodal model": manager.mm_processor is not None,
        "no fast tokenizer": not getattr(manager.tokenizer, "is_fast", False),
        "several tokenizer workers": args.tokenizer_worker_num != 1,
        "data parallelism": args.dp_size != 1,
        "tracing": args.enable_trace,
        "LoRA": bool(args.enable_lora or args.lora_paths),
        "disaggregation": args.disaggregation_mode != "null" or bool(getattr(args, "language_only", False)),
        "sparse embeddings": "SGLANG_EMBEDDINGS_SPARSE_HEAD" in os.environ,
        "a per-request exporter": manager.request_metrics_exporter_manager.exporter_enabled(),
        "an EmbeddingGemma tokenizer": bool(getattr(manager.model_config, "is_embedding_gemma", False)),
    }
    for reason, holds in reasons.items():
        if holds:
            return reason
    writer = _writer()
    if isinstance(writer, str):
        return writer
    app = sys.modules["sglang.srt.entrypoints.http_server"].app
    stock = next(
        (
            r
            for r in app.router.routes
            if getattr(r, "path", "") == PATH and "POST" in (getattr(r, "methods", None) or ())
        ),
        None,
    )
    if stock is None:
        return f"no route for POST {PATH}"
    calls = EngineCalls(manager, EmbeddingReqInput, float(module._REQUEST_STATE_WAIT_TIMEOUT))
    app.router.routes.insert(0, EmbeddingsRoute(stock, serving, calls, writer))
    return None


def workers() -> str | None:
    """Scheduler and detokenizer are forked from the template that `serve` left, if it did."""
    from sglang.srt.entrypoints import engine

    if not template.running():
        return NOT_NEEDED
    problem = misfit(engine._set_envs_and_config, "server_args", 'mp.set_start_method("spawn", force=True)')
    if problem:
        return problem

    def chosen(result: Any, *_: Any, **__: Any) -> Any:
        template.use()
        return result

    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", chosen, HookType.AFTER)
    return None


PARTS = [("answer", True, answer), ("route", True, route), ("workers", True, workers), ("prebuild", True, prebuild)]
