"""dsa: dual supervision and gated guidance (DSAQuant, arXiv 2609.04031).

Loss: λ(t) |student - teacher|^2 + (1 - λ(t)) |student - target|^2 with λ(t) = (e^{α (1 - t)} - 1) / (e^α - 1), t = 0 at pure
noise and 1 at clean data. Sampling goes without guidance from t = τ on, which also saves the second evaluation there.

Deviations: α = 3 and τ = 0.8 are ours. Its lookup table for timestep-conditioned layers is not part of this method: in Wan
those layers (time embedding and its projection) lie outside the blocks and are not quantized here in any method.
"""

from qvgen.methods.method import Method

METHOD = Method(name="dsa", loss="dual", guidance_stop=0.8)
