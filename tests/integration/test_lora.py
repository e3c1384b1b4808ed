"""LoRA on packed models, as users of diffusers load, weigh, switch, train and unload it."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from qvgen.checkpoint.packed import export_pipeline
from qvgen.checkpoint.pipeline import load_pipeline
from qvgen.integrations.lora import PackedLoraLinear
from qvgen.models.registry import load_family
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantArgs, QuantScheme
from tests.support.families import KINDS, make_kind

SCHEME = QuantScheme(
    weights=QuantArgs(num_bits=8), input_activations=QuantArgs(num_bits=8, strategy="token"), timestep_groups=2
)
TARGETS = r".*blocks\..*(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out|ff(n|_context)?\.net\.(0\.proj|2))"
FAMILIES = ("wan", "wan_image", "cogvideox", "ltx")
FAMILIES += ("flux", "hunyuan_video", "sana", "qwen_image", "stable_diffusion_3")
# What the last block makes of the text is read by nothing.
UNREAD = dict.fromkeys(("qwen_image", "stable_diffusion_3"), r"transformer_blocks\.1\.attn\.(add_q_proj|to_add_out)")


def adapter(transformer: Any, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a LoRA whose product is not small, made on a full-precision model."""
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), adapter_name=f"made{seed}")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name and f"made{seed}" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    state = get_peft_model_state_dict(transformer, adapter_name=f"made{seed}")
    transformer.delete_adapters(f"made{seed}")
    return state


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp(request.param)
    make_kind(request.param, root / "full")
    family, full = load_family(root / "full"), load_pipeline(root / "full")
    packed = load_pipeline(root / "full").transformer
    prepare_(packed, SCHEME, default_targets=family.default_targets)
    convert_(packed)
    export_pipeline(root / "full", packed, SCHEME, root / "packed", torch.float32)
    for seed in (1, 2):
        full.save_lora_weights(root / f"lora{seed}", transformer_lora_layers=adapter(full.transformer, seed))
    latents, *condition = KINDS[request.param].inputs(1)

    def velocity(transformer: Any) -> torch.Tensor:
        return family.predict(transformer, latents, torch.tensor([700.0]), *condition)

    def predict(pipeline: Any) -> torch.Tensor:
        with torch.no_grad():
            return velocity(pipeline.transformer)

    return SimpleNamespace(name=request.param, root=root, full=full, predict=predict, velocity=velocity)


@pytest.fixture
def packed(setup: SimpleNamespace) -> Any:
    return load_pipeline(setup.root / "packed")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_an_adapter_does_what_it_does_to_full_precision(setup: SimpleNamespace, packed: Any) -> None:
    plain_full, plain = setup.predict(setup.full), setup.predict(packed)
    for pipeline in (setup.full, packed):
        pipeline.load_lora_weights(setup.root / "lora1", adapter_name="one")
    with_full, with_packed = setup.predict(setup.full), setup.predict(packed)
    setup.full.unload_lora_weights()
    effect = distance(with_full, plain_full)
    assert effect > 0.1
    assert distance(with_packed, with_full) < 0.1 * effect  # 8 bits
    layers = [module for module in packed.transformer.modules() if isinstance(module, PackedLoraLinear)]
    assert len(layers) == sum(".attn" in name or ".ff" in name for name, _ in packed_layers(packed.transformer))
    packed.unload_lora_weights()
    assert torch.equal(setup.predict(packed), plain)


def test_several_adapters_with_weights(setup: SimpleNamespace, packed: Any) -> None:
    plain = setup.predict(packed)
    for number, name in enumerate(("one", "two"), start=1):
        packed.load_lora_weights(setup.root / f"lora{number}", adapter_name=name)
    packed.set_adapters(["one", "two"], adapter_weights=[1.0, 0.0])
    one = setup.predict(packed)
    packed.set_adapters("one")
    torch.testing.assert_close(setup.predict(packed), one)
    packed.set_adapters(["one", "two"], adapter_weights=[0.5, 0.5])
    assert distance(setup.predict(packed), one) > 0.01
    packed.disable_lora()
    torch.testing.assert_close(setup.predict(packed), plain)  # layer by layer instead of fused: other roundings
    packed.enable_lora()
    packed.delete_adapters("two")
    packed.set_adapters("one")
    torch.testing.assert_close(setup.predict(packed), one)


def test_merging_is_refused_with_what_to_do(setup: SimpleNamespace, packed: Any) -> None:
    packed.load_lora_weights(setup.root / "lora1", adapter_name="one")
    before = setup.predict(packed)
    with pytest.raises(ValueError, match=r"cannot be merged into packed ones .* leave them loaded as adapters"):
        packed.fuse_lora(lora_scale=0.5)
    assert torch.equal(setup.predict(packed), before)


def test_nothing_is_merged_where_one_layer_is_packed(setup: SimpleNamespace, packed: Any) -> None:
    """An adapter of layers that are packed and of one that is not, which comes first in the model."""
    transformer = packed.transformer
    unpacked = next(n for n, m in transformer.named_modules() if type(m) is torch.nn.Linear)
    targets = f"({TARGETS})|({re.escape(unpacked)})"
    transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    before = setup.predict(packed)
    with pytest.raises(ValueError, match="cannot be merged into packed ones"):
        packed.fuse_lora(lora_scale=0.5)
    assert torch.equal(setup.predict(packed), before)
    assert not transformer.get_submodule(unpacked).merged


def test_an_adapter_is_trained_on_the_frozen_packed_model(setup: SimpleNamespace, packed: Any) -> None:
    target = setup.predict(setup.full) * 1.5
    transformer = packed.transformer
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, target_modules=TARGETS, exclude_modules=UNREAD.get(setup.name)))
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    words = {name: layer.weight_packed.clone() for name, layer in packed_layers(transformer)}
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    losses = []
    for _ in range(8):
        loss = (setup.velocity(transformer) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(layer.weight_packed, words[name]) for name, layer in packed_layers(transformer))


def test_a_packed_layer_says_what_loaders_ask_of_a_weight(packed: Any) -> None:
    packed.transformer.to(torch.bfloat16)
    for _, layer in packed_layers(packed.transformer):
        assert layer.weight.shape == (layer.out_features, layer.in_features)
        # That of the bias: nothing else of a layer is cast.
        assert layer.weight.dtype is (torch.float32 if layer.bias is None else torch.bfloat16)
        assert not layer.weight.requires_grad
        torch.testing.assert_close(layer.weight.float(), layer.dequantize(), rtol=2**-8, atol=0)
