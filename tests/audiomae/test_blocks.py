"""The blocks of encoder and decoder against timm's and, where it has none, against their formulas."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from audiomae import AudioMAE, AudioMAEConfig, PatchGrid, PatchMask
from audiomae.decoder import Decoder, LocalBlock, MetaMlp, WindowAttention
from audiomae.encoder import Attention, Block, Encoder, run_blocks
from tests.kernels.tolerance import assert_same_function

IMPLS = ["reference", "auto"]


def random_state(module: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Values for all parameters, temperatures around 0.5."""
    generator = torch.Generator().manual_seed(0)
    state = {n: 0.3 * torch.randn(p.shape, generator=generator, dtype=dtype) for n, p in module.named_parameters()}
    for name in state:
        if name.endswith("tau"):
            state[name] = 0.1 + torch.rand(state[name].shape, generator=generator, dtype=dtype)
    return state


def random_input(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def call_of(module: nn.Module) -> Callable[..., Tensor]:
    """The module as a function of its input and its parameters."""
    return lambda x, **parameters: functional_call(module, parameters, (x,))


class Stack(nn.Module):
    def __init__(self, blocks: list[Any], norm: nn.Module, run: Callable[..., Tensor]):
        super().__init__()
        self.blocks, self.norm, self.run = nn.ModuleList(blocks), norm, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.blocks, x, self.norm)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("depth", "batch", "tokens", "dim", "num_heads", "mlp_ratio"),
    [(1, 2, 11, 24, 3, 4.0), (3, 1, 7, 12, 2, 2.5), (2, 3, 1, 8, 8, 1.0), (0, 2, 5, 8, 2, 4.0)],
)
def test_pre_norm_blocks_equal_timms(depth, batch, tokens, dim, num_heads, mlp_ratio, dtype, impl):
    blocks: list[Any] = [Block(dim, num_heads, mlp_ratio, impl) for _ in range(depth)]
    ours = Stack(blocks, nn.LayerNorm(dim, eps=1e-6), run_blocks).to(dtype)
    blocks = [TimmBlock(dim, num_heads, mlp_ratio, qkv_bias=True) for _ in range(depth)]
    for block in blocks:
        block.norm1.eps = block.norm2.eps = 1e-6
    norm_last = nn.LayerNorm(dim, eps=1e-6)
    timms = Stack(blocks, norm_last, lambda blocks, x, norm: norm(nn.Sequential(*blocks)(x))).to(dtype)
    state = random_state(timms, dtype)
    assert state.keys() == random_state(ours).keys()
    bounds = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    tensors = {"x": random_input(batch, tokens, dim, dtype=dtype)} | state
    assert_same_function(call_of(ours), call_of(timms), tensors, **bounds)


@pytest.mark.parametrize("grid", [PatchGrid((24, 8), (4, 4), (4, 4)), PatchGrid((12, 20), (4, 5), (4, 5))], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_an_encoder_that_sees_all_equals_timms_vision_transformer(grid, impl):
    sizes: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 3.0}
    ours = Encoder(grid, in_channels=2, impl=impl, **sizes).double()
    timms = VisionTransformer(
        grid.spec_size, grid.patch_size, in_chans=2, num_classes=0, global_pool="", **sizes
    ).double()
    tensors = {"x": random_input(3, 2, *grid.spec_size)} | random_state(timms)
    assert tensors.keys() == {"x"} | ours.state_dict().keys()
    assert_same_function(call_of(ours), call_of(timms), tensors, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_encoder_does_not_see_what_is_removed(impl):
    grid = PatchGrid((24, 12), (4, 4), (4, 4))
    encoder = Encoder(grid, embed_dim=16, depth=2, num_heads=2, impl=impl)
    mask = PatchMask.random(torch.arange(2), grid, 0.7)
    spec = torch.randn(2, 1, 24, 12)
    patches = grid.patchify(spec).masked_fill(mask.mask[..., None], 1e6)
    tokens = encoder(spec, mask)
    assert tokens.shape == (2, 1 + mask.ids_keep.shape[1], 16)
    torch.testing.assert_close(encoder(grid.unpatchify(patches), mask), tokens)
    order = torch.tensor([3, 0, 2, 4, 1])
    moved = encoder(spec, mask._replace(ids_keep=mask.ids_keep[:, order]))
    torch.testing.assert_close(moved[:, 1:], tokens[:, 1:][:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 5.4), ("small", 21.4), ("base", 85.3), ("large", 302.6), ("huge", 630.0)]
)
def test_encoders_have_the_tensors_and_heads_of_timms(size, millions):
    name = f"vit_{size}_patch{14 if size == 'huge' else 16}_224"
    with torch.device("meta"):
        config = AudioMAEConfig.from_size(size)
        ours: Any = AudioMAE(config).encoder
        timms: Any = timm.create_model(name, img_size=config.spec_size, patch_size=16, in_chans=1, num_classes=0)
    shapes = {key: value.shape for key, value in timms.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    assert ours.blocks[0].attn.num_heads == timms.blocks[0].attn.num_heads
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 1) == millions


LAYOUTS = [
    *product([(64, 8), (8, 8)], [(4, 4)], [(0, 0), (2, 0), (2, 2)]),
    ((8, 4), (4, 4), (2, 2)),
    ((6, 10), (3, 5), (1, 2)),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("grid", "window", "shift"), LAYOUTS)
def test_local_blocks_equal_timms_swin_v2_cr(grid, window, shift, impl):
    ours = LocalBlock(12, 3, grid, window, shift, mlp_ratio=2.0, impl=impl).double()
    timms: Any = SwinTransformerV2CrBlock(12, 3, grid, window, mlp_ratio=2.0).double().eval()
    timms.norm1.eps = timms.norm2.eps = 1e-6
    # timm itself turns every shift into half a window; an axis of one window is not shifted.
    timms.shift_size = tuple(0 if size <= side else step for size, side, step in zip(grid, window, shift, strict=True))
    timms.attn_mask = timms.get_attn_mask(dtype=torch.float64)

    def run_timms(x: Tensor, **state: Tensor) -> Tensor:
        state["attn.logit_scale"] = -state.pop("attn.tau").log()
        return functional_call(timms, state, (x.unflatten(1, grid),)).flatten(1, 2)

    tensors = {"x": random_input(2, grid[0] * grid[1], 12)} | random_state(ours)
    assert_same_function(call_of(ours), run_timms, tensors, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        *LAYOUTS,
        *(((7, 5), (3, 2), shift) for shift in product(range(3), range(2))),
        ((2, 3), (4, 4), (2, 2)),
        ((5, 9), (4, 4), (3, 1)),
    ],
)
def test_local_blocks_are_one_function_in_raster_order_and_in_windows(grid, window, shift):
    blocks = {impl: LocalBlock(12, 3, grid, window, shift, impl=impl).double() for impl in IMPLS}
    tensors = {"x": random_input(2, grid[0] * grid[1], 12)} | random_state(blocks["auto"])
    assert_same_function(call_of(blocks["auto"]), call_of(blocks["reference"]), tensors, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_tau_is_clamped_to_a_hundredth(impl):
    attention = WindowAttention(12, 3, (4, 8), (4, 4), (0, 2), impl=impl).double()
    state = random_state(attention)
    x = random_input(2, 32, 12)
    outputs, gradients = [], []
    for tau in (0.01, 0.005, -1.0, 0.0101):
        leaf = torch.tensor([0.3, tau, 0.7], dtype=torch.float64, requires_grad=True)
        out = functional_call(attention, state | {"tau": leaf}, (x,))
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    torch.testing.assert_close(outputs[1:3], [outputs[0]] * 2, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(outputs[3], outputs[0])
    assert gradients[3].all()
    for gradient in gradients[1:3]:
        assert gradient[1] == 0
        assert gradient[[0, 2]].all()


@pytest.mark.parametrize("window", [(4, 4), (3, 5), (1, 2), (1, 1)])
def test_the_position_bias_is_that_of_log_offsets(window):
    meta_mlp = MetaMlp(window, 3)
    state = {name: value.numpy() for name, value in random_state(meta_mlp, torch.float32).items()}
    places = list(product(range(window[0]), range(window[1])))
    expected = np.zeros((3, len(places), len(places)))
    for (i, query), (j, key) in product(enumerate(places), repeat=2):
        offset = [math.copysign(math.log(1 + abs(q - k)), q - k) for q, k in zip(query, key, strict=True)]
        hidden = np.maximum(state["fc1.weight"] @ offset + state["fc1.bias"], 0)
        expected[:, i, j] = state["fc2.weight"] @ hidden + state["fc2.bias"]
    meta_mlp.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    with torch.autocast("cpu", torch.bfloat16):
        bias = meta_mlp()
    assert bias.dtype == torch.float32
    np.testing.assert_allclose(bias.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_bias_dropout_drops_in_training_alone():
    torch.manual_seed(0)
    meta_mlp, plain = MetaMlp((4, 4), 8, dropout=0.25), MetaMlp((4, 4), 8)
    plain.load_state_dict(meta_mlp.state_dict())
    assert torch.equal(meta_mlp.eval()(), plain())
    meta_mlp.train()
    dropped = (meta_mlp() == 0).float()
    # The second dropout alone zeroes values: 2048 of them.
    assert abs(dropped.mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2048)
    assert not torch.equal(meta_mlp(), meta_mlp())


GRID = PatchGrid((32, 16), (4, 4), (4, 4))


@pytest.mark.parametrize(("kind", "local", "pre_norm"), [("local", 16, 0), ("hybrid", 8, 4), ("global", 0, 8)])
def test_decoders_have_the_papers_blocks(kind, local, pre_norm):
    decoder = Decoder(GRID, 16, 8, kind, dim=16, num_heads=2)
    assert [type(block) for block in decoder.blocks] == [LocalBlock] * local + [Block] * pre_norm
    shifts = [block.attn.shift for block in decoder.blocks if isinstance(block, LocalBlock)]
    assert shifts == [(0, 0), (2, 0)] * (local // 2)


@pytest.mark.parametrize(("kind", "depth", "pre_norm"), [("local", 3, 0), ("hybrid", 5, 2), ("global", 3, 3)])
def test_decoders_of_another_depth(kind, depth, pre_norm):
    decoder = Decoder(GRID, 16, 8, kind, dim=16, depth=depth, num_heads=2, global_layers=2)
    assert [isinstance(block, Block) for block in decoder.blocks] == [False] * (depth - pre_norm) + [True] * pre_norm


@pytest.mark.parametrize("kind", ["local", "hybrid", "global"])
def test_a_decoder_gives_all_patches_in_raster_order(kind):
    """Without blocks, the hidden state of a patch is the norm of its token, or of the mask token, at its position."""
    decoder = Decoder(GRID, 16, 8, kind, dim=16, depth=0, num_heads=2, global_layers=0)
    mask = PatchMask.random(torch.arange(3), GRID, 0.6)
    tokens = torch.randn(3, 1 + mask.ids_keep.shape[1], 8)
    hidden = decoder(tokens, mask)
    expected = decoder.mask_token.expand(3, GRID.num_patches, 16).clone()
    for clip in range(3):
        expected[clip, mask.ids_keep[clip]] = decoder.embed(tokens[clip, 1:])
    torch.testing.assert_close(hidden, decoder.norm(expected + decoder.pos_embed[:, 1:]))


@pytest.mark.parametrize("kind", ["local", "hybrid", "global"])
def test_only_a_global_decoder_hears_the_class_token(kind):
    torch.manual_seed(0)
    decoder = Decoder(GRID, 16, 8, kind, dim=16, depth=2, num_heads=2, global_layers=1)
    mask = PatchMask.random(torch.arange(2), GRID, 0.6)
    tokens = torch.randn(2, 1 + mask.ids_keep.shape[1], 8)
    other = torch.cat([torch.randn(2, 1, 8), tokens[:, 1:]], dim=1)
    assert torch.equal(decoder(tokens, mask), decoder(other, mask)) == (kind != "global")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "swin"}, "decoder is 'swin', expected one of 'local', 'hybrid', 'global'"),
        (
            {"kind": "hybrid", "depth": 2, "global_layers": 3},
            "a hybrid decoder of 2 blocks has 3 global ones, expected 0 to 2",
        ),
        (
            {"kind": "hybrid", "depth": 2, "global_layers": -1},
            "a hybrid decoder of 2 blocks has -1 global ones, expected 0 to 2",
        ),
        ({"num_heads": 3}, "3 heads do not divide a decoder width of 16"),
        ({"dim": 18}, "a 2-D sine-cosine embedding has 18 dimensions, expected a multiple of 4"),
    ],
)
def test_decoder_sizes_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Decoder(GRID, 16, 8, **{"dim": 16, "num_heads": 2} | settings)


def test_encoder_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"^5 heads do not divide a width of 16$"):
        Attention(16, 5)
