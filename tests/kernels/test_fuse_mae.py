"""Image MAE and Audio-MAE, fused."""

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from mae_kernels.patching import mae
from mae_kernels.patching.core import fuse_targets, unfuse
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench import audio_mae_models, mae_models

from .calls import KERNEL_DEVICE
from .mae_shapes import MODELS, assert_rounding, make_images, make_model, reconstruct, steps


def fused(model: nn.Module, impl: str = "torch") -> nn.Module:
    """A fused copy of a model that can be fused."""
    model = copy.deepcopy(model)
    report = fuse_targets(model, mae.TARGETS, impl)
    assert (len(report.replaced), report.left) == (1, [])
    return model


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def run(model: nn.Module, images: torch.Tensor, **options):
    return reconstruct(lambda: model(images, **options), model)


def reason(model: nn.Module) -> str:
    """Why a model is left, which stays exactly what it was."""
    before = copy.deepcopy(model.state_dict())
    cls, noise = type(model), torch.get_rng_state()
    report = fuse_targets(model, mae.TARGETS, "torch")
    assert type(model) is cls
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), noise)
    assert not report.replaced
    [left] = report.left
    return left.what


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_random_numbers_are_those_before(name, impl):
    model, images = make_model(name), make_images(MODELS[name][2])
    torch.testing.assert_close(run(fused(model, impl), images), run(model, images), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ratio", [0.5, 0.9])
@pytest.mark.parametrize("name", ["image", "audio-global"])
def test_another_mask_ratio(name, ratio):
    model, images = make_model(name), make_images(MODELS[name][2])
    expected = run(model, images, mask_ratio=ratio)
    torch.testing.assert_close(run(fused(model), images, mask_ratio=ratio), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_rounds_as_before(name, autocast):
    model, images = make_model(name), make_images(MODELS[name][2])
    truth = run(model.float().double(), images.float().double())
    model, images = model.float(), images.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_rounding(run(fused(model), images), run(model, images), truth)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", ["image", "audio-local"])
def test_triton_rounds_as_before(name, autocast):
    model = make_model(name).float().to(KERNEL_DEVICE)
    images = make_images(MODELS[name][2], batch=2).float().to(KERNEL_DEVICE)
    truth = run(copy.deepcopy(model).double(), images.double())
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16, enabled=autocast):
        assert_rounding(run(fused(model, "triton"), images), run(model, images), truth)


def test_bfloat16_parameters_round_as_before():
    model, images = make_model("image").bfloat16(), make_images(MODELS["image"][2]).bfloat16()
    truth = run(copy.deepcopy(model).double(), images.double())
    assert_rounding(run(fused(model), images), run(model, images), truth)


@pytest.mark.parametrize("name", ["image", "audio-local"])
def test_training_goes_the_same_way(name):
    model, images = make_model(name), make_images(MODELS[name][2])
    before, after = (steps(each, lambda model: model(images)[0]) for each in (model, fused(model)))
    assert before["losses"].unique().numel() == 3
    torch.testing.assert_close(after, before, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["image", "audio-local"])
def test_evaluation(name, mode):
    model, images = make_model(name).eval(), make_images(MODELS[name][2])
    results = []
    for each in (model, fused(model)):
        torch.manual_seed(0)
        with mode():
            results.append(each(images))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_calls_the_operators(name, monkeypatch):
    called = []
    for operator in mae.OPERATORS:
        original = getattr(mae, operator)

        def count(*args, operator=operator, original=original, **kwargs):
            called.append((operator, kwargs["impl"]))
            return original(*args, **kwargs)

        monkeypatch.setattr(mae, operator, count)
    model = fused(make_model(name), "torch")
    called.clear()
    model(make_images(MODELS[name][2]))
    assert called == [(operator, "torch") for operator in mae.OPERATORS]


@pytest.mark.parametrize("name", ["image", "audio-2d"])
def test_stays_the_same_module(name):
    model, images = make_model(name), make_images(MODELS[name][2])
    before = run(model, images)
    with_operators = fused(model)
    assert isinstance(with_operators, MODELS[name][0])
    assert list(with_operators.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(dict(with_operators.state_dict()), dict(model.state_dict()), rtol=0, atol=0)

    saved = io.BytesIO()
    torch.save(with_operators, saved)
    saved.seek(0)
    after = run(with_operators, images)
    for again in (copy.deepcopy(with_operators), torch.load(saved, weights_only=False)):
        assert type(again) is type(with_operators)
        torch.testing.assert_close(run(again, images), after, rtol=0, atol=0)

    unfuse(with_operators)
    assert type(with_operators) is MODELS[name][0]
    torch.testing.assert_close(run(with_operators, images), before, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "backend"), [("image", "aot_eager"), ("audio-2d", "eager")])
def test_compiles_without_a_graph_break(name, backend, fresh_compiler):
    model, images = fused(make_model(name, depth=1, decoder_depth=1)), make_images(MODELS[name][2])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    after = reconstruct(lambda: compiled(images), model)
    torch.testing.assert_close(after, run(model, images), rtol=1e-9, atol=1e-11)


def test_the_loss_of_a_mask_that_the_encoder_has_not_made():
    model = make_model("image")
    images = make_images(MODELS["image"][2])
    pred = torch.randn(3, 16, 768, dtype=torch.float64)
    mask = torch.zeros(3, 16)
    mask[0, 3], mask[1, :5] = 1, 1
    expected = model.forward_loss(images, pred, mask)
    torch.testing.assert_close(fused(model).forward_loss(images, pred, mask), expected, rtol=0, atol=0)


def test_the_loss_of_a_mask_that_was_written_to():
    model, images = make_model("image"), make_images(MODELS["image"][2])
    losses = []
    for each in (model, fused(model)):
        torch.manual_seed(0)
        latent, mask, ids_restore = each.forward_encoder(images, 0.75)
        mask[0] = 0  # the first image does not count
        losses.append(each.forward_loss(images, each.forward_decoder(latent, ids_restore), mask))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-11)


def test_nothing_removed_gives_what_it_gave():
    model, images = make_model("image"), make_images(MODELS["image"][2])
    loss, _, mask = fused(model)(images, mask_ratio=0.0)
    assert mask.sum() == 0
    assert loss.isnan()
    assert model(images, mask_ratio=0.0)[0].isnan()


def test_an_image_of_another_size_is_the_models_own_matter():
    model = fused(make_model("image"))
    with pytest.raises(AssertionError, match=r"Input height \(32\) doesn't match model \(64\)"):
        model(torch.zeros(1, 3, 32, 128, dtype=torch.float64))


def test_hooks_and_adapters_that_come_later_run():
    model, images = make_model("image"), make_images(MODELS["image"][2])
    model_before, model = model, fused(model)
    seen = []
    model.patch_embed.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    run(model, images)
    assert seen == [(3, 16, 24)]

    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    for each in (model_before, model):
        each.patch_embed.proj.__class__ = Scaled
    torch.testing.assert_close(run(model, images), run(model_before, images), rtol=1e-9, atol=1e-11)


def score_distance(self, imgs, pred, mask):
    error = (pred - self.patchify(imgs)).abs().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


def score_all(self, imgs, pred, mask):
    return (pred - self.patchify(imgs)).square().mean()


def encode_with_dropout(self, x, mask_ratio):
    latent, mask, ids_restore = mae_models.MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio)
    return nn.functional.dropout(latent, 0.1, self.training), mask, ids_restore


def encode_and_average_at_test_time(self, x, mask_ratio):
    latent, mask, ids_restore = mae_models.MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio)
    return latent if self.training else latent.mean(dim=1, keepdim=True).expand_as(latent), mask, ids_restore


def encode_with_another_output(self, x, mask_ratio):
    return *mae_models.MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio), x.mean()


def encode_without_the_last_norm(self, x, mask_ratio):
    norm, self.norm = self.norm, nn.Identity()
    encoded = mae_models.MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio)
    self.norm = norm
    return encoded


def encode_whole(self, x, mask_ratio=0.75):
    return mae_models.MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio)


def encode_with_features(self, x, mask_ratio):
    self.teacher(x)
    return mae_models.MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio)


def decode_with_residual_blocks(self, x, ids_restore):
    x = mae_models.insert_mask_tokens(self.decoder_embed(x), self.mask_token, ids_restore) + self.decoder_pos_embed
    for block in self.decoder_blocks:
        x = x + block(x)
    return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def decode_with_checkpoints(self, x, ids_restore):
    x = mae_models.insert_mask_tokens(self.decoder_embed(x), self.mask_token, ids_restore) + self.decoder_pos_embed
    for block in self.decoder_blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def decode_without_gradients_to_the_encoder(self, x, ids_restore):
    return mae_models.MaskedAutoencoderViT.forward_decoder(self, x.detach(), ids_restore)


VALUES = "its {} gives other values than the known one"


@pytest.mark.parametrize(
    ("method", "body", "why"),
    [
        ("forward_loss", score_distance, VALUES),
        ("forward_loss", score_all, VALUES),
        ("forward_encoder", encode_with_dropout, VALUES),
        ("forward_encoder", encode_and_average_at_test_time, VALUES),
        ("forward_encoder", encode_with_another_output, VALUES),
        ("forward_encoder", encode_without_the_last_norm, VALUES),
        ("forward_encoder", encode_whole, "its {} takes (x, mask_ratio=0.75), expected (x, mask_ratio)"),
        ("forward_encoder", encode_with_features, "a trial of its methods failed: AttributeError: "),
        ("forward_decoder", decode_with_residual_blocks, VALUES),
        ("forward_decoder", decode_with_checkpoints, "its backward gives other values than the known one"),
        ("forward_decoder", decode_without_gradients_to_the_encoder, "its backward gives other values than the"),
    ],
)
def test_a_class_of_the_name_that_does_something_else_is_left(method, body, why):
    model = make_model("image")
    model.__class__ = type("MaskedAutoencoderViT", (mae_models.MaskedAutoencoderViT,), {method: body})
    model.teacher = nn.Identity()
    assert reason(model).startswith(why.format(method))


def test_the_same_methods_in_a_class_of_anybodys_are_fused():
    model = make_model("image")
    model.__class__ = type("MaskedAutoencoderViT", (mae_models.MaskedAutoencoderViT,), {"embed_only": None})
    model.teacher = nn.Linear(3, 3)
    fused(model)


def test_masks_of_the_models_own_are_kept():
    def mask_the_end(self, x, mask_ratio):
        keep = int(x.shape[1] * (1 - mask_ratio))
        places = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        return x[:, :keep], (places >= keep).to(x.device, torch.float32), places

    model, images = make_model("image"), make_images(MODELS["image"][2])
    model.__class__ = type("MaskedAutoencoderViT", (mae_models.MaskedAutoencoderViT,), {"random_masking": mask_the_end})
    torch.testing.assert_close(run(fused(model), images), run(model, images), rtol=1e-9, atol=1e-11)


def test_a_decoder_that_repeats_the_last_frame_is_left():
    def decode(self, x, ids_restore):
        x = mae_models.insert_mask_tokens(self.decoder_embed(x), self.mask_token, ids_restore) + self.decoder_pos_embed
        columns = self.patch_embed.patch_hw[1]
        x = torch.cat([x[:, 1:], x[:, -columns:]], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, :-columns], None, None

    model = make_model("audio-overlap", decoder_mode=1)
    model.__class__ = type(
        "MaskedAutoencoderViT", (audio_mae_models.MaskedAutoencoderViT,), {"forward_decoder": decode}
    )
    assert reason(model) == VALUES.format("forward_decoder")


def test_a_subclass_with_a_method_of_its_own_is_left():
    class Distance(mae_models.MaskedAutoencoderViT):
        forward_loss = score_distance

    model = make_model("image")
    model.__class__ = Distance
    assert reason(model) == "Distance has a forward_loss of its own"


def test_hooks_and_adapters_are_left():
    model = make_model("image")
    handle = model.patch_embed.register_forward_hook(lambda *_: None)
    assert reason(model) == "patch_embed has hooks, which would not run"
    handle.remove()
    handle = model.patch_embed.proj.register_forward_hook(lambda *_: None)
    assert reason(model) == "patch_embed.proj has hooks, which would not run"
    handle.remove()
    torch.nn.utils.parametrizations.weight_norm(model.patch_embed.proj)
    assert reason(model) == "patch_embed.proj is ParametrizedConv2d, expected Conv2d"


def test_blocks_that_are_called_as_one_are_left():
    model = make_model("image")
    model.blocks = nn.Sequential(*model.blocks)
    assert reason(model) == "blocks is Sequential, expected ModuleList"


def test_a_class_without_the_known_parts_is_left():
    model = make_model("image")
    del model.cls_token
    assert reason(model).startswith("not as in the version that is known: ")
    assert "cls_token" in reason(model)


def test_another_class_of_the_name_is_left():
    assert reason(type("MaskedAutoencoderViT", (nn.Linear,), {})(2, 2)).startswith(
        "not as in the version that is known"
    )


def test_a_model_without_values_is_left():
    model = make_model("image").to("meta")
    report = fuse_targets(model, mae.TARGETS, "torch")
    assert report.left[0].what.startswith("a trial of its methods failed: NotImplementedError: ")


def test_hooks_of_parts_are_not_called_by_the_trial():
    model = make_model("image")

    def refuse(*_):
        raise AssertionError("called")

    for module in model.modules():
        if not isinstance(module, nn.ModuleList | type(model.patch_embed) | nn.Conv2d):
            module.register_forward_hook(refuse)
    assert fuse_targets(model, mae.TARGETS, "torch").replaced
