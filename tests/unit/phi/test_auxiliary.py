"""Φ: its initialisation, its fast re-decomposition, and what the optimizer makes of it."""

import pytest
import torch

from qvgen.phi.auxiliary import AuxiliaryModule, replace_parameters


def low_rank(n: int = 24, k: int = 40, rank: int = 8) -> AuxiliaryModule:
    error = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    return AuxiliaryModule.from_weight_error(error, rank)


def test_starts_as_the_best_low_rank_part_of_the_error() -> None:
    error = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    phi = AuxiliaryModule.from_weight_error(error, 8)
    singular = torch.linalg.svdvals(error)
    left = torch.linalg.matrix_norm(error - phi.delta().detach()).square()
    torch.testing.assert_close(left, singular[8:].square().sum(), rtol=1e-4, atol=1e-4)  # Eckart-Young
    torch.testing.assert_close(phi.phi_up.square().sum(0), singular[:8], rtol=1e-4, atol=1e-4)  # L = U sqrt(S)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (80, 80)])
def test_the_cheap_start_keeps_the_energy_of_a_full_svd(shape: tuple[int, int]) -> None:
    """Of an error that is nearly white, as that of quantization is, where approximate methods lose most."""
    from qvgen.quant.fake_quantizer import WeightQuantizer
    from qvgen.quant.scheme import QuantArgs

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    args = QuantArgs(num_bits=4, symmetric=False, strategy="channel")
    error = weight - WeightQuantizer.min_max(args, weight).dequantized(weight)
    best = torch.linalg.svdvals(error)[:16].square().sum()
    phi = AuxiliaryModule.from_weight_error(error, 16)
    assert phi.delta().detach().square().sum() / best == pytest.approx(1, abs=1e-5)
    gram = (phi.phi_up.T @ phi.phi_up).detach()  # columns of U sqrt(S): orthogonal
    assert (gram - gram.diag().diag()).abs().max() < 1e-4 * gram.max()


def test_no_error_gives_no_phi() -> None:
    phi = AuxiliaryModule.from_weight_error(torch.zeros(8, 6), 3)
    assert not phi.delta().any() and torch.isfinite(phi.phi_down).all()


def test_full_rank_restores_the_weight() -> None:
    error = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(AuxiliaryModule.from_weight_error(error, 4).delta().detach(), error, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 25])
def test_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 24"):
        AuxiliaryModule.from_weight_error(torch.ones(24, 40), rank)


def test_gamma_scales_the_last_columns() -> None:
    phi = low_rank()
    whole = phi.delta().detach()
    phi.gamma[4:] = 0.0
    first = phi.phi_up[:, :4] @ phi.phi_down[:4]
    torch.testing.assert_close(phi.delta(), first)
    phi.gamma[4:] = 0.5
    torch.testing.assert_close(phi.delta().detach(), first.detach() + 0.5 * (whole - first.detach()), rtol=1e-5, atol=1e-5)


def test_truncation_cuts_dead_columns_and_orders_the_rest() -> None:
    phi = low_rank()
    with torch.no_grad():  # as training leaves it: factors that are no longer orthogonal
        phi.phi_up.add_(torch.randn(phi.phi_up.shape, generator=torch.Generator().manual_seed(2)))
    kept = (phi.phi_up[:, :4] @ phi.phi_down[:4]).detach()
    phi.truncate(4)
    assert phi.rank == 4
    torch.testing.assert_close(phi.delta().detach(), kept, rtol=1e-4, atol=1e-4)
    u, s, vt = torch.linalg.svd(kept, full_matrices=False)
    torch.testing.assert_close(phi.phi_up.detach().abs(), (u[:, :4] * s[:4].sqrt()).abs(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(phi.phi_down.detach().abs(), (s[:4].sqrt()[:, None] * vt[:4]).abs(), rtol=1e-3, atol=1e-3)


def test_new_factors_survive_the_next_optimizer_step() -> None:
    """The public code's bug: an optimizer step puts the old factors back. One step must move the new ones by no more than
    the learning rate, and with fresh moments."""
    phi, rate = low_rank(), 1e-3
    optimizer = torch.optim.AdamW(phi.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(3):
        phi.delta().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    replace_parameters(optimizer, phi.truncate(4))
    new = phi.phi_up.detach().clone()
    phi.delta().square().sum().backward()
    optimizer.step()
    assert phi.phi_up.shape == (24, 4)
    assert (phi.phi_up.detach() - new).abs().max() <= rate * 1.001
    assert optimizer.state[phi.phi_up]["step"] == 1
    assert optimizer.state[phi.phi_up]["exp_avg"].shape == (24, 4)


def test_decays_to_nothing() -> None:
    phi = low_rank()
    optimizer = torch.optim.AdamW(phi.parameters())
    replace_parameters(optimizer, phi.truncate(0))
    assert phi.rank == 0 and optimizer.param_groups[0]["params"] == []
    assert torch.equal(phi.delta(), torch.zeros(24, 40))
