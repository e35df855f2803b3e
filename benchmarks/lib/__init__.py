"""What all benchmarks share: the environment of a row, timing, traffic and errors."""
