"""mse: searched ranges, no training.

Weights: per output channel the range p [min, max], p in {1.00, 0.99, ... 0.21}, that minimises sum |w - Q(w)|^2.4 (the search
QVGen starts from, its section 4.1). Activations: per layer and timestep group the pair of clips that minimises the squared
error that reaches the layer's output, weighted by the squared norm of the weight's column; QVGen starts at 0.95 instead.
Every trained method starts from these grids unless its card says otherwise. The search: qvgen/quant/search/mse.py.
"""

from qvgen.methods.method import Method

METHOD = Method("mse", trained=False)
