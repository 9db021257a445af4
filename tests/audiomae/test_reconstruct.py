"""The reconstruct command: what it writes, hears and prints, and how it meets bad files and settings."""

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor

from audiomae import AudioMAE, AudioMAEConfig, LogMel, PatchMask
from audiomae.checkpoints import save_weights
from audiomae.inversion import SILENCE
from audiomae.reconstruct import Job, ReconstructConfig, build, draw, main, reconstruct

RATE = 16000
CONFIG = AudioMAEConfig(
    spec_size=(64, 128),
    embed_dim=32,
    depth=1,
    num_heads=2,
    decoder_dim=16,
    decoder_depth=2,
    decoder_heads=2,
    bias_dropout=0.5,  # of which nothing must be seen
)
OVERLAPPING = replace(CONFIG, patch_stride=(10, 10), spec_size=(68, 128))
CAPACITY = CONFIG.front_end().num_samples(64)
SOUNDS = ("original", "masked", "reconstruction")


def save_model(path: Path, config: AudioMAEConfig = CONFIG) -> str:
    torch.manual_seed(0)
    save_weights(path, AudioMAE(config))
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "weights.safetensors")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare what takes longest where pictures are not looked at."""
    monkeypatch.setattr("audiomae.reconstruct.save_figure", lambda figure, path: path.touch())


def write_noise(path: Path, samples: int, seed: int = 0, level: float = 0.1) -> Tensor:
    """Write coloured noise that swells, and return it as read back."""
    noise = np.random.default_rng(seed).standard_normal(samples).cumsum()
    noise = np.diff(noise, prepend=0) + 0.1 * (noise - noise.mean())
    noise *= np.linspace(0.3, 1, samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, level * noise / abs(noise).max(), RATE)
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def read_sounds(out: Path, name: str) -> list[Tensor]:
    return [torch.from_numpy(soundfile.read(out / f"{name}-{sound}.wav", dtype="float32")[0]) for sound in SOUNDS]


def make_job(checkpoint: str, *flags: str) -> Job:
    settings = dict(zip(flags[::2], flags[1::2], strict=True))
    config = ReconstructConfig(files=("none.wav",), checkpoint=checkpoint, **settings)  # type: ignore[arg-type]
    return build(config, torch.device("cpu"))


def test_each_file_gets_a_picture_and_three_sounds(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path / "one.wav", CAPACITY)
    write_noise(tmp_path / "folder" / "two.flac", CAPACITY + 5000, seed=1)
    out = tmp_path / "new" / "out"
    assert run(tmp_path / "one.wav", tmp_path / "folder", "--checkpoint", checkpoint, "--out", out) == 0
    names = [f"{stem}{end}" for stem in ("one", "two") for end in (".png", *(f"-{sound}.wav" for sound in SOUNDS))]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for stem in ("one", "two"):
        assert Image.open(out / f"{stem}.png").size[0] > 1000
        for sound in SOUNDS:
            info = soundfile.info(out / f"{stem}-{sound}.wav")
            assert (info.samplerate, info.channels, info.frames) == (RATE, 1, CAPACITY)
            assert (info.format, info.subtype) == ("WAV", "PCM_16")
    printed = capsys.readouterr().out
    assert printed.count("take the true mean and deviation of each removed patch") == 1
    assert f"{tmp_path / 'one.wav'}: 0.00 to 0.66 s\n" in printed
    assert f"{tmp_path / 'folder' / 'two.flac'}: 0.00 to 0.66 s of a longer file\n" in printed
    assert f"wrote {out / 'one.png'} and {out / 'one'}-{{original,masked,reconstruction}}.wav" in printed


@pytest.mark.usefixtures("no_pictures")
def test_sounds_are_the_original_what_is_visible_and_the_reconstruction(checkpoint: str, tmp_path: Path) -> None:
    clip = write_noise(tmp_path / "clip.wav", CAPACITY)
    flags = ["--checkpoint", checkpoint, "--out", tmp_path, "--mask", "time", "--ratio", "0.5"]
    assert run(tmp_path / "clip.wav", *flags) == 0
    log_mel = LogMel()
    true, *back = (log_mel(x[None])[0, 0] for x in (clip, *read_sounds(tmp_path, "clip")))
    removed = PatchMask.time(torch.tensor([0]), CONFIG.grid, 0.5).mask[0].view(4, 8)[:, 0]
    assert removed.sum() == 2
    for step, gone in enumerate(removed.tolist()):
        inner = slice(16 * step + 3, 16 * step + 13)  # away from the neighbours' frames
        original, masked, reconstruction = ((x - true)[inner].abs().mean() for x in back)
        assert original < 0.5
        if gone:
            assert back[1][inner].max() < -8  # what 16 bits leave of silence
            assert 0.3 < reconstruction < 3  # an untrained model, but the patches' true mean
        else:
            assert max(masked, reconstruction) < 0.5


def test_spectrograms_and_losses_are_those_of_the_model(checkpoint: str, tmp_path: Path) -> None:
    job = make_job(checkpoint, "out", tmp_path)
    clip = write_noise(tmp_path / "clip.wav", CAPACITY)
    result = reconstruct(job, clip)
    mask = PatchMask.random(torch.tensor([0]), CONFIG.grid, 0.8)
    spec = CONFIG.front_end()(clip[None])
    with torch.no_grad():
        output = job.model(spec, mask, return_pred=True)
    assert (result.patch_rows, result.removed) == (4, 26)
    assert result.loss == pytest.approx(output.loss.item(), rel=1e-6)
    assert result.baseline_loss == pytest.approx(255 / 256, rel=1e-3)
    torch.testing.assert_close(result.original, LogMel()(clip[None])[0, 0], rtol=0, atol=1e-5)
    expected = job.front_end.denormalize(job.model.reconstruct(spec, output))[0, 0]
    torch.testing.assert_close(result.reconstruction, expected, rtol=0, atol=1e-5)
    visible = CONFIG.grid.unpatchify((~mask.mask).float()[..., None].expand(1, 32, 256).contiguous())[0, 0] > 0
    torch.testing.assert_close(result.masked, result.original.where(visible, SILENCE), rtol=0, atol=0)
    assert (result.reconstruction - result.original)[~visible].abs().mean() > 0.3


@pytest.mark.parametrize(
    ("config", "samples", "frames", "rows"),
    [
        (CONFIG, 400 + 63 * 160, 64, 4),
        (CONFIG, 400 + 62 * 160 + 159, 48, 3),  # one sample short of the last frame
        (CONFIG, 400 + 15 * 160, 16, 1),
        (OVERLAPPING, 400 + 67 * 160, 68, 6),  # with a margin of two frames
        (OVERLAPPING, 400 + 65 * 160, 66, 6),
        (OVERLAPPING, 400 + 64 * 160, 50, 5),  # the sixth patch, from frame 50 on, lacks one
    ],
)
def test_patches_with_padding_are_left_out(
    config: AudioMAEConfig, samples: int, frames: int, rows: int, tmp_path: Path
) -> None:
    job = make_job(save_model(tmp_path / "weights.safetensors", config), "out", tmp_path, "ratio", 0.7, "seed", 1)
    clip = write_noise(tmp_path / "clip.wav", samples)
    result = reconstruct(job, clip)
    assert result.patch_rows == rows
    assert result.original.shape == result.masked.shape == result.reconstruction.shape == (frames, 128)
    torch.testing.assert_close(result.original, LogMel()(clip[None])[0, 0, :frames], rtol=0, atol=1e-5)

    grid = config.grid
    removed = job.mask.mask[0, : rows * grid.shape[1]]
    spec = job.front_end(clip[None], grid.spec_size[0])
    with torch.no_grad():
        pred = job.model(spec, job.mask, return_pred=True).pred[0, : len(removed)]
    target = grid.patchify(spec)[0, : len(removed)]
    target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    assert result.removed == removed.sum()
    assert result.loss == pytest.approx((pred - target)[removed].square().mean().item(), rel=1e-5)
    assert result.baseline_loss == pytest.approx(target[removed].square().mean().item(), rel=1e-5)

    figure = draw(job, result, "clip")
    original, masked, reconstruction = (axis.images[0].get_array() for axis in figure.axes[:3])
    shown = (rows - 1) * grid.patch_stride[0] + 16 if rows < grid.shape[0] else grid.spec_size[0]
    assert original.shape == masked.shape == reconstruction.shape == (128, shown)
    drawn = torch.from_numpy(np.ma.filled(masked, np.nan).T.copy())
    visible = ~drawn[:frames].isnan()
    torch.testing.assert_close(drawn[:frames][visible], result.original[visible], rtol=0, atol=0)
    torch.testing.assert_close(result.masked, result.original.where(visible, SILENCE), rtol=0, atol=0)
    assert drawn[frames:].isnan().all()
    assert 0.05 < visible.float().mean() < 0.95


@pytest.mark.usefixtures("no_pictures")
def test_a_short_file_ends_with_its_last_patch_and_says_so(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path / "clip.wav", 7600)  # 46 frames
    assert run(tmp_path / "clip.wav", "--checkpoint", checkpoint, "--out", tmp_path) == 0
    assert [len(sound) for sound in read_sounds(tmp_path, "clip")] == [400 + 31 * 160] * 3
    printed = capsys.readouterr().out
    assert "clip.wav: 0.00 to 0.34 s, padded to 0.66 s; the last 0.140 s of the file fill no patch\n" in printed


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("mask", ["random", "time", "frequency", "time_frequency"])
def test_masks(mask: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = write_noise(tmp_path / "clip.wav", CAPACITY)
    flags = ["--checkpoint", checkpoint, "--out", tmp_path, "--mask", mask, "--ratio", "0.5", "--seed", "7"]
    assert run(tmp_path / "clip.wav", *flags, "--ratio-frequency", "0.25") == 0
    seed = torch.tensor([7])
    masks = {
        "random": PatchMask.random(seed, CONFIG.grid, 0.5),
        "time": PatchMask.time(seed, CONFIG.grid, 0.5),
        "frequency": PatchMask.frequency(seed, CONFIG.grid, 0.5),
        "time_frequency": PatchMask.time_frequency(seed, CONFIG.grid, 0.5, 0.25),
    }
    with torch.no_grad():
        loss = make_job(checkpoint, "out", tmp_path).model(CONFIG.front_end()(clip[None]), masks[mask]).loss
    removed = masks[mask].ids_removed.shape[1]
    printed = re.search(
        r"loss (\S+) on (\d+) removed patches; the mean of every patch scores (\S+)\n", capsys.readouterr().out
    )
    assert printed is not None
    assert float(printed[1]) == pytest.approx(loss.item(), abs=1e-4)
    assert float(printed[3]) == pytest.approx(255 / 256, abs=1e-3)
    assert int(printed[2]) == removed == {"time_frequency": 32 - 2 * 6}.get(mask, 16)


@pytest.mark.usefixtures("no_pictures")
def test_start_chooses_a_part(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = write_noise(tmp_path / "long.wav", 40000)
    soundfile.write(tmp_path / "part.wav", clip[16000 : 16000 + CAPACITY].numpy(), RATE)
    write_noise(tmp_path / "short.wav", 8000)
    assert run(tmp_path / "part.wav", "--checkpoint", checkpoint, "--out", tmp_path) == 0
    flags = ["--checkpoint", checkpoint, "--out", tmp_path, "--start", "1"]
    capsys.readouterr()
    assert run(tmp_path / "short.wav", tmp_path / "long.wav", *flags) == 1
    for a, b in zip(read_sounds(tmp_path, "part"), read_sounds(tmp_path, "long"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    printed = capsys.readouterr()
    assert "long.wav: 1.00 to 1.66 s of a longer file" in printed.out
    assert printed.err.startswith("audiomae.reconstruct: error: start of 1.0 s lies outside")
    assert "1 of 2 files could not be done" in printed.err


@pytest.mark.usefixtures("no_pictures")
def test_bad_files_are_named_and_the_others_done(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "z"):
        write_noise(tmp_path / f"{name}.wav", CAPACITY)
    write_noise(tmp_path / "short.wav", 400 + 15 * 160 - 1)
    (tmp_path / "broken.wav").write_text("no sound")
    files = [tmp_path / f"{name}.wav" for name in ("a", "broken", "missing", "short", "z")]
    out = tmp_path / "out"
    assert run(*files, "--checkpoint", checkpoint, "--out", out) == 1
    assert {path.stem for path in out.glob("*.png")} == {"a", "z"}
    assert len(list(out.iterdir())) == 8
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"audiomae.reconstruct: error: {tmp_path / 'broken.wav'}: cannot be read as audio")
    assert lines[1] == f"audiomae.reconstruct: error: {tmp_path / 'missing.wav'}: No such file or directory"
    assert lines[2] == (
        f"audiomae.reconstruct: error: {tmp_path / 'short.wav'}: "
        "2799 samples at 16000 Hz, expected at least the 2800 of a patch"
    )
    assert lines[3] == "audiomae.reconstruct: 3 of 5 files could not be done"


@pytest.mark.usefixtures("no_pictures")
def test_a_mask_that_spares_a_short_clip_is_told(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path / "clip.wav", 4000)
    seeds = torch.arange(50)
    spared = (~PatchMask.time(seeds, CONFIG.grid, 0.5).mask[:, 0]).nonzero()[0].item()
    flags = ["--checkpoint", checkpoint, "--out", tmp_path, "--mask", "time", "--ratio", "0.5"]
    assert run(tmp_path / "clip.wav", *flags, "--seed", str(spared)) == 1
    assert "clip.wav: the mask removes none of its 1 x 8 patches: try another --seed" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_files_of_one_name_keep_apart_and_do_not_change_each_other(checkpoint: str, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/kick.wav", "b/kick.wav", "kick-2.wav", "kick.flac")]
    for seed, path in enumerate(paths):
        write_noise(path, CAPACITY, seed)
    out = tmp_path / "out"
    assert run(*paths, "--checkpoint", checkpoint, "--out", out) == 0
    names = ["kick", "kick-2", "kick-2-2", "kick-3"]
    assert {path.stem for path in out.glob("*.png")} == set(names)
    assert len(list(out.iterdir())) == 16
    for path, name in list(zip(paths, names, strict=True))[1:3]:
        alone = tmp_path / "alone" / name
        assert run(path, "--checkpoint", checkpoint, "--out", alone) == 0
        for a, b in zip(read_sounds(out, name), read_sounds(alone, path.stem), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.usefixtures("no_pictures")
def test_loud_sounds_get_one_gain_and_soft_ones_none(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    time = torch.arange(CAPACITY) / RATE
    square = torch.sin(2 * math.pi * 60 * time).sign() * 0.02
    for name, gain in (("soft", 1.0), ("loud", 49.0)):
        soundfile.write(tmp_path / f"{name}.wav", (gain * square).numpy(), RATE, subtype="FLOAT")
    flags = ["--checkpoint", checkpoint, "--out", tmp_path, "--mask", "frequency", "--ratio", "0.5", "--seed", "1"]
    assert run(tmp_path / "soft.wav", tmp_path / "loud.wav", *flags) == 0
    printed = re.findall(r"sounds are (\S+) dB softer than the file, lest they clip", capsys.readouterr().out)
    assert len(printed) == 1
    soft, loud = read_sounds(tmp_path, "soft"), read_sounds(tmp_path, "loud")
    assert max(sound.abs().max() for sound in loud).item() == pytest.approx(10 ** (-1 / 20), abs=1e-4)
    level = {name: LogMel()(sounds[0][None]).exp().sum() for name, sounds in (("soft", soft), ("loud", loud))}
    assert 10 * (level["soft"] * 49**2 / level["loud"]).log10() == pytest.approx(float(printed[0]), abs=0.3)
    assert 0.9 < level["soft"] / LogMel()(square[None]).exp().sum() < 1.1
    # The visible frequencies are the same sound in all three, whichever of them was the loudest.
    visible = ~PatchMask.frequency(torch.tensor([1]), CONFIG.grid, 0.5).mask[0, :8].repeat_interleave(16)
    energies = [LogMel()(sound[None])[0, 0].exp()[:, visible].sum() for sound in loud]
    assert max(energies) / min(energies) < 1.3


def test_without_normalised_targets_nothing_true_is_put_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_model(tmp_path / "weights.safetensors", replace(CONFIG, norm_target=False))
    clip = write_noise(tmp_path / "clip.wav", CAPACITY)
    assert run(tmp_path / "clip.wav", "--checkpoint", checkpoint, "--out", tmp_path) == 0
    assert "true mean" not in capsys.readouterr().out
    job = make_job(checkpoint, "out", tmp_path)
    titles = [axis.get_title() for axis in draw(job, reconstruct(job, clip), "clip").axes[:3]]
    assert titles[2] == "reconstruction"


@pytest.mark.usefixtures("no_pictures")
def test_a_model_that_predicts_no_numbers_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AudioMAE(CONFIG)
    torch.nn.init.constant_(model.decoder.pred.bias, math.nan)
    save_weights(tmp_path / "weights.safetensors", model)
    write_noise(tmp_path / "clip.wav", CAPACITY)
    assert run(tmp_path / "clip.wav", "--checkpoint", tmp_path / "weights.safetensors", "--out", tmp_path) == 1
    assert "clip.wav: log_mel reaches from nan to nan, expected values of finite energy" in capsys.readouterr().err


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for explained in ("Sound files, or folders", "Which patches are removed together", "--ratio-frequency", "--start"):
        assert explained in text


def write_broken_inputs(folder: Path) -> None:
    write_noise(folder / "in" / "clip.wav", CAPACITY)
    write_noise(folder / "in" / "clip-masked.wav", CAPACITY)
    (folder / "empty").mkdir()
    (folder / "text.pth").write_text("<html>not found</html>")
    (folder / "file").write_text("")
    save_model(folder / "three.safetensors", replace(CONFIG, in_channels=3))
    torch.save({"model": {}}, folder / "other.pth")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "no files given, expected at least one sound file or folder"),
        ("{folder}/empty", "empty: no audio files in it or below"),
        ("clip.wav --checkpoint {folder}/none.pth", "no such checkpoint: "),
        ("clip.wav --checkpoint {folder}/text.pth", "text.pth is neither a safetensors nor a torch.save file"),
        ("clip.wav --checkpoint {folder}/other.pth", "other.pth"),
        ("clip.wav --checkpoint {folder}/three.safetensors", "three.safetensors is a model of 3 channels, expected 1"),
        ("clip.wav --ratio 0.99", "a mask ratio of 0.99 keeps 0 of 32"),
        ("clip.wav --ratio 0", "a mask ratio of 0.0 keeps 32 of 32"),
        ("clip.wav --ratio 1.5", "mask ratio is 1.5, expected a number between 0 and 1"),
        (
            "clip.wav --mask time_frequency --ratio 0.5 --ratio-frequency 2",
            "mask ratio is 2.0, expected a number between 0 and 1",
        ),
        ("clip.wav --start -1", "start is -1.0, expected seconds from 0 up"),
        ("clip.wav --start nan", "start is nan, expected seconds from 0 up"),
        ("clip.wav --start inf", "start is inf, expected seconds from 0 up"),
        ("clip.wav --seed -1", "seed is -1, expected at least 0 and less than 2**63"),
        ("clip.wav --out {folder}/file", "File exists"),
        ("{folder}/in --out {folder}/in", "clip-masked.wav would overwrite an input"),
        ("clip.wav --device cuda", "device is cuda, but PyTorch sees no GPU here"),
    ],
)
def test_wrong_settings_end_in_one_line_before_any_work(
    flags: str, message: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if flags.endswith("--device cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    write_broken_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = [
        "--checkpoint",
        checkpoint,
        "--out",
        str(tmp_path / "out"),
        *shlex.split(flags.format(folder=tmp_path)),
    ]
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("audiomae.reconstruct: error: ")
    assert message in printed.err
    assert sorted(tmp_path.rglob("*")) == before
