"""The auxiliary module Φ: a low-rank addition to the quantized weight that exists only during training.

Y = (Q(W) + L diag(γ) R) Q(X). Φ starts as the best rank-r part of what quantization lost, W - Q(W); lower gradient norms
follow (QVGen, section 3.2). At the end of training its rank is 0 and nothing of it is deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from qvgen.sharded import is_sharded, shared_as, whole


class AuxiliaryModule(nn.Module):
    """Factors `phi_up` (N, R) and `phi_down` (R, K), and γ (R,), which the schedule sets from outside.

    Sharded factors keep the shape that they had at first: what lies beyond `rank` is zero, gets no gradient and stays zero.
    """

    gamma: torch.Tensor

    def __init__(self, phi_up: torch.Tensor, phi_down: torch.Tensor) -> None:
        super().__init__()
        if phi_up.shape[1] != phi_down.shape[0]:
            raise ValueError(f"ranks differ: phi_up {tuple(phi_up.shape)}, phi_down {tuple(phi_down.shape)}")
        # Contiguous, as a loaded state is: products of other strides round otherwise, and a resumed run would differ.
        self.phi_up, self.phi_down = (
            nn.Parameter(x.detach().clone(memory_format=torch.contiguous_format)) for x in (phi_up, phi_down)
        )
        self.register_buffer("gamma", torch.ones(phi_up.shape[1], device=phi_up.device), persistent=False)
        self.rank = phi_up.shape[1]

    @classmethod
    def from_weight_error(cls, error: torch.Tensor, rank: int) -> AuxiliaryModule:
        """Best rank-`rank` approximation of `error` = W - Q(W), (N, K), on its device: L = U sqrt(S), R = sqrt(S) V^T.

        From the eigenvectors U of the smaller Gram matrix: a full SVD of all layers of Wan 1.3B takes 17 minutes of a core,
        and of 14B hours, for the few directions that are kept (docs/scale.md).
        """
        if not 1 <= rank <= min(error.shape):
            raise ValueError(f"rank must be between 1 and {min(error.shape)} for a weight {tuple(error.shape)}, got {rank}")
        e = error.detach().float()
        tall = e.shape[0] > e.shape[1]
        e = e.T if tall else e
        _, vectors = torch.linalg.eigh(e @ e.T)  # ascending
        basis = vectors[:, -rank:].flip(1)
        projected = basis.T @ e  # S V^T
        root = projected.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        up, down = basis * root, projected / root[:, None]
        return cls(down.T, up.T) if tall else cls(up, down)

    @classmethod
    def from_zero(cls, weight: torch.Tensor, rank: int, generator: torch.Generator) -> AuxiliaryModule:
        """Φ = 0 for a weight (N, K), on its device: L = 0, and R random with rows of length 1, as adapters usually start."""
        n, k = weight.shape
        down = torch.randn(rank, k, generator=generator) / k**0.5
        return cls(torch.zeros(n, rank, device=weight.device), down.to(weight.device))

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the factors, by name, without what lies beyond the rank."""
        return {"phi_up": (self.phi_up.shape[0], self.rank), "phi_down": (self.rank, self.phi_down.shape[1])}

    def delta(self) -> torch.Tensor:
        """L diag(γ) R, (N, K)."""
        return (self.phi_up * self.gamma) @ self.phi_down

    @torch.no_grad()
    def singular_values(self) -> torch.Tensor:
        """Of L diag(γ) R, (R,) in falling order."""
        core = torch.linalg.qr(self.phi_up * self.gamma).R @ torch.linalg.qr(self.phi_down.T).R.T
        return torch.linalg.svdvals(core)

    @torch.no_grad()
    def truncate(
        self,
        rank: int,
        redecompose: bool = True,
        agree: Callable[[Sequence[torch.Tensor]], None] = lambda factors: None,
    ) -> dict[nn.Parameter, nn.Parameter | None]:
        """Keep the first `rank` columns, and decompose the rest anew: columns ordered by singular value again.

        Without `redecompose` the columns stay as they are. The public code's fault, below, has the same effect. `agree` makes
        the factors of several processes the same, in place.

        QR of L and R^T and the SVD of an R x R core give the factors of the full SVD at a fraction of its time. Returns
        the old factors with the new ones (None at rank 0), for `replace_parameters`: an optimizer that goes on with the
        old ones would undo the decomposition at its next step, as happens in the public code.
        """
        if not 0 <= rank <= self.rank:
            raise ValueError(f"cannot grow Φ from rank {self.rank} to {rank}")
        up, down = whole(self.phi_up)[:, :rank], whole(self.phi_down)[:rank]
        if rank and redecompose:
            q_up, r_up = torch.linalg.qr(up)
            q_down, r_down = torch.linalg.qr(down.T)
            u, s, vt = torch.linalg.svd(r_up @ r_down.T)
            root = s.sqrt()
            up, down = q_up @ (u * root), (root[:, None] * vt) @ q_down.T
        up, down = up.contiguous(), down.contiguous()
        if rank:
            agree((up, down))
        return self.assign(up, down)

    def assign(self, up: torch.Tensor, down: torch.Tensor) -> dict[nn.Parameter, nn.Parameter | None]:
        """Take other factors, of any rank. Returns the old parameters with the new ones, None if the rank is 0; sharded ones
        stay and take the values, because FSDP knows them and their shape, and the rank cannot exceed that of before."""
        old, self.rank = (self.phi_up, self.phi_down), up.shape[1]
        if is_sharded(self.phi_up):
            with torch.no_grad():
                for factor, value in zip(old, (up, down), strict=True):
                    factor.copy_(shared_as(factor, value))
            self.gamma.zero_()[: self.rank] = 1
        else:
            self.phi_up, self.phi_down = nn.Parameter(up.contiguous()), nn.Parameter(down.contiguous())
            self.gamma = torch.ones(self.rank, dtype=self.gamma.dtype, device=self.gamma.device)
        new = (self.phi_up, self.phi_down) if self.rank else (None, None)
        return dict(zip(old, new, strict=True))


def replace_parameters(optimizer: torch.optim.Optimizer, replaced: Mapping[nn.Parameter, nn.Parameter | None]) -> None:
    """Let the optimizer step the new parameters, with fresh moments, in place of the old ones (None: of none)."""
    for group in optimizer.param_groups:
        swapped = [replaced.get(p, p) for p in group["params"]]
        group["params"] = [p for p in swapped if p is not None]
    for old in replaced:
        optimizer.state.pop(old, None)
