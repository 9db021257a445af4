"""Modules against what they stand in for: timm's, PyTorch's, and image MAE's own lines."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mae_kernels import modules as m
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as SwinV2Attention
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .calls import shuffled_rows
from .outcomes import assert_same, draw, outcome, scatter_parameters

IDS = shuffled_rows(2, 12)
GRID = (3, 4)  # of the patches of an image
IMAGE, PATCH = (12, 12), (4, 3)
VALUES = 2 * PATCH[0] * PATCH[1]
X = {"x": draw(2, 5, 8)}


def published_embed(module: m.VisiblePatchEmbed, image: Tensor, ids_keep: Tensor | None = None) -> Tensor:
    """As MAE does it: project all, add positions, gather, put the class token in front."""
    tokens = F.conv2d(image, module.proj.weight, module.proj.bias, stride=module.stride).flatten(2).transpose(1, 2)
    if module.pos_embed is not None:
        tokens = tokens + module.pos_embed[:, int(module.cls_token is not None) :]
    if ids_keep is not None:
        tokens = tokens.gather(1, ids_keep[:, :, None].expand(-1, -1, tokens.shape[2]))
    if module.cls_token is None:
        return tokens
    cls_token = module.cls_token if module.pos_embed is None else module.cls_token + module.pos_embed[:, :1]
    return torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)


@pytest.mark.parametrize("stride", [None, (3, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("position", ["learned", "sincos", None])
def test_visible_patch_embed_is_the_published_one(position, cls_token, bias, stride):
    options = {"position": position, "cls_token": cls_token, "bias": bias, "stride": stride}
    module = m.VisiblePatchEmbed(IMAGE, PATCH, 8, in_channels=2, dtype=torch.float64, **options)
    scatter_parameters(module)
    for inputs in ({"image": draw(2, 2, *IMAGE)}, {"image": draw(2, 2, *IMAGE), "ids_keep": IDS[:, :3]}):
        assert_same(outcome(module, inputs), outcome(module, inputs, partial(published_embed, module)))


def test_fixed_positions_are_those_of_image_mae():
    table = m.VisiblePatchEmbed(IMAGE, PATCH, 8).pos_embed
    expected = [[0.0] * 8]
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            angles = [[place * omega for omega in (1, 0.01)] for place in (column, row)]
            expected.append([f(angle) for half in angles for f in (math.sin, math.cos) for angle in half])
    torch.testing.assert_close(table, torch.tensor([expected]), rtol=0, atol=1e-6)
    for has_cls in (True, False):
        decoder = m.RestoreTokens(GRID, 8, has_cls=has_cls)
        assert torch.equal(decoder.decoder_pos_embed, table[:, 0 if has_cls else 1 :])
        assert "decoder_pos_embed" in decoder.state_dict()
        assert [name for name, _ in decoder.named_parameters()] == ["mask_token"]


def test_patches_start_as_in_image_mae():
    torch.manual_seed(0)
    module = m.VisiblePatchEmbed(224, 16, 768, position="learned")
    torch.manual_seed(0)
    stock = PatchEmbed(224, 16, 3, 768)
    bias = stock.proj.bias.clone()
    nn.init.xavier_uniform_(stock.proj.weight.data.view(768, -1))
    torch.testing.assert_close(module.proj.weight, stock.proj.weight)
    assert torch.equal(module.proj.bias, bias)
    decoder = m.RestoreTokens(196, 512, position="learned")
    for parameter in (module.cls_token, module.pos_embed, decoder.mask_token, decoder.decoder_pos_embed):
        count = parameter.numel()
        assert abs(parameter.std().item() / 0.02 - 1) < 5 / math.sqrt(2 * count)
        assert abs(parameter.mean().item()) < 5 * 0.02 / math.sqrt(count)


def published_restore(module: m.RestoreTokens, tokens: Tensor, ids_restore: Tensor) -> Tensor:
    """As MAE does it: append mask tokens, gather, class token in front, add positions."""
    cls, visible = tokens[:, : int(module.has_cls)], tokens[:, int(module.has_cls) :]
    masked = module.mask_token.expand(len(tokens), ids_restore.shape[1] - visible.shape[1], -1)
    x = torch.cat([visible, masked], dim=1).gather(1, ids_restore[:, :, None].expand(-1, -1, tokens.shape[2]))
    x = torch.cat([cls, x], dim=1)
    if module.decoder_pos_embed is not None:
        x = x + module.decoder_pos_embed
    return x if module.keep_cls else x[:, int(module.has_cls) :]


@pytest.mark.parametrize(("has_cls", "keep_cls"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("position", ["learned", "sincos", None])
def test_restore_tokens_is_the_published_one(position, has_cls, keep_cls):
    module = m.RestoreTokens(GRID, 8, position=position, has_cls=has_cls, keep_cls=keep_cls, dtype=torch.float64)
    inputs = {"tokens": draw(2, 3 + int(has_cls), 8), "ids_restore": IDS.argsort(dim=1)}
    assert_same(outcome(module, inputs), outcome(module, inputs, partial(published_restore, module)))


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def timm_block(kind: str, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> nn.Module:
    """timm's block of a kind that adds its window attention to its input, and nothing else."""
    options = {"window_size": window, "shift_size": shift, "num_heads": 2}
    make = {
        "swin": partial(SwinTransformerBlock, 8, grid),
        "swin_v2": partial(SwinTransformerV2Block, 8, grid),
        "swin_v2_cr": partial(SwinTransformerV2CrBlock, 8, feat_size=grid, init_values=None),
    }
    block = make[kind](**options).double()
    block.norm1, block.norm2, block.mlp = nn.Identity(), nn.Identity(), Nothing()
    return block


def attend_through(block: nn.Module, grid: tuple[int, int], x: Tensor) -> Tensor:
    return (block(x.unflatten(1, grid)) - x.unflatten(1, grid)).flatten(1, 2)


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((6, 4), (3, 2), (0, 0)), ((6, 4), (3, 2), (1, 1)), ((8, 2), (4, 4), (2, 2)), ((4, 4), (1, 4), (0, 0))],
)
@pytest.mark.parametrize("kind", ["swin", "swin_v2", "swin_v2_cr"])
def test_window_attention_is_timms(kind, grid, window, shift):
    block = timm_block(kind, grid, window, shift)
    scatter_parameters(block)
    if kind != "swin":
        block.attn.logit_scale.data.view(-1)[0] = 5  # above the largest, log(100)
    module = m.WindowAttention(8, 2, grid, window, shift, kind=kind, dtype=torch.float64)
    module.load_state_dict(block.attn.state_dict())
    assert block.attn.load_state_dict(module.state_dict())
    x = {"x": draw(3, grid[0] * grid[1], 8)}
    for training in (False, True):  # in which V2-CR drops values of its bias
        for either in (module, block):
            either.train(training)
        torch.manual_seed(0)
        results = outcome(module, x)
        torch.manual_seed(0)
        assert_same(results, outcome(block.attn, x, partial(attend_through, block, grid)))


def test_offsets_of_swin_v2_refer_to_the_window_of_pre_training():
    stock = SwinV2Attention(8, (3, 2), 2, pretrained_window_size=(6, 6)).double()
    module = m.WindowAttention(8, 2, (3, 2), (3, 2), kind="swin_v2", pretrained_window=6, dtype=torch.float64)
    module.load_state_dict(stock.state_dict())
    x = {"x": draw(2, 6, 8)}
    assert_same(outcome(module, x), outcome(stock, x))


def test_window_attention_without_qkv_bias():
    for kind in ("swin", "swin_v2", "swin_v2_cr"):
        names = m.WindowAttention(8, 2, (4, 4), 2, kind=kind, qkv_bias=False).state_dict().keys()
        assert not names & {"qkv.bias", "q_bias", "v_bias"}
    stock = SwinV2Attention(8, (2, 3), 2, qkv_bias=False).double()
    module = m.WindowAttention(8, 2, (2, 3), (2, 3), kind="swin_v2", qkv_bias=False, dtype=torch.float64)
    module.load_state_dict(stock.state_dict())
    x = {"x": draw(2, 6, 8)}
    assert_same(outcome(module, x), outcome(stock, x))


@pytest.mark.parametrize("kind", ["swin", "swin_v2_cr"])
def test_window_attention_starts_as_timms(kind):
    torch.manual_seed(0)
    module = m.WindowAttention(8, 2, (6, 4), (3, 2), kind=kind)
    torch.manual_seed(0)
    block = timm_block(kind, (6, 4), (3, 2), (0, 0)).float()
    own, stock = dict(module.state_dict()), dict(block.attn.state_dict())
    if kind == "swin":  # a normal distribution of deviation 0.02, which PyTorch 2.14 draws in another way than timm
        for table in (own.pop("relative_position_bias_table"), stock.pop("relative_position_bias_table")):
            assert 0.012 < table.std() < 0.028
            assert table.abs().max() < 0.1
    torch.testing.assert_close(own, stock, rtol=0, atol=0)


def test_swin_v2_starts_as_timms():
    module, stock = m.WindowAttention(8, 2, (6, 4), 2, kind="swin_v2"), SwinV2Attention(8, (2, 2), 2)
    for name, parameter in stock.named_parameters():
        own = module.get_parameter(name)
        if parameter.std() == 0 or name == "logit_scale":
            assert torch.equal(own, parameter), name
        else:  # nn.Linear's own: uniform up to the same bound
            bound = stock.get_submodule(name.rpartition(".")[0]).in_features ** -0.5
            assert bound / 2 < own.abs().max() <= bound, name


def published_loss(
    pred: Tensor, image: Tensor, mask: Tensor, normalize: bool = True, patch: tuple[int, int] = PATCH
) -> Tensor:
    """As MAE does it: patchify, normalise, score all patches, mean under the mask."""
    batch, channels, height, width = image.shape
    rows, columns = height // patch[0], width // patch[1]
    x = image.reshape(batch, channels, rows, patch[0], columns, patch[1])
    target = torch.einsum("nchpwq->nhwpqc", x).reshape(batch, rows * columns, -1)
    if normalize:
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def mask_of(ids_removed: Tensor) -> Tensor:
    return torch.zeros(2, 12, dtype=torch.float64).scatter(1, ids_removed, 1)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("normalize", [True, False])
def test_losses_are_the_published_one(normalize, impl):
    loss = m.MaskedMSELoss(PATCH, normalize=normalize, impl=impl)
    head = m.LinearMaskedMSELoss(8, PATCH, 2, normalize=normalize, dtype=torch.float64, impl=impl)
    stock = nn.Linear(8, VALUES).double()
    head.load_state_dict(stock.state_dict())
    mask = mask_of(IDS[:, 3:])

    inputs = {"pred": draw(2, 12, VALUES), "image": draw(2, 2, *IMAGE)}
    expected = outcome(loss, inputs, partial(published_loss, mask=mask, normalize=normalize))
    assert_same(outcome(loss, inputs, partial(loss, ids_removed=IDS[:, 3:])), expected)
    for given in (mask, mask.bool(), mask.long()):
        assert_same(outcome(loss, inputs, partial(loss, mask=given)), expected)

    inputs = {"hidden": draw(2, 12, 8), "image": draw(2, 2, *IMAGE)}
    expected = outcome(
        stock, inputs, lambda hidden, image: published_loss(stock(hidden), image, mask=mask, normalize=normalize)
    )
    assert_same(outcome(head, inputs, partial(head, ids_removed=IDS[:, 3:])), expected)
    assert torch.equal(head.predict(inputs["hidden"]), stock(inputs["hidden"]))


def test_a_mask_may_remove_different_numbers_of_patches():
    loss = m.MaskedMSELoss(PATCH)
    mask = torch.arange(12) < torch.tensor([[1], [7]])
    inputs = {"pred": draw(2, 12, VALUES), "image": draw(2, 2, *IMAGE)}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = outcome(loss, inputs, partial(published_loss, mask=mask))
    for run in (loss, compiled):
        assert_same(outcome(loss, inputs, partial(run, mask=mask)), expected)


@pytest.mark.parametrize(
    ("make", "stock"),
    [
        (partial(m.LinearMaskedMSELoss, 8, PATCH, 2), partial(nn.Linear, 8, VALUES)),
        (partial(m.LinearMaskedMSELoss, 8, PATCH, 2, bias=False), partial(nn.Linear, 8, VALUES, bias=False)),
        (partial(m.AddLayerNorm, 8, 1e-6), partial(nn.LayerNorm, 8)),
        (partial(m.FusedMlp, 8), partial(Mlp, 8, 32)),
        (partial(m.FusedMlp, 8, 5), partial(Mlp, 8, 5)),
        (partial(m.FlashSelfAttention, 8, 2), partial(Attention, 8, 2, qkv_bias=True)),
        (partial(m.FlashSelfAttention, 8, 2, qkv_bias=False), partial(Attention, 8, 2)),
    ],
)
def test_modules_start_as_what_they_stand_in_for(make, stock):
    torch.manual_seed(0)
    module = make()
    torch.manual_seed(0)
    torch.testing.assert_close(module.state_dict(), stock().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(
    ("make", "stock"),
    [
        (partial(m.FusedMlp, 8, 16), partial(Mlp, 8, 16)),
        (partial(m.FlashSelfAttention, 8, 2), partial(Attention, 8, 2, qkv_bias=True)),
    ],
)
def test_layers_are_timms(make, stock, impl):
    module, stock = make(dtype=torch.float64, impl=impl), stock().double()
    scatter_parameters(module)
    stock.load_state_dict(module.state_dict())
    assert_same(outcome(module, X), outcome(stock, X))


def test_add_layer_norm_is_an_addition_and_a_norm():
    module, stock = m.AddLayerNorm(8, 1e-6, dtype=torch.float64), nn.LayerNorm(8, eps=1e-6).double()
    scatter_parameters(module)
    stock.load_state_dict(module.state_dict())

    def run(x, residual, branch_scale=None):
        total = residual + (x if branch_scale is None else x * branch_scale[:, None, None])
        return total, stock(total)

    inputs = X | {"residual": draw(2, 5, 8, seed=1), "branch_scale": draw(2)}
    assert_same(outcome(module, inputs), outcome(stock, inputs, run))
    inputs = {name: inputs[name] for name in ("x", "residual")}
    assert_same(outcome(module, inputs), outcome(stock, inputs, run))


class FusedBlock(nn.Module):
    """A pre-norm block under timm's names, its first norm computed where the sum before it is."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1, self.norm2 = m.AddLayerNorm(dim, 1e-6), m.AddLayerNorm(dim, 1e-6)
        self.attn, self.mlp = m.FlashSelfAttention(dim, 2), m.FusedMlp(dim)

    def forward(self, branch: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x, normed = self.norm1(branch, x)
        x, normed = self.norm2(self.attn(normed), x)
        return self.mlp(normed), x


class FusedImageMAE(nn.Module):
    """Image MAE of 64 pixels, of the modules and nn.Linear."""

    def __init__(self):
        super().__init__()
        self.masking = m.RandomMasking((8, 8), 0.75)
        self.patch_embed = m.VisiblePatchEmbed(64, 8, 16)
        self.blocks = nn.ModuleList(FusedBlock(16) for _ in range(2))
        self.norm = m.AddLayerNorm(16, 1e-6)
        self.decoder_embed = nn.Linear(16, 8)
        self.restore = m.RestoreTokens((8, 8), 8, keep_cls=True)
        self.decoder_blocks = nn.ModuleList([FusedBlock(8)])
        self.decoder_norm = m.AddLayerNorm(8, 1e-6)
        self.decoder_pred = m.LinearMaskedMSELoss(8, 8)

    def forward(self, image: Tensor, seeds: Tensor) -> Tensor:
        mask = self.masking(seeds)
        x = self.patch_embed(image, mask.ids_keep)
        x = self.run(self.blocks, self.norm, x)
        x = self.restore(self.decoder_embed(x), mask.ids_restore)
        x = self.run(self.decoder_blocks, self.decoder_norm, x)
        return self.decoder_pred(x[:, 1:], image, mask.ids_removed)

    def run(self, blocks: nn.ModuleList, norm: m.AddLayerNorm, x: Tensor) -> Tensor:
        branch = torch.zeros_like(x)
        for block in blocks:
            branch, x = block(branch, x)
        return norm(branch, x)[1]


class PlainImageMAE(nn.Module):
    """The same as published, from timm's parts and PyTorch's."""

    def __init__(self):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(64, 8, 3, 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.zeros(1, 65, 16), requires_grad=False)
        self.blocks = nn.ModuleList(Block(16, 2, qkv_bias=True, norm_layer=norm) for _ in range(2))
        self.norm = norm(16)
        self.decoder_embed = nn.Linear(16, 8)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 65, 8), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(8, 2, qkv_bias=True, norm_layer=norm)])
        self.decoder_norm = norm(8)
        self.decoder_pred = nn.Linear(8, 192)

    def forward(self, image: Tensor, mask: m.PatchMask) -> Tensor:
        x = self.patch_embed(image) + self.pos_embed[:, 1:]
        x = x.gather(1, mask.ids_keep[:, :, None].expand(-1, -1, 16))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        tokens = torch.cat([x[:, 1:], self.mask_token.expand(len(x), mask.ids_removed.shape[1], -1)], dim=1)
        tokens = tokens.gather(1, mask.ids_restore[:, :, None].expand(-1, -1, 8))
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        return published_loss(pred, image, mask.mask, patch=(8, 8))


def test_an_image_mae_of_modules_trains_as_the_published_one():
    torch.manual_seed(0)
    fused, plain = FusedImageMAE().double(), PlainImageMAE().double()
    renamed = {"patch_embed.cls_token": "cls_token", "patch_embed.pos_embed": "pos_embed"}
    names = {name: renamed.get(name, name).removeprefix("restore.") for name in fused.state_dict()}
    plain.load_state_dict({names[name]: tensor for name, tensor in fused.state_dict().items()})
    image, losses = draw(4, 3, 64, 64).cumsum(dim=2).cumsum(dim=3), []
    optimizers = [torch.optim.AdamW(model.parameters(), lr=5e-3) for model in (fused, plain)]
    for step in range(5):
        seeds = torch.arange(4) + 4 * (step % 2)
        pair = fused(image, seeds), plain(image, fused.masking(seeds))
        for optimizer, loss in zip(optimizers, pair, strict=True):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            gradients = {names[name]: parameter.grad for name, parameter in fused.named_parameters()}
            expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
            assert_same(gradients, expected)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(pair[0], pair[1], rtol=1e-9, atol=0)
        losses.append(pair[0].item())
    assert losses[4] < losses[2] < losses[0]
