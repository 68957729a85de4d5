"""An SGLang plugin for embedding servers: the same answers for less work.

SGLang calls `register` once in the HTTP process and once in each scheduler process (entry-point group
`sglang.srt.plugins`). Each part looks at what it would hook and stands aside, with a log line, where that is not
what it was written for; the server is then the stock one at that place.

Environment: QWEN3EMB_PLUGIN=0 turns everything off, QWEN3EMB_PLUGIN_<PART>=0 one part (answer, route, workers; vectors,
direct, idle, linger, snapshots, freeing, unsampled, ahead, full_graph, graph_inputs, attention, fp8_layer, last_layer,
gated, heap, norms; of `serve`: template, tokenizer, bytecode, unused, readahead, prebuild). QWEN3EMB_PLUGIN_<PART>=1
turns on what is off by itself (few_rows, graph_attention, graph_last_layer, graph_gated; linger on few cores;
last_layer off Hopper). QWEN3EMB_PLUGIN_ANY_VERSION=1 skips the version check.
`SGLANG_PLUGINS` is SGLang's own list of the plugins it loads.
"""

from __future__ import annotations

import logging
import multiprocessing

from qwen3emb_engine_plugin.switches import NOT_NEEDED, misfit_of_version, switched_on

logger = logging.getLogger("qwen3emb_engine_plugin")


def register() -> None:
    """Register the hooks that fit this engine in this process."""
    if not switched_on(None):
        logger.info("qwen3emb plugin: off (QWEN3EMB_PLUGIN=0)")
        return
    problem = misfit_of_version()
    if problem:
        logger.warning("qwen3emb plugin: stands aside: %s", problem)
        return
    # The scheduler is a child process; the HTTP server and the tokenizer manager live in the main one.
    if multiprocessing.parent_process() is None:
        from qwen3emb_engine_plugin import http_side as side
    else:
        from qwen3emb_engine_plugin import scheduler_side as side  # type: ignore[no-redef]
    for name, default, part in side.PARTS:
        if not switched_on(name, default):
            logger.info("qwen3emb plugin: %s off", name)
            continue
        try:
            problem = part()
        except Exception as error:  # a moved module or class: the engine is not what this part knows
            problem = f"{type(error).__name__}: {error}"
        if problem and problem != NOT_NEEDED:
            logger.warning("qwen3emb plugin: %s stands aside: %s", name, problem)
        else:
            logger.info("qwen3emb plugin: %s %s", name, problem or "on")
