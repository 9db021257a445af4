"""Exported models: PyTorch programs and ONNX files of the reference form, with outputs compared."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audiomae import AudioClassifier, export
from audiomae.checkpoints import load_classifier_or_encoder, save_weights, to_timm
from audiomae.encoder import Encoder

from .official import assert_same, error_line
from .small_models import classifier, pretrained

SIZES: dict[str, Any] = {"spec_size": (48, 32), "embed_dim": 64, "depth": 1, "num_heads": 1}
BATCH = {0: torch.export.Dim("batch")}
LABELS = ("a", "b", "c", "d", "ö")

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def specs(*batches: int) -> list[Tensor]:
    return [torch.randn(batch, 1, *SIZES["spec_size"]) for batch in batches]


def command_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        export.main(arguments)
    assert caught.value.code == 2
    came = capsys.readouterr()
    assert came.out == ""
    assert came.err.count("\n") == 1
    return came.err


@pytest.mark.parametrize(
    "model", [pretrained("reference", **SIZES).encoder, classifier("reference", **{**SIZES, "patch_stride": (10, 16)})]
)
@torch.no_grad()
def test_torch_export(model: nn.Module):
    program = torch.export.export(model, (specs(2)[0],), dynamic_shapes={"spec": BATCH}).module()
    for spec in specs(1, 2, 5):
        torch.testing.assert_close(program(spec), model(spec), rtol=0, atol=1e-5)
    assert not any("mae_kernels" in str(node.target) for node in program.graph.nodes)


@needs_onnx
@torch.no_grad()
def test_torch_onnx_export(tmp_path: Path):
    model, path = classifier("reference", **SIZES), tmp_path / "model.onnx"
    torch.onnx.export(model, (specs(2)[0],), path, dynamo=True, dynamic_shapes={"spec": BATCH}, verbose=False)
    run_file = export.open_onnx(path)
    for spec in specs(1, 2, 5):
        torch.testing.assert_close(run_file(spec), model(spec), rtol=0, atol=1e-5)


@needs_onnx
@torch.no_grad()
def test_command_writes_onnx_that_hears(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from onnxruntime import InferenceSession

    model = classifier("reference", **SIZES, labels=LABELS, sample_rate=8000)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "out" / "model.onnx"
    path.parent.mkdir()
    export.main([str(tmp_path / "model"), "--out", str(path), "--front-end"])
    wrote, compared = capsys.readouterr().out.splitlines()
    front_end = model.config.front_end()
    samples = front_end.num_samples(48)
    assert wrote.startswith(f"wrote {path}, ")
    assert wrote.endswith(f" MB: waveform (B, {samples}), lengths (B) -> logits (B, 5)")
    assert compared.startswith("largest difference from the model ")
    assert os.listdir(path.parent) == ["model.onnx"]

    session = InferenceSession(path)
    described = [(entry.name, entry.shape) for entry in (*session.get_inputs(), *session.get_outputs())]
    assert described == [("waveform", ["batch", samples]), ("lengths", ["batch"]), ("logits", ["batch", 5])]
    settings = json.loads(session.get_modelmeta().custom_metadata_map["audiomae_config"])
    assert type(model.config).from_dict(settings) == model.config

    run_file = export.open_onnx(path)
    waveform, lengths = torch.randn(4, samples) / 5, torch.tensor([samples, 0, 199, samples // 2])
    expected = model(front_end(waveform, 48, lengths))
    torch.testing.assert_close(run_file(waveform, lengths), expected, rtol=0, atol=1e-5)
    waveform[3, samples // 2 :] = 7  # is not the clip's own
    torch.testing.assert_close(run_file(waveform, lengths), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_command_writes_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, path = classifier("reference", **SIZES), tmp_path / "model.pt2"
    save_weights(tmp_path / "weights", model)
    export.main([str(tmp_path / "weights"), "--out", str(path), "--encoder"])
    wrote, compared = capsys.readouterr().out.splitlines()
    assert wrote.endswith(" MB: spec (B, 1, 48, 32) -> tokens (B, 7, 64)")
    assert compared.startswith("largest difference from the model ")
    extra = {"config.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["config.json"]) == json.loads(json.dumps(model.config.encoder_settings()))
    for spec in specs(1, 3):
        torch.testing.assert_close(program(spec), model.encoder(spec), rtol=0, atol=1e-5)


def test_a_program_with_a_change_of_autocast_can_be_loaded(tmp_path: Path):
    """The front end makes one."""

    class Quiet(nn.Module):
        def forward(self, spec: Tensor) -> Tensor:
            out = torch.empty_like(spec)
            with torch.autocast("cpu", enabled=False):
                out[:] = 2 * spec
                return out

    spec = specs(2)[0]
    program = export.export_program(Quiet(), {"spec": spec})
    run_file = export.write(program, tmp_path / "a.pt2", classifier(**SIZES).config, ["spec"], "twice")
    torch.testing.assert_close(run_file(spec), 2 * spec, rtol=0, atol=0)


def test_nothing_is_written_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model = pretrained("reference", **SIZES)
    save_weights(tmp_path / "weights", model)
    monkeypatch.setattr("audiomae.export.write", lambda *_: lambda spec: model.encoder(spec) * (1 + 2e-4))
    line = command_error([str(tmp_path / "weights"), "--out", str(tmp_path / "a.pt2")], capsys)
    assert line.startswith("audiomae.export: error: nothing written: largest difference from the model ")
    assert line.endswith("expected at most 0.0001 of that\n")
    assert os.listdir(tmp_path) == ["weights"]
    error_line(
        lambda: export.compare(lambda spec: model.encoder(spec) * torch.nan, model.encoder, model.config),
        "largest difference from the model nan",
        kind=ValueError,
    )
    assert "model 0.0e+00" in export.compare(model.encoder, model.encoder, model.config)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_weights(tmp_path / "weights", classifier(**SIZES))
    config = export.ExportConfig(str(tmp_path / "weights"), tmp_path / "a.onnx")
    monkeypatch.setattr("audiomae.export.find_spec", lambda name: None if name == "onnxscript" else name)
    error_line(
        lambda: export.build(config),
        "a.onnx, which takes onnxscript: pip install 'audiomae[export]', or write a .pt2",
        kind=ValueError,
    )

    def write(program: Any, path: Path, *_: Any) -> None:
        path.write_text("without onnxruntime")

    monkeypatch.setattr("audiomae.export.find_spec", str)
    monkeypatch.setattr("audiomae.export.write", write)
    wrote, compared = export.run(config)
    assert wrote.startswith(f"wrote {tmp_path / 'a.onnx'}, 0.0 MB: spec (B, 1, 48, 32) -> logits (B, 5)")
    assert compared == "not compared with the model, which takes onnxruntime: pip install 'audiomae[export]'"


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stereo, out = str(tmp_path / "weights"), str(tmp_path / "a.pt2")
    save_weights(stereo, pretrained(**SIZES, in_channels=2))
    assert "no such checkpoint: none.pth" in command_error(["none.pth", "--out", out], capsys)
    assert "a.pt, expected a name that ends in .onnx or .pt2" in command_error([stereo, "--out", out[:-1]], capsys)
    missing = str(tmp_path / "no" / "a.pt2")
    assert f"no such directory: {tmp_path / 'no'}" in command_error([stereo, "--out", missing], capsys)
    line = command_error([stereo, "--out", out, "--front-end"], capsys)
    assert "the model hears 2 channels, expected 1: a waveform is one" in line


def test_what_a_file_computes(tmp_path: Path):
    path = tmp_path / "weights"
    model, fine_tuned = pretrained(**SIZES), classifier(**SIZES)
    for source, expected in ((model, model.encoder), (fine_tuned, fine_tuned)):
        save_weights(path, source)
        config, loaded = load_classifier_or_encoder(path, impl="reference")
        assert (type(loaded), loaded.impl) == (type(expected), "reference")
        assert config.encoder_settings() == source.config.encoder_settings()
        assert_same(loaded.state_dict(), expected.state_dict())
    assert config == fine_tuned.config
    state = to_timm(classifier()).state_dict()
    torch.save(state, path)
    assert isinstance(load_classifier_or_encoder(path)[1], AudioClassifier)
    torch.save({name: tensor for name, tensor in state.items() if name.startswith("fc_norm")} | {}, path)
    error_line(lambda: load_classifier_or_encoder(path), "no encoder.patch_embed.proj.weight")
    torch.save({name: tensor for name, tensor in state.items() if name != "head.bias"}, path)
    error_line(lambda: load_classifier_or_encoder(path), f"{path} has no head.bias, expected a classifier")
    torch.save({name: t for name, t in state.items() if name.partition(".")[0] not in ("head", "fc_norm")}, path)
    assert isinstance(load_classifier_or_encoder(path)[1], Encoder)
