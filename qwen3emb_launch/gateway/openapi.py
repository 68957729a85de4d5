"""The gateway's own OpenAPI document, served at /openapi.json; the fuzz test checks the server against it."""

from __future__ import annotations

from typing import Any

from qwen3emb_launch import __version__

TEXT = r"^[^\u0000]*[^\s\u0000][^\u0000]*$"
HIGHEST_ID = 2**31 - 1  # of a token, where no vocabulary is known


def _json(schema: dict[str, Any], about: str) -> dict[str, Any]:
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def document(
    dims: tuple[int, int] | None = None, max_items: int = 2_048, highest_id: int = HIGHEST_ID
) -> dict[str, Any]:
    """OpenAPI 3.1. `dims` are the least and the most there are, None while no engine has been up."""
    error = _json({"$ref": "#/components/schemas/Error"}, "An error in OpenAI's form")
    errors = {str(s): error for s in (400, 401, 404, 405, 408, 413, 414, 417, 429, 431, 500, 502, 503, 504)}
    text = {"type": "string", "pattern": TEXT, "description": "Not blank, without NUL characters"}
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": highest_id}}
    span = {"minimum": dims[0], "maximum": dims[1]} if dims else {"minimum": 1}
    get_errors = {k: errors[k] for k in ("401", "404", "405")} | {"403": error}
    model = {
        "type": "object",
        "required": ["id", "object", "created", "owned_by"],
        "properties": {
            "id": {"type": "string"}, "object": {"const": "model"}, "created": {"type": "integer"},
            "owned_by": {"type": "string"}, "dimensions": {"type": "integer"}, "max_input_tokens": {"type": "integer"},
            "dtype": {"type": "string"}, "quantization": {"type": "string"},
        },
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "qwen3emb gateway", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": {
            "/v1/embeddings": {
                "post": {
                    "operationId": "embed",
                    "summary": "Vectors for texts or token ids",
                    "parameters": [
                        {"name": "X-Embedding-Task", "in": "header", "schema": {"type": "string"}},
                        {"name": "X-Embedding-Role", "in": "header", "schema": {"enum": ["query", "document"]}},
                    ],
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Request"}}},
                    },
                    "responses": {"200": _json({"$ref": "#/components/schemas/Answer"}, "The vectors"), **errors},
                }
            },
            "/v1/models": {
                "get": {
                    "operationId": "models",
                    "responses": {
                        "200": _json(
                            {
                                "type": "object",
                                "required": ["object", "data"],
                                "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": model}},
                            },
                            "Model names and task aliases",
                        ),
                        **get_errors,
                    },
                }
            },
            "/v1/models/{model}": {
                "get": {
                    "operationId": "model",
                    "parameters": [
                        {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                    ],
                    "responses": {"200": _json(model, "One model"), "400": error, **get_errors},
                }
            },
            "/health": {"get": {"operationId": "health", "responses": {"200": _json({"type": "object"}, "Alive")}}},
            "/ready": {
                "get": {
                    "operationId": "ready",
                    "responses": {
                        "200": _json({"type": "object"}, "An engine is up"),
                        "503": _json({"type": "object"}, "None is"),
                    },
                }
            },
        },
        "components": {
            "schemas": {
                "Request": {
                    "type": "object",
                    "required": ["input", "model"],
                    "additionalProperties": False,
                    "properties": {
                        "input": {
                            "oneOf": [
                                text,
                                {"type": "array", "minItems": 1, "maxItems": max_items, "items": text},
                                ids,
                                {"type": "array", "minItems": 1, "maxItems": max_items, "items": ids},
                            ]
                        },
                        "model": {"type": "string", "minLength": 1},
                        "dimensions": {"type": ["integer", "null"], **span},
                        "encoding_format": {"enum": ["float", "base64", None]},
                        "user": {"type": ["string", "null"]},
                    },
                },
                "Answer": {
                    "type": "object",
                    "required": ["object", "data", "model", "usage"],
                    "properties": {
                        "object": {"const": "list"},
                        "model": {"type": "string"},
                        "data": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["object", "index", "embedding"],
                                "properties": {
                                    "object": {"const": "embedding"},
                                    "index": {"type": "integer"},
                                    "embedding": {
                                        "oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]
                                    },
                                },
                            },
                        },
                        "usage": {
                            "type": "object",
                            "required": ["prompt_tokens", "total_tokens"],
                            "properties": {"prompt_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"}},
                        },
                    },
                },
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["message", "type", "param", "code", "source"],
                            "properties": {
                                "message": {"type": "string"}, "type": {"type": "string"},
                                "param": {"type": ["string", "null"]}, "code": {"type": "string"},
                                "source": {"enum": ["gateway", "engine"]}, "index": {"type": "integer"},
                            },
                        }
                    },
                },
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }  # fmt: skip
