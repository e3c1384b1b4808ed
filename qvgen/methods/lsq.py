"""lsq: learned step sizes (LSQ, arXiv 1902.08153), trained on the task.

Loss: |student - target|^2, the loss the full-precision model was trained with; the teacher plays no part. The step s of every
weight channel is learned through the straight-through estimator, with its gradient scaled by 1 / sqrt(K P).

Deviations: steps start from the searched grids instead of 2 E|w| / sqrt(P); zero points are fixed where they start (LSQ is
symmetric; the scheme decides that here); activations have a dynamic range per token, so what is learned for them is the
clip of that range, one pair per timestep group, instead of one step per layer.
"""

from qvgen.methods.method import Method

METHOD = Method(name="lsq", loss="target", zero_points=False)
