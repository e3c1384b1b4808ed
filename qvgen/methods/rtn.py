"""rtn: round to nearest.

Weights: one grid per output channel over [min, max]; q = clamp(round(w / s + z), 0, P). Activations: the same per token at
run time, the whole range. Nothing is searched and nothing is trained: what any toolkit gives without calibration data.
"""

from qvgen.methods.method import Method

METHOD = Method(name="rtn", searched=False, trained=False)
