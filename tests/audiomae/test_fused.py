"""The model on fused operators is the model: losses, gradients, training and checkpoints of every form are alike."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from audiomae import AudioMAE, AudioMAEConfig, PatchMask
from audiomae.checkpoints import load_model, save_weights
from audiomae.training.optimizer import build_adamw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Windows that the grid (6, 5) of patches holds only once padded.
CONFIG = AudioMAEConfig(
    spec_size=(24, 20),
    patch_size=(4, 4),
    patch_stride=(4, 4),
    embed_dim=24,
    depth=2,
    num_heads=3,
    decoder_dim=16,
    decoder_depth=2,
    decoder_heads=2,
    window=(4, 4),
    shift=(2, 0),
    hybrid_global_layers=1,
)
DECODERS = ["local", "hybrid", "global"]


def build(impl: str, config: AudioMAEConfig = CONFIG, dtype: torch.dtype = torch.float32) -> AudioMAE:
    """A model whose parameters are all away from their initial zeros and ones, the same for every form."""
    torch.manual_seed(0)
    model = AudioMAE(config, impl=impl).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape).to(parameter)
    return model


def batch(dtype: torch.dtype = torch.float32, clips: int = 3) -> tuple[Tensor, PatchMask]:
    generator = torch.Generator().manual_seed(1)
    spec = torch.randn(clips, 1, *CONFIG.spec_size, generator=generator)
    mask = PatchMask.random(torch.arange(clips), build("reference").grid, ratio=0.7)
    return spec.to(DEVICE, dtype), mask.to(DEVICE)


def loss_and_gradients(impl: str, config: AudioMAEConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    model = build(impl, config, dtype)
    loss = model(*batch(dtype)).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_loss_and_gradients_in_float64_are_those_of_the_reference(impl, decoder):
    config = replace(CONFIG, decoder=decoder)
    results, expected = (loss_and_gradients(form, config, torch.float64) for form in (impl, "reference"))
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
def test_loss_and_gradients_are_those_of_the_reference(impl, decoder):
    config = replace(CONFIG, decoder=decoder)
    exact = loss_and_gradients("reference", config, torch.float64)
    results, published = (loss_and_gradients(form, config, torch.float32) for form in (impl, "reference"))
    for name, truth in exact.items():
        error, allowed = ((x[name].double() - truth).norm().item() for x in (results, published))
        # Softmax does not see what is added to all logits, so the gradient of this bias is 0: what either form has left
        # of the sums that cancel is rounding, to be measured by their terms, the size of the gradient beside it.
        terms = exact[name.replace("bias", "weight")] if name.endswith("meta_mlp.fc2.bias") else truth
        bound = 2 * allowed + 1e-6 * terms.norm().item() + 1e-9
        assert error <= bound, f"{name} is off by {error:.1e}, the reference by {allowed:.1e}"


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
def test_autocast_costs_no_more_than_in_the_reference(impl):
    exact = loss_and_gradients("reference", CONFIG, torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16):
        results, published = (loss_and_gradients(form, CONFIG, torch.float32) for form in (impl, "reference"))
    for name, truth in exact.items():
        assert results[name].dtype == published[name].dtype
        error, allowed = ((x[name].double() - truth).norm().item() for x in (results, published))
        bound = (
            2 * allowed + 4 * 2**-8 * truth.norm().item() + 1e-6
        )  # a few roundings: there are few windows to average
        assert error <= bound, f"{name} is off by {error:.1e}, the reference by {allowed:.1e}"


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
def test_twenty_steps_go_the_same_way(impl):
    def train(form: str) -> list[float]:
        model = build(form)
        optimizer = build_adamw(model, lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.95))
        losses = []
        for _ in range(20):
            loss = model(*batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    losses, expected = train(impl), train("reference")
    assert expected[-1] < 0.8 * expected[0]
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_in_one_graph(impl, decoder):
    model = build(impl, replace(CONFIG, decoder=decoder))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses, gradients = [], []
    for forward in (compiled, model):
        loss = forward(*batch()).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.zero_grad()
    torch.compiler.reset()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_predictions_are_those_of_the_reference(impl):
    spec, mask = batch()
    with torch.no_grad():
        pred, expected = (build(form)(spec, mask, return_pred=True).pred for form in (impl, "reference"))
    torch.testing.assert_close(pred, expected, rtol=1e-4, atol=1e-5)


def test_checkpoints_are_interchangeable(tmp_path):
    trained = build("auto")
    save_weights(tmp_path / "weights.safetensors", trained)
    loaded = load_model(tmp_path / "weights.safetensors", impl="reference").to(DEVICE)
    with torch.no_grad():
        loss, expected = (model(*batch()).loss for model in (loaded, trained))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert build("reference").state_dict().keys() == trained.state_dict().keys()
