"""transformers' ViTMAE, fused."""

import copy
import io
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from mae_kernels.patching import vit_mae
from mae_kernels.patching.core import fuse_targets, unfuse
from torch import Tensor, nn

from .calls import KERNEL_DEVICE
from .mae_shapes import assert_rounding, make_images, reconstruct, spread, steps

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
modeling = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")

IMAGE = (3, 64, 64)
SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 64,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
    "norm_pix_loss": True,
}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def make_model(cls: type[nn.Module] = transformers.ViTMAEForPreTraining, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = cls(transformers.ViTMAEConfig(**SMALL | options))
    spread(model)
    return model.double()


def fused(model: nn.Module, impl: str = "torch") -> nn.Module:
    """A fused copy of a model of which all can be fused."""
    model = copy.deepcopy(model)
    report = fuse_targets(model, vit_mae.TARGETS, impl)
    assert report.replaced
    assert report.left == []
    return model


def left(model: nn.Module) -> dict[str, str]:
    """What is left in a model, and why."""
    return {change.path: change.what for change in fuse_targets(model, vit_mae.TARGETS, "torch").left}


def run(model: nn.Module, images: Tensor, **options: Any) -> dict[str, Tensor]:
    def call() -> tuple[Tensor, ...]:
        output = model(images, **options)
        assert type(output) is modeling.ViTMAEForPreTrainingOutput
        shown = (*(output.hidden_states or ()), *(output.attentions or ()))
        return output.loss, output.logits, output.mask, output.ids_restore, *shown

    return reconstruct(call, model)


assert_same = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_pix_loss": False},
        {"qkv_bias": False, "mask_ratio": 0.5},
        {"num_channels": 1, "patch_size": 8},
        {"hidden_dropout_prob": 0.2},
    ],
    ids=str,
)
def test_outputs_gradients_and_random_numbers_are_those_before(options, impl):
    model = make_model(**options).train()
    images = make_images((options.get("num_channels", 3), 64, 64))
    assert_same(run(fused(model, impl), images), run(model, images))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_rounds_as_before(autocast):
    model, images = make_model().float(), make_images(IMAGE).float()
    truth = run(copy.deepcopy(model).double(), images.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_rounding(run(fused(model), images), run(model, images), truth)


def test_bfloat16_parameters_round_as_before():
    model, images = make_model().bfloat16(), make_images(IMAGE).bfloat16()
    truth = run(copy.deepcopy(model).double(), images.double())
    assert_rounding(run(fused(model), images), run(model, images), truth)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_triton_rounds_as_before(autocast):
    model = make_model(num_hidden_layers=1, decoder_num_hidden_layers=1).float().to(KERNEL_DEVICE)
    images = make_images(IMAGE, batch=2).float().to(KERNEL_DEVICE)
    truth = run(copy.deepcopy(model).double(), images.double())
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16, enabled=autocast):
        assert_rounding(run(fused(model, "triton"), images), run(model, images), truth)


def test_training_goes_the_same_way():
    model, images = make_model(), make_images(IMAGE)
    before, after = (steps(each, lambda model: model(images).loss) for each in (model, fused(model)))
    assert before["losses"].unique().numel() == 3
    torch.testing.assert_close(after, before, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(mode):
    model, images = make_model(hidden_dropout_prob=0.2).eval(), make_images(IMAGE)
    results = []
    for each in (model, fused(model)):
        torch.manual_seed(0)
        with mode():
            results.append(dict(each(images)))
    assert_same(results[1], results[0])


@pytest.mark.parametrize(
    "options",
    [
        {"noise": torch.rand(3, 16, generator=torch.Generator().manual_seed(4))},
        {"output_hidden_states": True},
        {"output_attentions": True, "output_hidden_states": True},
        {"attention_mask": torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 0]])},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_arguments(attention, options):
    model, images = make_model(attn_implementation=attention), make_images(IMAGE)
    after = copy.deepcopy(model)
    assert len(left(after)) == (0 if attention == "sdpa" else 4)
    expected = run(model, images, **options)
    assert_same(run(after, images, **options), expected)
    assert_same(run(after, images), run(model, images))  # hooks that have come since change nothing
    shown = 3 if "output_hidden_states" in options else 0
    shown += 2 if "output_attentions" in options and attention == "eager" else 0
    assert sum(name.startswith("output") for name in expected) == 2 + shown


def test_attentions_asked_for_by_the_configuration():
    model, images = make_model(), make_images(IMAGE)
    after = fused(model)
    for each in (model, after):
        each.set_attn_implementation("eager")
        each.config.output_attentions = each.vit.config.output_attentions = True
    expected = run(model, images)
    assert expected["output 2"].shape == (3, 2, 5, 5)
    assert_same(run(after, images), expected)


def test_attention_dropout_that_comes_later():
    model, images = make_model().train(), make_images(IMAGE)
    after = fused(model)
    for each in (model, after):
        for layer in each.vit.layers:
            layer.attention.attention_dropout = 0.3
    assert_same(run(after, images), run(model, images))


def test_images_of_another_size():
    model, images = make_model(), make_images((3, 96, 32))
    assert_same(
        run(fused(model), images, interpolate_pos_encoding=True), run(model, images, interpolate_pos_encoding=True)
    )


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 32, 64), {}, r"Input image size \(32\*64\) doesn't match model \(64\*64\)"),
        ((1, 64, 64), {}, r"Expected 3 but got 1"),
        ((3, 72, 64), {"interpolate_pos_encoding": True}, "shape"),
    ],
)
def test_images_that_the_library_refuses(shape, options, message):
    model = make_model()
    for each in (model, fused(model)):
        with pytest.raises((ValueError, RuntimeError), match=message):
            each(make_images(shape), **options)


def test_nothing_removed_gives_what_it_gave():
    model = make_model(mask_ratio=0.0)
    assert model(make_images(IMAGE)).loss.isnan()
    assert fused(model)(make_images(IMAGE)).loss.isnan()


def test_a_tuple_where_one_is_asked_for():
    model, images = make_model(), make_images(IMAGE)
    results = []
    for each in (model, fused(model)):
        torch.manual_seed(0)
        results.append(each(images, return_dict=False, output_hidden_states=True))
    assert isinstance(results[1], tuple)
    assert_same(results[1], results[0])


def test_the_model_without_a_decoder():
    model, images = make_model(transformers.ViTMAEModel), make_images(IMAGE)
    results = []
    for each in (model, fused(model)):
        torch.manual_seed(0)
        results.append(each(images, output_hidden_states=True))
    assert type(results[1]) is modeling.ViTMAEModelOutput
    assert_same(dict(results[1]), dict(results[0]))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_checkpointing():
    model, images = make_model().train(), make_images(IMAGE)
    after = fused(model)
    expected = run(after, images)
    after.gradient_checkpointing_enable()
    assert_same(run(after, images), expected)
    assert_same(expected, run(model, images))


def test_calls_the_operators(monkeypatch):
    called: list[str] = []
    operators = ("patch_embed", "flash_attention", "add_layer_norm", "mlp", "restore_tokens", "masked_mse")
    for operator in operators:
        original = getattr(vit_mae, operator)

        def count(*args, operator=operator, original=original, **kwargs):
            assert kwargs["impl"] == "torch"
            called.append(operator)
            return original(*args, **kwargs)

        monkeypatch.setattr(vit_mae, operator, count)
    fused(make_model())(make_images(IMAGE))
    layers = ["flash_attention", "add_layer_norm", "mlp"] * 2
    assert called == ["patch_embed", *layers, "restore_tokens", *layers, "masked_mse"]


def test_stays_the_same_module():
    model, images = make_model(), make_images(IMAGE)
    before = run(model, images)
    after = fused(model)
    for path, module in model.named_modules():
        assert isinstance(after.get_submodule(path), type(module))
    torch.testing.assert_close(dict(after.state_dict()), dict(model.state_dict()), rtol=0, atol=0)

    saved = io.BytesIO()
    torch.save(after, saved)
    saved.seek(0)
    expected = run(after, images)
    for again in (copy.deepcopy(after), torch.load(saved, weights_only=False)):
        assert [type(module) for module in again.modules()] == [type(module) for module in after.modules()]
        torch.testing.assert_close(run(again, images), expected, rtol=0, atol=0)

    unfuse(after)
    assert [type(module) for module in after.modules()] == [type(module) for module in model.modules()]
    torch.testing.assert_close(run(after, images), before, rtol=0, atol=0)


def test_is_saved_and_loaded_as_before(tmp_path):
    model = make_model()
    fused(model).save_pretrained(tmp_path)
    loaded = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_is_saved_under_the_name_of_the_class_before(tmp_path):
    fused(make_model()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ViTMAEForPreTraining"]


def test_compiles_without_a_graph_break(fresh_compiler):
    model = fused(make_model(num_hidden_layers=1, decoder_num_hidden_layers=1))
    images = make_images(IMAGE)
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def call() -> tuple[Tensor, ...]:
        output = compiled(images)
        return output.loss, output.logits, output.mask, output.ids_restore

    assert_same(reconstruct(call, model), run(model, images))


@pytest.mark.parametrize(
    ("options", "part", "why"),
    [
        ({"attention_probs_dropout_prob": 0.1}, "attention", "attention_probs_dropout_prob is 0.1, expected 0"),
        ({"attn_implementation": "eager"}, "attention", "the attention implementation is 'eager', expected 'sdpa'"),
        ({"hidden_act": "relu"}, "mlp", "its activation is ReLU, expected the exact GELU"),
        ({"hidden_act": "gelu_new"}, "mlp", "its activation is NewGELUActivation, expected the exact GELU"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "mlp", "its activation is GELUTanh, expected the exact GELU"),
    ],
)
def test_a_part_that_cannot_be_fused_is_left_and_the_rest_is_fused(options, part, why):
    model, images = make_model(**options).train(), make_images(IMAGE)
    after = copy.deepcopy(model)
    layers = [f"{stack}.{i}.{part}" for stack in ("vit.layers", "decoder.decoder_layers") for i in (0, 1)]
    assert left(after) == dict.fromkeys(layers, why)
    assert_same(run(after, images), run(model, images))


@pytest.mark.parametrize("path", ["vit.layers.0.mlp.fc1", "vit.layers.0.mlp.fc2", "vit.layers.0.layernorm_after"])
def test_parts_without_a_bias_are_left(path):
    model, images = make_model(), make_images(IMAGE)
    part = path.rpartition(".")[2]
    owner = model.get_submodule(path.rpartition(".")[0])
    setattr(owner, part, type(getattr(owner, part))(*getattr(owner, part).weight.shape[::-1], bias=False).double())
    after = copy.deepcopy(model)
    assert left(after) == {path.rpartition(".")[0]: "a part has no bias"}
    assert_same(run(after, images), run(model, images))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


ADAPTERS = {
    "vit.layers.0.mlp.fc1": Doubled,
    "vit.layers.1.attention.q_proj": Doubled,
    "decoder.decoder_layers.0.layernorm_after": DoubledNorm,
    "vit.embeddings.patch_embeddings.projection": DoubledConv,
}


@pytest.mark.parametrize("path", ADAPTERS)
def test_adapters_work_before_and_after(path):
    model, images = make_model(), make_images(IMAGE)
    adapted_later = fused(model)
    for each in (model, adapted_later):
        each.get_submodule(path).__class__ = ADAPTERS[path]
    adapted_before = copy.deepcopy(model)
    reasons = left(adapted_before)
    name = path.split(".")[-1]
    if name == "q_proj":  # is called
        assert reasons == {}
    else:
        [why] = reasons.values()
        assert why.split(" ")[0].endswith(name)
        assert f"is {ADAPTERS[path].__name__}, expected " in why
    expected = run(model, images)
    assert_same(run(adapted_before, images), expected)
    assert_same(run(adapted_later, images), expected)


def test_hooks_work_before_and_after():
    paths = [
        "vit.embeddings.patch_embeddings",
        "vit.layers.0.mlp.fc2",
        "vit.layers.0.mlp.activation_fn",
        "vit.layers.0.layernorm_after",
        "vit.layers.0.layernorm_before",
    ]
    model, images = make_model(), make_images(IMAGE)
    hooked_later = fused(model)
    for each in (model, hooked_later):
        for path in paths:
            each.get_submodule(path).register_forward_hook(lambda module, args, output: 2 * output)
    hooked_before = copy.deepcopy(model)
    assert left(hooked_before) == {
        "vit.embeddings": "patch_embeddings has hooks, which would not run",
        "vit.layers.0": "layernorm_after has hooks, which would not run",
        "vit.layers.0.mlp": "activation_fn has hooks, which would not run",
    }
    expected = run(model, images)
    assert_same(run(hooked_before, images), expected)
    assert_same(run(hooked_later, images), expected)


def test_subclasses_with_methods_of_their_own():
    class Patches(modeling.ViTMAEPatchEmbeddings):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return 2 * super().forward(pixel_values)

    class Targets(transformers.ViTMAEForPreTraining):
        def patchify(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
            return 2 * super().patchify(pixel_values, interpolate_pos_encoding)

    class Layer(modeling.ViTMAELayer):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            return 2 * super().forward(hidden_states, attention_mask, **kwargs)

    model, images = make_model(Targets, norm_pix_loss=False), make_images(IMAGE)
    model.vit.embeddings.patch_embeddings.__class__ = Patches
    model.vit.layers[1].__class__ = Layer
    after = copy.deepcopy(model)
    assert left(after) == {
        "": "Targets has a patchify of its own",
        "vit.embeddings": "Patches has a forward of its own",
        "vit.layers.1": "Layer has a forward of its own",
    }
    assert_same(run(after, images), run(model, images))


def test_a_masking_of_its_own_keeps_its_masks_and_the_loss():
    class Corner(modeling.ViTMAEEmbeddings):
        def random_masking(self, sequence: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
            places = torch.arange(sequence.shape[1]).expand(sequence.shape[0], -1)
            return sequence[:, :5], (places >= 7).float(), places

    model, images = make_model(), make_images(IMAGE)
    model.vit.embeddings.__class__ = Corner
    after = copy.deepcopy(model)
    assert left(after) == {"": "Corner has a random_masking of its own"}
    assert_same(run(after, images), run(model, images))


def test_the_layers_of_other_versions_are_left():
    model = make_model()

    class ViTMAELayer(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states

    ViTMAELayer.__module__, ViTMAELayer.__qualname__ = modeling.__name__, "ViTMAELayer"
    model.vit.layers[0] = ViTMAELayer()
    expected = "its forward takes (hidden_states), expected (hidden_states, attention_mask=None, **kwargs)"
    assert left(model) == {"vit.layers.0": expected}
