"""`doctor`: is this machine fit to serve embeddings, and what mends it where it is not.

report        one check: ok, warn, fail or unknown, with the command that mends it
command_line  what is wrong with an SGLang command, pure
gpu, engine, launch, machine, network, serving
              what is looked at; each has pure judgements over plain facts, and one function that gathers them
examine       all of it, in order
"""

from __future__ import annotations
