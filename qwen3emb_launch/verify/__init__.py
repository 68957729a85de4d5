"""`qwen3emb verify` and `diff`: proof that an endpoint's vectors are right, before anyone relies on them.

contact   the endpoint over HTTP: what it says of itself, answers, failures counted
probes_*  one function a check: asks, compares, names the cause
reference vectors computed apart from the endpoint: golden scores, transformers, a saved set
recognition  the demo checkpoint, by its vectors where the endpoint does not name it
runner    the probes of a level, in order -> Report
"""
