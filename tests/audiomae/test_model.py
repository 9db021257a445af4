import copy
import json
import math
import pickle
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from audiomae import AudioMAE, AudioMAEConfig, MAEOutput, PatchMask
from tests.kernels.tolerance import assert_same_function

SMALL = AudioMAEConfig(
    spec_size=(64, 32),
    patch_size=(8, 8),
    patch_stride=(8, 8),
    embed_dim=16,
    depth=2,
    num_heads=2,
    decoder_dim=24,
    decoder_depth=3,
    decoder_heads=3,
    hybrid_global_layers=1,
)
CONFIGS = {
    "local": SMALL,
    "hybrid": replace(SMALL, decoder="hybrid"),
    "global": replace(SMALL, decoder="global"),
    "channels": replace(SMALL, in_channels=3, norm_target=False),
    "overlap": replace(SMALL, patch_stride=(5, 6), shift=(2, 2)),
}
SEEDS = torch.tensor([3, 1, 4])


def model_of(config: AudioMAEConfig = SMALL, **settings: Any) -> AudioMAE:
    torch.manual_seed(0)
    return AudioMAE(replace(config, **settings)).eval()


def spec_of(config: AudioMAEConfig = SMALL, clips: int = 3) -> Tensor:
    shape = (clips, config.in_channels, *config.spec_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_the_same_with_and_without_predictions(name):
    config = CONFIGS[name]
    model, spec = model_of(config).double(), spec_of(config).double()
    mask = PatchMask.random(SEEDS, config.grid, 0.8)

    def loss(return_pred: bool, **parameters: Tensor) -> Tensor:
        return functional_call(model, parameters, (spec,), {"mask": mask, "return_pred": return_pred}).loss

    parameters = {key: value.detach() for key, value in model.named_parameters()}
    assert_same_function(
        lambda **parameters: loss(False, **parameters), lambda **parameters: loss(True, **parameters), parameters
    )
    output = model(spec, mask=mask, return_pred=True)
    values = config.in_channels * math.prod(config.patch_size)
    assert output.pred.shape == (3, config.grid.num_patches, values)
    assert model(spec, mask=mask).pred is None
    assert torch.equal(output.mask, mask.mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_form_is_one_function(name):
    config = CONFIGS[name]
    models = {impl: AudioMAE(config, impl=impl).double() for impl in ("reference", "auto")}
    models["auto"].load_state_dict(models["reference"].state_dict())
    spec = spec_of(config).double()
    parameters = {key: value.detach() for key, value in models["auto"].named_parameters()}
    auto, reference = (
        lambda model=model, **parameters: functional_call(model, parameters, (spec,), {"seeds": SEEDS}).loss
        for model in (models["auto"], models["reference"])
    )
    assert_same_function(auto, reference, parameters)


def test_a_clips_loss_depends_on_its_seed_and_not_on_its_batch():
    model, spec = model_of(), spec_of()
    alone = [model(spec[clip : clip + 1], seeds=SEEDS[clip : clip + 1]).loss for clip in range(3)]
    together = model(spec, seeds=SEEDS).loss
    torch.testing.assert_close(together, torch.stack(alone).mean())
    torch.testing.assert_close(model(spec.flip(0), seeds=SEEDS.flip(0)).loss, together)
    assert not torch.equal(model(spec, seeds=SEEDS.flip(0)).loss, together)


def test_masks_are_drawn_from_seeds_or_pytorchs_generator():
    model, spec = model_of(), spec_of()
    mask = PatchMask.random(SEEDS, SMALL.grid, 0.8)
    assert torch.equal(model(spec, seeds=SEEDS).mask, mask.mask)
    assert model(spec, seeds=SEEDS, mask_ratio=0.5).mask.sum(dim=1).tolist() == [16] * 3
    torch.manual_seed(5)
    first = model(spec).mask
    assert not torch.equal(model(spec).mask, first)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(5)
    assert torch.equal(model(spec).mask, first)


@pytest.mark.parametrize("strategy", ["time", "frequency"])
def test_a_given_mask_is_used(strategy):
    mask = getattr(PatchMask, strategy)(SEEDS, SMALL.grid, 0.5)
    assert torch.equal(model_of()(spec_of(), mask=mask, mask_ratio=0.8).mask, mask.mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient(name):
    model = model_of(CONFIGS[name])
    model(spec_of(CONFIGS[name]), seeds=SEEDS).loss.backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant added to all logits of a head changes no probability: what its gradient holds is rounding, or nothing.
    assert not [key for key in without if not key.endswith("meta_mlp.fc2.bias")]


@pytest.mark.parametrize("name", CONFIGS)
def test_predicting_zero_of_noise_costs_about_one(name):
    config = CONFIGS[name]
    model = model_of(config)
    nn.init.zeros_(model.decoder.pred.weight)
    loss = model(spec_of(config), seeds=SEEDS).loss.item()
    if config.norm_target:
        # The unbiased variance of n values is n / (n - 1) of their mean square.
        values = config.in_channels * math.prod(config.patch_size)
        assert loss == pytest.approx((values - 1) / values, rel=1e-5)
    else:
        assert loss == pytest.approx(1, abs=0.06)  # 5 standard deviations of a mean of 15,000 squares


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    model, spec = model_of(CONFIGS["hybrid"]), spec_of()
    expected = model(spec, seeds=SEEDS).loss
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(spec, seeds=SEEDS).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("norm_target", [True, False])
def test_baseline_loss_is_that_of_predicting_each_patchs_mean(norm_target):
    model, spec = model_of(norm_target=norm_target), 2 + 3 * spec_of()
    mask = PatchMask.random(SEEDS, SMALL.grid, 0.8)
    variance, removed = SMALL.grid.patchify(spec).var(dim=-1, unbiased=False), mask.mask
    expected = torch.tensor(63 / 64) if norm_target else variance[removed].mean()
    torch.testing.assert_close(model.baseline_loss(spec, mask), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_reconstruct_restores_the_input_from_its_own_targets(name):
    config = CONFIGS[name]
    model, spec = model_of(config), 2 + 3 * spec_of(config).double()
    patches = config.grid.patchify(spec)
    target = patches
    if config.norm_target:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        target = (patches - mean) / (variance + 1e-6).sqrt()
    mask = PatchMask.random(SEEDS, config.grid, 0.8)
    restored = model.reconstruct(spec, MAEOutput(torch.zeros(()), target, mask.mask))
    torch.testing.assert_close(config.grid.patchify(restored), patches, rtol=1e-12, atol=1e-12)


def test_reconstruct_replaces_removed_patches_alone():
    model, spec = model_of(), spec_of()
    output = model(spec, seeds=SEEDS, return_pred=True)
    restored = model.reconstruct(spec, output)
    assert restored.dtype == spec.dtype
    before, after = SMALL.grid.patchify(spec), SMALL.grid.patchify(restored)
    assert torch.equal(after[~output.mask], before[~output.mask])
    assert (after[output.mask] != before[output.mask]).any(dim=-1).all()
    assert not restored.requires_grad


def test_reconstruct_needs_predictions():
    model, spec = model_of(), spec_of()
    with pytest.raises(
        ValueError, match=r"^output holds no predictions, expected that of a call with return_pred=True$"
    ):
        model.reconstruct(spec, model(spec))


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_bias_dropout_acts_in_training_alone(impl):
    torch.manual_seed(0)
    model, plain, spec = AudioMAE(replace(SMALL, bias_dropout=0.5), impl), AudioMAE(SMALL, impl), spec_of()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(spec, seeds=SEEDS).loss, plain(spec, seeds=SEEDS).loss)
    model.train()
    losses = {model(spec, seeds=SEEDS).loss.item() for _ in range(3)}
    assert len(losses) == 3
    plain.train()
    assert len({plain(spec, seeds=SEEDS).loss.item() for _ in range(3)}) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_dict_makes_an_equal_model(name):
    config = CONFIGS[name]
    model, spec = model_of(config), spec_of(config)
    other = AudioMAE(config)
    assert not torch.equal(other(spec, seeds=SEEDS).loss, model(spec, seeds=SEEDS).loss)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(spec, seeds=SEEDS).loss, model(spec, seeds=SEEDS).loss)
    fixed = model.state_dict().keys() - dict(model.named_parameters()).keys()
    assert fixed == {"encoder.pos_embed", "decoder.pos_embed"}


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_equal_and_independent(way):
    model, spec = model_of(), spec_of()
    expected = model(spec, seeds=SEEDS).loss.detach()
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(other(spec, seeds=SEEDS).loss, expected)
    assert other.config == model.config
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    assert torch.equal(model(spec, seeds=SEEDS).loss, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_agrees_with_float32(name):
    config = CONFIGS[name]
    model, spec = model_of(config), spec_of(config)
    single = model(spec, seeds=SEEDS, return_pred=True)
    double = model.double()(spec.double(), seeds=SEEDS, return_pred=True)
    assert double.loss.dtype == double.pred.dtype == torch.float64
    torch.testing.assert_close(single.loss.double(), double.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(single.pred.double(), double.pred, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_autocast(name, impl):
    config = CONFIGS[name]
    model, spec = AudioMAE(config, impl), spec_of(config)
    expected = model(spec, seeds=SEEDS).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(spec, seeds=SEEDS).loss
    loss.backward()
    assert loss.dtype == torch.float32
    # A loss is a mean of some thousand values, each some roundings of 2^-9 off.
    torch.testing.assert_close(loss, expected, rtol=2**-8, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_initial_values_are_the_published_ones():
    model = model_of(replace(SMALL, embed_dim=64, decoder_dim=96))
    rest = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight, bias = rest.pop(f"{name}.weight"), rest.pop(f"{name}.bias")
            bound = math.sqrt(6 / sum(weight.flatten(1).shape))
            assert 0.9 * bound < weight.abs().max() <= bound, name
            assert not bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (rest.pop(f"{name}.weight") == 1).all(), name
            assert not rest.pop(f"{name}.bias").any(), name
    tokens = torch.cat([rest.pop("encoder.cls_token").flatten(), rest.pop("decoder.mask_token").flatten()])
    assert abs(tokens.std() / 0.02 - 1) < 5 / math.sqrt(2 * len(tokens))
    assert all(name.endswith("tau") and (p == 1).all() for name, p in rest.items())
    assert len(rest) == 3


@pytest.mark.parametrize("shape", [(3, 1, 64, 31), (3, 1, 32, 64), (3, 2, 64, 32), (3, 64, 32), (1, 3, 1, 64, 32)])
def test_a_spectrogram_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"^spectrogram has shape \(.*\), expected \(B, 1, 64, 32\)$"):
        model_of()(torch.zeros(shape))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_ratio_that_keeps_or_removes_nothing_is_refused(ratio):
    with pytest.raises(ValueError, match=f"^a mask ratio of {ratio} keeps"):
        model_of()(spec_of(), mask_ratio=ratio)


def test_an_unknown_impl_is_refused():
    with pytest.raises(ValueError, match=r"^impl is 'fast', expected one of 'reference', 'torch', 'triton', 'auto'$"):
        AudioMAE(SMALL, impl="fast")


def test_the_defaults_are_the_papers():
    config = AudioMAEConfig()
    assert config == AudioMAEConfig.from_size("base")
    assert config.grid.shape == (64, 8)
    with torch.device("meta"):
        model = AudioMAE()
    assert model.config == config
    assert len(model.encoder.blocks) == 12
    assert len(model.decoder.blocks) == 16


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_json(name):
    config = CONFIGS[name]
    restored = AudioMAEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert hash(restored) == hash(config)
    assert config.to_dict().keys() == {field.name for field in fields(AudioMAEConfig)}


def test_a_config_with_unknown_settings_is_refused():
    with pytest.raises(ValueError, match=r"^model configuration has unknown settings: colour, width$"):
        AudioMAEConfig.from_dict({"width": 3, "depth": 2, "colour": "red"})


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ("tiny", (192, 12, 3)),
        ("small", (384, 12, 6)),
        ("base", (768, 12, 12)),
        ("large", (1024, 24, 16)),
        ("huge", (1280, 32, 16)),
    ],
)
def test_the_published_sizes(size, sizes):
    config = AudioMAEConfig.from_size(size, decoder="global", spec_size=(512, 128))
    assert (config.embed_dim, config.depth, config.num_heads) == sizes
    assert (config.decoder, config.spec_size) == ("global", (512, 128))
    assert AudioMAEConfig.from_size(size, depth=1).depth == 1
    assert CONFIGS["hybrid"].resized(size) == replace(
        CONFIGS["hybrid"], embed_dim=sizes[0], depth=sizes[1], num_heads=sizes[2]
    )


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"^size is 'giant', expected one of tiny, small, base, large, huge$"):
        AudioMAEConfig.from_size("giant")


def test_reconstruct_leaves_the_margin_that_no_patch_covers():
    config = replace(SMALL, spec_size=(64, 32), patch_size=(8, 8), patch_stride=(5, 6))
    model, spec = model_of(config), 1 + spec_of(config)
    restored = model.reconstruct(spec, model(spec, seeds=SEEDS, return_pred=True))
    assert config.grid.shape == (12, 5)
    torch.testing.assert_close(restored[:, :, 63:], spec[:, :, 63:], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": -1}, "depth is -1, expected more than 0"),
        ({"decoder_depth": 0}, "decoder_depth is 0, expected more than 0"),
        ({"in_channels": 0}, "in_channels is 0, expected more than 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0, expected more than 0"),
        ({"bias_dropout": 1.0}, "bias_dropout is 1.0, expected 0 up to but not 1"),
        ({"window": (0, 4)}, "window and shift are 0 and 2 in time, expected at least 1 and 0"),
        ({"shift": (2, -1)}, "window and shift are 4 and -1 in frequency, expected at least 1 and 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        AudioMAEConfig(**settings)


def test_a_shift_beyond_the_grid_is_refused_at_construction():
    with pytest.raises(ValueError, match=r"^shift is \(64, 0\), expected less than the padded token grid \(64, 8\)"):
        AudioMAE(AudioMAEConfig.from_size("tiny", shift=(64, 0)))
