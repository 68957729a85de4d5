"""Instruction templates: how a text becomes what Qwen3-Embedding embeds. The only place that knows them.

A query is `Instruct: {task}\\nQuery:{query}` (no space after `Query:`), a document is the bare text; the task is one
English sentence, whatever the language of the texts (QwenLM/Qwen3-Embedding README: worth 1 to 5%).
"""

from __future__ import annotations

from dataclasses import dataclass

TEMPLATE = "Instruct: {task}\nQuery:{query}"
WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True)
class Task:
    """A named instruction. `instruction` None means the text is embedded bare (a document)."""

    name: str
    instruction: str | None
    about: str


TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("query", WEB_SEARCH, "a search query, the model card's own instruction"),
        Task("document", None, "a passage to be found; never instructed"),
        Task(
            "legal_retrieval",
            "Given a legal question, retrieve statutes, contract clauses and precedents that answer it",
            "a law firm's question against its documents",
        ),
        Task(
            "code_search",
            "Given a question about code, retrieve code snippets that answer it",
            "a question against source code",
        ),
        Task(
            "faq_match",
            "Given a customer question, retrieve frequently asked questions with the same meaning",
            "a question against an FAQ",
        ),
        Task(
            "intent_classify",
            "Given a user utterance, classify the intent behind it",
            "an utterance, for intent classification",
        ),
    )
}


def instruct(text: str, task: str | None) -> str:
    """The exact text to embed. `task` is a task's name, a free instruction in English, or None for a document."""
    if task is None:
        return text
    known = TASKS.get(task)
    instruction = known.instruction if known else task
    return text if instruction is None else TEMPLATE.format(task=instruction, query=text)
