"""Embeddings: what they are made of, where windows lie, and that neither batches nor rates nor modes change them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from audiomae import AudioClassifier, AudioClassifierConfig, AudioMAE, AudioMAEConfig, EncoderConfig
from audiomae.embedding import embed
from audiomae.windows import Windows

RATE = 16_000
SMALL = {"spec_size": (48, 128), "embed_dim": 32, "depth": 3, "num_heads": 2}
CONFIG = AudioMAEConfig(**SMALL, decoder_dim=16, decoder_depth=2, decoder_heads=2, window=(3, 4), shift=(1, 0))
CLASSIFIER = AudioClassifierConfig(**SMALL, num_classes=7)
# Patches that overlap, of an odd number of frames, with frames at the end that no patch covers.
OVERLAPPING = EncoderConfig(**SMALL | {"spec_size": (50, 128)}, patch_size=(15, 16), patch_stride=(6, 10))
# More frames beyond the last time step than half a patch.
MARGIN = EncoderConfig(**SMALL | {"spec_size": (31, 128)}, patch_size=(16, 16), patch_stride=(4, 16))
WINDOWS = Windows.of(CONFIG)
STEPS = CONFIG.grid.shape[0]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module) -> None:
    """Give norms and biases values of their own, and tokens that differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def model() -> AudioMAE:
    torch.manual_seed(0)
    model = AudioMAE(CONFIG)
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def classifier() -> AudioClassifier:
    torch.manual_seed(0)
    model = AudioClassifier(CLASSIFIER)
    randomise(model)
    return model.eval()


def patch_tokens(model: AudioMAE | AudioClassifier, waveform: Tensor) -> Tensor:
    """Tokens ``(B, time, frequency, D)`` of waveforms ``(B, samples)`` that fit a window, without the class token."""
    spec = model.config.front_end()(waveform, model.config.spec_size[0])
    return model.encoder(spec)[:, 1:].detach().unflatten(1, model.grid.shape)


# What an embedding is


def test_a_window_gives_the_pooled_tokens_of_the_encoder(model: AudioMAE, classifier: AudioClassifier) -> None:
    waveform = noise(2, WINDOWS.samples)
    for each in (model, classifier):
        tokens = patch_tokens(each, waveform)
        embedding = each.embed(waveform, RATE)
        torch.testing.assert_close(embedding.frames, tokens.mean(dim=2), **TOLERANCE)
        torch.testing.assert_close(embedding.clip, tokens.mean(dim=(1, 2)), **TOLERANCE)
        assert embedding.frames.std(dim=1).min() > 1e-4  # time steps differ
    assert not embedding.clip.requires_grad


def test_classifier_pools_what_its_head_is_given(classifier: AudioClassifier) -> None:
    waveform = noise(3, WINDOWS.samples)
    logits = classifier(CLASSIFIER.front_end()(waveform, 48))
    embedding = classifier.embed(waveform, RATE)
    torch.testing.assert_close(classifier.head(classifier.fc_norm(embedding.clip)), logits, **TOLERANCE)


def test_a_clip_alone_has_no_batch_axis(model: AudioMAE) -> None:
    waveform = noise(9_001)
    alone, batch = model.embed(waveform, RATE), model.embed(waveform[None], RATE)
    assert alone.clip.shape == (32,)
    assert alone.frames.shape == (len(alone.times), 32)
    torch.testing.assert_close(alone.clip, batch.clip[0], rtol=0, atol=0)
    torch.testing.assert_close(alone.frames, batch.frames[0], rtol=0, atol=0)


def test_padding_is_attended_to_but_not_embedded(model: AudioMAE) -> None:
    waveform = noise(1, CONFIG.front_end().num_samples(32 + 7))  # of the third step less than half
    embedding = model.embed(waveform, RATE)
    expected = patch_tokens(model, waveform)[:, :2].mean(dim=2)
    torch.testing.assert_close(embedding.frames, expected, **TOLERANCE)
    torch.testing.assert_close(embedding.clip, expected.mean(dim=1), **TOLERANCE)
    one_more = model.embed(noise(1, CONFIG.front_end().num_samples(32 + 8)), RATE)
    assert one_more.frames.shape == (1, 3, 32)


@pytest.mark.parametrize("layer", [1, 2, 3, -1, -2, -3])
def test_layers_are_the_residual_stream_after_each_block(
    model: AudioMAE, classifier: AudioClassifier, layer: int
) -> None:
    waveform = noise(2, WINDOWS.samples)
    for each in (model, classifier):
        streams = each.encoder.hidden_states(each.config.front_end()(waveform, 48))
        stream = [None, *streams][layer] if layer > 0 else streams[layer]
        assert stream is not None
        expected = stream[:, 1:].unflatten(1, each.grid.shape).mean(dim=2)
        torch.testing.assert_close(each.embed(waveform, RATE, layer=layer).frames, expected.detach(), **TOLERANCE)


def test_without_a_layer_a_final_norm_counts_and_without_one_the_last_block(
    model: AudioMAE, classifier: AudioClassifier
) -> None:
    waveform = noise(5_000)
    last = classifier.embed(waveform, RATE, layer=-1)
    torch.testing.assert_close(classifier.embed(waveform, RATE).frames, last.frames, rtol=0, atol=0)
    assert (model.embed(waveform, RATE).frames - model.embed(waveform, RATE, layer=-1).frames).abs().max() > 0.1


# Windows


def test_each_window_is_what_it_is_alone(model: AudioMAE) -> None:
    waveform = noise(2 * WINDOWS.hop + WINDOWS.hop // 2)
    embedding = model.embed(waveform, RATE)
    parts = [waveform[k * WINDOWS.hop :][: WINDOWS.samples] for k in range(3)]
    alone = [model.embed(part, RATE).frames for part in parts]
    assert [len(frames) for frames in alone] == [STEPS, STEPS, 1]
    torch.testing.assert_close(embedding.frames, torch.cat(alone), **TOLERANCE)
    torch.testing.assert_close(embedding.clip, torch.cat(alone).mean(dim=0), **TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_change_nothing_and_are_no_larger_than_asked(
    model: AudioMAE, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    waveform = noise(3, 3 * WINDOWS.hop - 2_000)
    expected = [model.embed(clip, RATE) for clip in waveform]
    forward, sizes = model.encoder.forward, []
    monkeypatch.setattr(model.encoder, "forward", lambda spec: sizes.append(len(spec)) or forward(spec))
    embedding = model.embed(waveform, RATE, batch_size=batch_size)
    assert sum(sizes) == 9
    assert max(sizes) == min(batch_size, 9)
    for name in ("clip", "frames"):
        alone = torch.stack([getattr(clip, name) for clip in expected])
        torch.testing.assert_close(getattr(embedding, name), alone, **TOLERANCE)


@pytest.mark.parametrize("config", [CONFIG, OVERLAPPING, MARGIN], ids=["plain", "overlapping", "margin"])
def test_spectrograms_of_windows_continue_each_other(config: EncoderConfig) -> None:
    windows, front_end = Windows.of(config), config.front_end()
    waveform = noise(1, 3 * windows.hop + 999).double()
    whole = front_end(waveform)[0, 0]
    cut, lengths = windows.cut(waveform)
    frames, stride = config.spec_size[0], config.patch_stride[0]
    spec = front_end(cut[0], frames, lengths)[:, 0]
    for number, part in enumerate(spec):
        first = number * config.grid.shape[0] * stride
        own = min(frames, len(whole) - first)
        # Frames lose their mean, so that of the window does not show; but for the first one's first sample.
        torch.testing.assert_close(part[:own], whole[first : first + own], rtol=1e-6, atol=1e-6)
        assert (part[own:] == front_end.padding).all()
    assert len(spec) > 2


@pytest.mark.parametrize("config", [CONFIG, OVERLAPPING, MARGIN], ids=["plain", "overlapping", "margin"])
def test_a_time_step_counts_if_half_of_it_is_heard(config: EncoderConfig) -> None:
    windows, front_end = Windows.of(config), config.front_end()
    (patch, _), (stride, _), (steps, _) = config.patch_size, config.patch_stride, config.grid.shape
    edges = [windows.step * step + windows.half_patch + offset for step in range(3 * steps) for offset in (-1, 0, 1)]
    for samples in [1, 399, 400, *edges]:
        frames = front_end.num_frames(samples)
        heard = [min(frames - step * stride, patch) for step in range(4 * steps)]
        expected = max(1, sum(2 * own >= patch for own in heard))
        assert windows.num_steps(samples) == expected
        assert windows.num_windows(samples) == -(-expected // steps)
        cut, lengths = windows.cut(torch.ones(1, samples))
        assert cut.shape == (1, windows.num_windows(samples), windows.samples)
        in_windows = [min(windows.num_steps(length), steps) for length in lengths.tolist()]
        assert sum(in_windows) == expected
        torch.testing.assert_close(cut[0].sum(dim=1)[1:], lengths[1:].float(), rtol=0, atol=0)


def test_times_are_the_centres_of_patches_on_one_grid(model: AudioMAE) -> None:
    times = model.embed(noise(4 * WINDOWS.hop), RATE).times
    assert times.dtype == torch.float64
    assert len(times) == 4 * STEPS
    # A patch spans 16 frames: 15 hops of 10 ms and a frame of 25 ms; the next one starts 160 ms later.
    torch.testing.assert_close(times, 0.0875 + 0.16 * torch.arange(4 * STEPS, dtype=torch.float64))


@pytest.mark.parametrize("samples", [1, 311, 399, 400, 401, 1_500])
def test_any_sound_gives_an_embedding(model: AudioMAE, samples: int) -> None:
    waveform = noise(samples)
    embedding = model.embed(waveform, RATE)
    assert embedding.frames.shape == (1, 32)
    assert embedding.clip.isfinite().all()
    padded = torch.nn.functional.pad(waveform, (0, max(0, 400 - samples)))
    torch.testing.assert_close(embedding.clip, model.embed(padded, RATE).clip, rtol=0, atol=0)


def test_silence_and_no_clips(model: AudioMAE) -> None:
    assert model.embed(torch.zeros(20_000), RATE).frames.isfinite().all()
    empty = model.embed(torch.zeros(0, 20_000), RATE)
    assert empty.clip.shape == (0, 32)
    assert empty.frames.shape == (0, len(empty.times), 32)


# Sample rates


def sine(rate: int, seconds: float = 1.2) -> Tensor:
    time = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    chord = sum(torch.sin(2 * torch.pi * hertz * time + hertz) for hertz in (300.0, 1_100.0, 2_900.0))
    return (0.1 * chord).float()


@pytest.mark.parametrize("rate", [44_100, 48_000, 22_050, 96_000])
def test_other_rates_give_nearly_the_same(model: AudioMAE, rate: int) -> None:
    expected, found = model.embed(sine(RATE), RATE), model.embed(sine(rate), rate)
    assert found.frames.shape == expected.frames.shape
    other = model.embed(sine(RATE).flip(0) * 3, RATE)
    distance = (found.clip - expected.clip).norm()
    assert distance < 0.1 * (other.clip - expected.clip).norm()


def test_a_waveform_is_resampled_whole(model: AudioMAE) -> None:
    import torchaudio

    waveform = noise(2, 100_000)
    resampled = torchaudio.functional.resample(waveform, 44_100, RATE)
    expected = model.embed(resampled, RATE)
    torch.testing.assert_close(model.embed(waveform, 44_100).frames, expected.frames, rtol=0, atol=0)


# Types and modes


def test_numpy_and_other_precisions(model: AudioMAE) -> None:
    waveform = noise(12_000)
    expected = model.embed(waveform, RATE)
    for same in (waveform.numpy(), waveform.numpy().astype(np.float64), waveform.double()):
        found = model.embed(same, RATE)
        assert found.clip.dtype == torch.float32
        torch.testing.assert_close(found.frames, expected.frames, rtol=0, atol=0)
    assert model.embed(waveform.half(), RATE).clip.dtype == torch.float32


def test_embedding_has_the_precision_of_the_model_but_at_least_float32() -> None:
    torch.manual_seed(0)
    model, waveform = AudioMAE(CONFIG, impl="reference"), noise(12_000)
    expected = model.embed(waveform, RATE)
    exact = model.double().embed(waveform, RATE)
    assert exact.frames.dtype == exact.clip.dtype == torch.float64
    torch.testing.assert_close(exact.frames.float(), expected.frames, rtol=1e-3, atol=1e-3)
    rough = model.bfloat16().embed(waveform, RATE)
    assert rough.frames.dtype == rough.clip.dtype == torch.float32
    torch.testing.assert_close(rough.frames, expected.frames, rtol=0.1, atol=0.1)


def test_autocast_is_obeyed(model: AudioMAE) -> None:
    waveform = noise(12_000)
    exact = model.embed(waveform, RATE)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.embed(waveform, RATE)
    assert rough.frames.dtype == torch.float32
    error = (rough.frames - exact.frames).abs().max()
    assert 0 < error < 0.2


def test_a_model_in_training_embeds_the_same_and_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model = AudioClassifier(replace(CLASSIFIER, drop_path=0.9))
    model.eval()
    waveform = noise(12_000)
    expected = model.embed(waveform, RATE)
    model.train()
    model.encoder.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    before, state = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = model.embed(waveform, RATE)
    torch.testing.assert_close(found.frames, expected.frames, rtol=0, atol=0)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_gives_the_same_there(model: AudioMAE) -> None:
    waveform = noise(2, 3 * WINDOWS.hop - 2_000)
    expected = model.embed(waveform, RATE)
    other = AudioMAE(CONFIG).cuda()
    other.load_state_dict(model.state_dict())
    for where in ("cpu", "cuda"):
        found = other.embed(waveform.to(where), RATE)
        assert found.clip.is_cuda
        assert found.frames.is_cuda
        torch.testing.assert_close(found.frames.cpu(), expected.frames, rtol=1e-3, atol=1e-3)


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.zeros(2, 3, 400), RATE),
            ValueError,
            r"waveform has shape \(2, 3, 400\), expected \(samples,\) or \(B,",
        ),
        ((torch.tensor(0.0), RATE), ValueError, r"waveform has shape \(\), expected"),
        ((torch.zeros(0), RATE), ValueError, "waveform holds no samples"),
        ((torch.zeros(3, 0), RATE), ValueError, "waveform holds no samples"),
        ((np.zeros((16_000, 2)), RATE), ValueError, r"has shape \(16000, 2\): expected \(B, samples\), not more clips"),
        ((torch.zeros(900, dtype=torch.int16), RATE), TypeError, "waveform is torch.int16, expected floating point"),
        ((torch.tensor([0.0, torch.nan] * 500), RATE), ValueError, "waveform holds samples that are not finite"),
        ((torch.tensor([0.0, torch.inf] * 500), RATE), ValueError, "waveform holds samples that are not finite"),
        ((torch.zeros(900), 0), ValueError, "sample_rate is 0, expected whole Hz from 1 up"),
        ((torch.zeros(900), -16_000), ValueError, "sample_rate is -16000, expected"),
        ((torch.zeros(900), 44_100.5), ValueError, "sample_rate is 44100.5, expected"),
        ((torch.zeros(900), float("nan")), ValueError, "sample_rate is nan, expected"),
    ],
)
def test_bad_audio_is_refused(model: AudioMAE, arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model.embed(*arguments)


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_layer_that_does_not_exist_is_refused(model: AudioMAE, layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer is {layer}, expected 1 to 3, or -3 to -1 from the last one back"):
        model.embed(noise(900), RATE, layer=layer)


def test_settings_are_checked(model: AudioMAE) -> None:
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        model.embed(noise(900), RATE, batch_size=0)
    config = replace(CONFIG, in_channels=3)
    with pytest.raises(ValueError, match="the encoder hears 3 channels, expected 1: a waveform is one"):
        embed(config, AudioMAE(config).encoder, noise(900), RATE)
