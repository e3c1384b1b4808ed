from pathlib import Path

import torch
from torch import nn

from qvgen.evaluation.cost.size import folder_bytes, published_packed_ratio
from qvgen.models.wan import WAN_2_1_1_3B, WanFamily
from qvgen.quant.scheme import QuantArgs, QuantScheme

MAX_W4A4 = 0.27  # issue: the same scheme on Wan 2.1 1.3B


def test_folder_bytes_counts_every_file_below(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b").write_bytes(b"x" * 5)
    assert folder_bytes(tmp_path) == 15


def test_the_wan_config_is_that_of_the_1_3b_model() -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(**WAN_2_1_1_3B)
    assert sum(p.numel() for p in model.parameters()) == 1_418_996_800
    assert model.blocks[0].attn1.to_q.in_features == 1536
    assert sum(isinstance(m, nn.Linear) for m in model.blocks.modules()) == 30 * 10


def test_ratio_of_wan_falls_with_the_bits_and_meets_the_target() -> None:
    def ratio(bits: int) -> float:
        weights = QuantArgs(num_bits=bits, zero_point_domain="float")
        return published_packed_ratio(WanFamily(), QuantScheme(weights=weights))

    assert 0.25 < ratio(4) <= MAX_W4A4
    assert ratio(2) < ratio(3) < ratio(4) < ratio(8) < 0.53
