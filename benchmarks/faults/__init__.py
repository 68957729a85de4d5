"""The parts of `benchmarks/chaos.py`: load, processes, a small service manager, the faults, the table."""
