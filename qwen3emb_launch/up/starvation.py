"""Whether an engine that did not answer was kept from answering by its machine. Pure.

A probe without an answer looks the same from an engine that hangs and from one that was given no processor or no
memory. Killing the second one makes things worse: its successor needs more of what is missing. So a detector has to
doubt itself first, as Cassandra's does ("not marking nodes down due to local pause") and memberlist's, whose awareness
of its own slowness stretches every deadline, eightfold at most. Here such a probe is excused, EXCUSES times in a row: a
hang that spins on a busy machine shows the same signs, and is found all the same.
"""

from __future__ import annotations

from qwen3emb_launch.engine_process.strain import Strain

EXCUSES = 8  # probes in a row
LATE = 1.0  # seconds that a timer of the supervisor may be late on a machine that works
SHARE = 0.3  # of the window
GREEDY = 3.0  # times as long as it ran a thread must have waited: of what it wanted it got less than a quarter
FAULTS_A_SECOND = 1.0  # a process that waits for something else has none


def starved(strain: Strain | None) -> str:
    """In what the machine fell short, in words; empty when the engine had what it needed, and did nothing."""
    if strain is None or strain.window <= 0:
        return ""
    window = f"{strain.window:.1f} s"
    if strain.late >= LATE:
        return f"the supervisor itself was kept from running, {strain.late:.1f} s too late"
    if strain.waited is not None and strain.ran is not None:
        enough = SHARE * strain.window
        if strain.waited >= enough and strain.waited >= GREEDY * strain.ran:
            return f"the engine waited {strain.waited:.1f} s of {window} for a processor and ran {strain.ran:.1f} s"
    if strain.stolen is not None and strain.stolen >= SHARE:
        return f"the host of this machine took {100 * strain.stolen:.0f}% of its processors"
    faults = strain.faults or 0
    if faults >= FAULTS_A_SECOND * strain.window:
        return f"the engine read {faults} pages back from disk within {window}: memory is short"
    if strain.memory is not None and strain.memory >= SHARE * strain.window:
        return f"memory was short for {strain.memory:.1f} s of {window}"
    return ""
