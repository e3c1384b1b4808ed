"""qvgen: auxiliary modules Φ and rank decay (QVGen, arXiv 2505.11497).

Y = (Q(W) + L diag(γ) R) Q(X) with L R the best rank-r part of W - Q(W) at the start; loss |student - teacher|^2. In every
phase the last λ r directions are scaled by u, which falls from 1 to 0, and are cut; the rest is decomposed anew, until
nothing is left of Φ. Deviations, each with its reason: docs/method.md.
"""

from qvgen.methods.method import Method

METHOD = Method(name="qvgen", phi=True)
