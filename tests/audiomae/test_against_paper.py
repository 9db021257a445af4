"""The model against the paper's formulas in float64: loss, predictions, every gradient, positions, masks."""

import math
import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from timm.models.vision_transformer import Block
from torch import Tensor

from audiomae import AudioMAE, AudioMAEConfig, PatchMask
from audiomae.checkpoints import from_official, to_official

from .transcription import (
    global_block,
    kept_patches,
    local_block,
    mae_forward,
    mask_from_noise,
    sine_cosine,
    token_grid,
)

FIXED = ("pos_embed", "decoder_pos_embed")
# The model's dtype: the error allowed relative to the largest true value, and an absolute one for what is truly zero.
BOUNDS = {torch.float64: (1e-9, 1e-12), torch.float32: (2e-5, 1e-8)}
LAYER_NORM: Any = partial(torch.nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class Case:
    """What differs from the base configuration: an 8 x 8 grid, batch 2, four fifths removed at random."""

    config: dict[str, Any] = field(default_factory=dict)
    batch: int = 2
    strategy: str = "random"
    ratios: tuple[float, ...] = (0.8,)


CASES = {
    "local": Case(),
    "hybrid": Case({"decoder": "hybrid", "decoder_depth": 4}),
    "global": Case({"decoder": "global"}),
    **{
        f"window{window[0]}x{window[1]}-shift{shift[0]}x{shift[1]}": Case({"window": window, "shift": shift})
        for window in [(4, 4), (2, 4), (3, 5)]
        for shift in [(0, 0), (2, 0), (2, 2), (1, 3)]
    },
    "padding": Case({"spec_size": (112, 96), "shift": (1, 3)}),
    "hybrid-padding": Case(
        {"decoder": "hybrid", "decoder_depth": 4, "spec_size": (128, 96), "window": (3, 5), "shift": (1, 3)}
    ),
    "one-window-of-mels": Case({"spec_size": (256, 64), "shift": (2, 2)}),
    "one-window-of-all": Case({"spec_size": (48, 64), "shift": (2, 2)}),
    "default-depth-local": Case({"decoder_depth": None}),
    "default-depth-hybrid": Case({"decoder": "hybrid", "decoder_depth": None, "hybrid_global_layers": 4}),
    "default-depth-global": Case({"decoder": "global", "decoder_depth": None}),
    "time": Case(strategy="time", ratios=(0.7,)),
    "frequency": Case(strategy="frequency", ratios=(0.6,)),
    "time-frequency": Case(strategy="time_frequency", ratios=(0.3, 0.3)),
    "patch32x16": Case({"patch_size": (32, 16), "patch_stride": (32, 16), "spec_size": (256, 128)}),
    "patch16x32": Case({"patch_size": (16, 32), "patch_stride": (16, 32)}),
    "overlap": Case({"patch_stride": (10, 10), "spec_size": (96, 64)}),
    "overlap-raw-target-global": Case(
        {"patch_stride": (10, 10), "spec_size": (64, 64), "norm_target": False, "decoder": "global"}
    ),
    "raw-target": Case({"norm_target": False}),
    "channels3": Case({"in_channels": 3}),
    "channels3-raw-target-patch16x32-hybrid": Case(
        {
            "in_channels": 3,
            "norm_target": False,
            "patch_size": (16, 32),
            "patch_stride": (16, 32),
            "decoder": "hybrid",
            "decoder_depth": 4,
        }
    ),
    "batch1": Case(batch=1),
    "batch3-global": Case({"decoder": "global"}, batch=3),
    "batch3-time-frequency": Case({"shift": (2, 2)}, batch=3, strategy="time_frequency", ratios=(0.2, 0.5)),
}


def configure(**overrides: Any) -> AudioMAEConfig:
    settings: dict[str, Any] = {
        "spec_size": (128, 128),
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 3.0,
        "decoder_dim": 24,
        "decoder_depth": 2,
        "decoder_heads": 3,
        "hybrid_global_layers": 2,
    }
    return AudioMAEConfig(**settings | overrides)


def perturb(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every value moved off its start, tau into (0.1, 1.1)."""
    moved = {name: value + 0.1 * torch.randn_like(value) for name, value in params.items()}
    for name in moved:
        if name.endswith("attn.tau"):
            moved[name] = 0.1 + torch.rand_like(moved[name])
    return moved


def reach_extremes(params: dict[str, Tensor]) -> None:
    """In place, in every local block: where a constant of the formula decides.

    The first head's tau lies below its clamp of 0.01, and its bias rivals the -100 across the seam; the last head's
    |q||k| lies on both sides of 1e-6.
    """
    for name in [name for name in params if name.endswith("attn.tau")]:
        heads = len(params[name])
        params[name][0] = 0.005
        params[name.replace("tau", "meta_mlp.fc2.weight")][0] *= 300
        for part in ("weight", "bias"):
            qkv = params[name.replace("tau", f"qkv.{part}")]
            queries, keys, _ = qkv.chunk(3)
            queries.chunk(heads)[-1].mul_(5e-4)
            keys.chunk(heads)[-1].mul_(5e-4)


@dataclass(frozen=True)
class Truth:
    config: AudioMAEConfig
    params: dict[str, Tensor]
    spec: Tensor
    mask: PatchMask
    loss: Tensor
    pred: Tensor
    gradients: dict[str, Tensor]


def draw_mask(case: Case, config: AudioMAEConfig) -> PatchMask:
    return getattr(PatchMask, case.strategy)(torch.arange(case.batch) + 7, config.grid, *case.ratios)


def transcribe(name: str, extreme: bool) -> Truth:
    """Float32 parameters and input of one case, and what the transcription makes of them in float64."""
    case = CASES[name]
    config = configure(**case.config)
    torch.manual_seed(zlib.crc32(name.encode()))
    params = perturb(to_official(AudioMAE(config, impl="reference").state_dict()))
    if extreme:
        reach_extremes(params)
    spec = torch.randn(case.batch, config.in_channels, *config.spec_size)
    mask = draw_mask(case, config)

    exact = {name: value.double().requires_grad_(name not in FIXED) for name, value in params.items()}
    loss, pred = mae_forward(exact, config, spec.double(), mask.ids_keep, mask.ids_restore, mask.mask)
    trained = [name for name in exact if name not in FIXED]
    gradients = torch.autograd.grad(loss, [exact[name] for name in trained])
    return Truth(config, params, spec, mask, loss.detach(), pred.detach(), dict(zip(trained, gradients, strict=True)))


@pytest.mark.parametrize("dtype", BOUNDS, ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_loss_pred_and_gradients(name: str, dtype: torch.dtype) -> None:
    # Float32 cannot hold 2e-5 at logits of hundreds, whoever computes them.
    true = transcribe(name, extreme=dtype == torch.float64)
    # The fixed log offsets of the windows are made in the default dtype, as parameters are.
    torch.set_default_dtype(dtype)
    try:
        model = AudioMAE(true.config, impl="reference")
    finally:
        torch.set_default_dtype(torch.float32)
    model.load_state_dict(from_official(true.params))

    output = model(true.spec.to(dtype), mask=true.mask, return_pred=True)
    output.loss.backward()
    gradients = to_official({name: p.grad for name, p in model.named_parameters() if p.requires_grad})

    assert gradients.keys() == true.gradients.keys()
    relative, absolute = BOUNDS[dtype]
    failures = []
    for what, actual, expected in [
        ("loss", output.loss, true.loss),
        ("pred", output.pred, true.pred),
        *((f"gradient of {name}", gradients[name], true.gradients[name]) for name in gradients),
    ]:
        assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
        error = (actual.double() - expected).abs().max().item()
        bound = relative * expected.abs().max().item() + absolute
        if not error <= bound:
            failures.append(f"{what}: error {error:.2e}, bound {bound:.2e}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("spec_size", [(256, 64), (64, 256), (128, 128)])
@pytest.mark.parametrize("position_grid", ["true", "official"])
def test_positions(spec_size: tuple[int, int], position_grid: str) -> None:
    config = configure(spec_size=spec_size, position_grid=position_grid)
    state = to_official(AudioMAE(config, impl="reference").state_dict())
    for name, dim in zip(FIXED, (config.embed_dim, config.decoder_dim), strict=True):
        expected = sine_cosine(dim, token_grid(config), transposed=position_grid == "official")
        torch.testing.assert_close(state[name][0].double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("spec_size", [(1024, 128), (1008, 128), (160, 48)])
@pytest.mark.parametrize(
    ("strategy", "ratios"),
    [
        *(("random", (ratio,)) for ratio in (0.3, 0.7, 0.75, 0.8)),
        *(("time", (ratio,)) for ratio in (0.3, 0.7, 0.8)),
        *(("frequency", (ratio,)) for ratio in (0.3, 0.5, 0.6)),
        *(("time_frequency", ratios) for ratios in ((0.3, 0.3), (0.2, 0.2), (0.7, 0.4))),
    ],
)
def test_strategies_remove_what_the_paper_removes(
    spec_size: tuple[int, int], strategy: str, ratios: tuple[float, ...]
) -> None:
    config = configure(spec_size=spec_size)
    times, mels = token_grid(config)
    mask = draw_mask(Case(batch=5, strategy=strategy, ratios=ratios), config)
    keep = kept_patches(strategy, (times, mels), *ratios)

    assert mask.ids_keep.shape == (5, keep)
    assert mask.ids_removed.shape == (5, times * mels - keep)
    for clip in range(5):
        order = mask.ids_keep[clip].tolist() + mask.ids_removed[clip].tolist()
        assert sorted(order) == list(range(times * mels))
        assert [order.index(token) for token in range(times * mels)] == mask.ids_restore[clip].tolist()
        assert {token for token, removed in enumerate(mask.mask[clip].tolist()) if removed} == set(order[keep:])
        kept_times = {token // mels for token in order[:keep]}
        kept_mels = {token % mels for token in order[:keep]}
        if strategy != "random":
            assert len(kept_times) * len(kept_mels) == keep, "not whole rows and columns"
            assert len(kept_times) == (times if strategy == "frequency" else int(times * (1 - ratios[0])))


@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.8])
def test_smallest_noise_is_kept_in_ascending_order(ratio: float) -> None:
    noise = torch.rand(3, 64, generator=torch.Generator().manual_seed(1))
    mask = PatchMask.from_noise(noise, ratio)
    ids_keep, ids_restore, removed = mask_from_noise(noise, ratio)
    assert torch.equal(mask.ids_keep, ids_keep)
    assert torch.equal(mask.ids_restore, ids_restore)
    assert torch.equal(mask.mask, removed)


def test_transcribed_global_block_is_timms() -> None:
    generator = torch.Generator().manual_seed(2)
    block = Block(24, 3, qkv_bias=True, norm_layer=LAYER_NORM).double()
    params = {name: torch.randn(p.shape, generator=generator).double() * 0.3 for name, p in block.named_parameters()}
    block.load_state_dict(params)
    x = torch.randn(2, 13, 24, generator=generator).double()
    actual = global_block({f"b.{name}": value for name, value in params.items()}, "b", x, 3)
    torch.testing.assert_close(actual, block(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((8, 8), (4, 4), (0, 0)),
        ((8, 8), (4, 4), (2, 0)),
        ((16, 4), (4, 4), (2, 0)),
        ((8, 12), (2, 4), (1, 3)),
        ((6, 10), (3, 5), (1, 2)),
    ],
)
def test_transcribed_local_block_is_timms(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> None:
    """Where timm can follow: no padding, whose keys it attends to, and nothing as short as the cosine's eps."""
    generator = torch.Generator().manual_seed(3)
    block: Any = SwinTransformerV2CrBlock(24, 3, grid, window, norm_layer=LAYER_NORM)
    block.double().eval()
    params = {name: torch.randn(p.shape, generator=generator).double() * 0.3 for name, p in block.named_parameters()}
    tau = torch.tensor([0.005, 0.3, 1.2]).double()
    params["attn.logit_scale"] = -tau.log()
    block.load_state_dict(params)
    block.shift_size = shift
    block.attn_mask = block.get_attn_mask()
    # timm rounds this table to float32.
    offsets = block.attn.relative_coordinates_log
    offsets.copy_(offsets.sign() * torch.log(1 + torch.round(torch.exp(offsets.abs()) - 1)))

    x = torch.randn(2, math.prod(grid), 24, generator=generator).double()
    params = {f"b.{name}": value for name, value in params.items()} | {"b.attn.tau": tau}
    actual = local_block(params, "b", x, 3, grid, window, shift)
    torch.testing.assert_close(actual, block(x.unflatten(1, grid)).flatten(1, 2), rtol=1e-10, atol=1e-10)
