"""Compilation and activation checkpoints block by block: the same numbers and names, few compilations, less kept."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from audiomae import AudioMAE, AudioMAEConfig
from audiomae.training.blocks import checkpoint_blocks, compile_blocks


def build(depth: int, decoder_depth: int) -> AudioMAE:
    torch.compiler.reset()
    torch.manual_seed(0)
    return AudioMAE(
        AudioMAEConfig(
            spec_size=(64, 32),
            embed_dim=32,
            depth=depth,
            num_heads=2,
            decoder_dim=32,
            decoder_depth=decoder_depth,
            decoder_heads=2,
            window=(2, 2),
            shift=(1, 0),
        )
    )


@pytest.mark.parametrize(("depth", "decoder_depth"), [(2, 2), (5, 6)])
def test_blocks_of_a_kind_are_compiled_once(depth: int, decoder_depth: int) -> None:
    model = build(depth, decoder_depth)
    counter = CompileCounter()
    names = list(model.state_dict())
    spec, seeds = torch.randn(2, 1, 64, 32), torch.arange(2)
    expected = model(spec, seeds=seeds).loss
    compile_blocks(model, backend=counter)
    torch.testing.assert_close(model(spec, seeds=seeds).loss, expected, rtol=0, atol=0)
    assert counter.frame_count == 3  # the encoder's block, the decoder's with a shift and without
    assert list(model.state_dict()) == names


def test_gradients_are_those_of_the_model() -> None:
    model = build(2, 2)
    spec, seeds = torch.randn(2, 1, 64, 32), torch.arange(2)
    expected = torch.autograd.grad(model(spec, seeds=seeds).loss, list(model.parameters()))
    compile_blocks(model, backend="aot_eager")
    actual = torch.autograd.grad(model(spec, seeds=seeds).loss, list(model.parameters()))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decoder", ["local", "hybrid"])
def test_activation_checkpoints_keep_less_and_change_nothing(decoder: str) -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "decoder_dim": 32, "decoder_depth": 6, "decoder_heads": 2}
    model = AudioMAE(AudioMAEConfig(spec_size=(64, 32), decoder=decoder, bias_dropout=0.3, **sizes))
    spec, seeds = torch.randn(2, 1, 64, 32), torch.arange(2)
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(spec, seeds=seeds).loss
        return list(torch.autograd.grad(loss, list(model.parameters())))

    expected, kept_before, names = gradients(), kept, list(model.state_dict())
    checkpoint_blocks(model)
    kept = 0
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert kept < kept_before / 3, (kept, kept_before)
    assert list(model.state_dict()) == names
