"""Faults that befall training runs, made on purpose; ``bench.reliability`` plays them."""
