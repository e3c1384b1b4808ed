"""Benchmarks of the packed layers and models: `python -m bench.linear`, `python -m bench.dit_step`. No part of the wheel."""
