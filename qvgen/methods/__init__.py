"""Methods: how a model becomes a quantized one. A card each, found by name.

    from qvgen.methods import METHODS
    METHODS["qvgen+"].guidance_stop  # 0.7

`Method` lists the hooks: what is searched, trained, and towards what. How to add one: docs/add-a-method.md. Importing this
package loads no PyTorch.
"""

from qvgen.methods.method import Method
from qvgen.methods.registry import METHODS

__all__ = ["METHODS", "Method"]
