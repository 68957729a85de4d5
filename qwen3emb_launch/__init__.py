"""qwen3emb-launch: a Qwen3-Embedding endpoint on SGLang that is proven, tuned, kept alive and costed."""

__version__ = "0.1.0"
