"""kd: learned grids (LSQ+, arXiv 2004.09576) and the teacher's prediction as the target. The control that Φ must beat.

Loss: |student - teacher|^2 on the same noise, timestep and prompt. Weights, scales, zero points and activation clips are
learned. It is `qvgen` without Φ: same start, same steps, same data.

Deviation from LSQ+: activations have a dynamic range per token, so their clips are learned instead of step and offset.
"""

from qvgen.methods.method import Method

METHOD = Method("kd")
