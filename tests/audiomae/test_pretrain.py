"""The pre-training command on the demo clips: what it writes, what it prints, and that its runs agree."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from audiomae import AudioMAEConfig
from audiomae.checkpoints import load
from audiomae.data.log_mel_stats import SCHEMA, VERSION
from audiomae.pretrain import build, main, parse_arguments
from audiomae.training.distributed import join_ranks
from tests.audiomae.runs import TINY, losses, read_log, run, torchrun, two_machines


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "demo"
    run(output, "--epochs", "3", "--picture-every", "3", "--keep-every", "1")
    return output


def test_run_leaves_log_pictures_and_checkpoints(trained: Path) -> None:
    log = read_log(trained)
    assert [record["step"] for record in log] == list(range(1, 10))
    assert [record["epoch"] for record in log] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all({"loss", "baseline_loss", "lr", "clips_per_second", "waiting"} <= record.keys() for record in log)
    assert log[-1]["loss"] < log[0]["loss"]
    assert (trained / "pictures" / "reconstruction-epoch-0003.png").stat().st_size > 10_000
    assert list((trained / "tensorboard").iterdir())
    names = {path.name for path in trained.glob("*.pt")}
    assert names == {
        "checkpoint-last.pt",
        "checkpoint-previous.pt",
        *(f"checkpoint-epoch-000{epoch}.pt" for epoch in (1, 2, 3)),
    }


def test_weights_and_checkpoint_hold_the_same_model(trained: Path) -> None:
    config, weights = load(trained / "weights.safetensors")
    same_config, state = load(trained / "checkpoint-last.pt")
    assert config == same_config
    assert config.spec_size == (64, 128)
    assert weights.keys() == state.keys() == load_file(trained / "weights.safetensors").keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_resumed_run_ends_where_the_whole_run_ended(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "resumed"
    log = run(output, "--epochs", "3", "--resume", str(trained / "checkpoint-epoch-0001.pt"))
    assert [record["step"] for record in log] == list(range(4, 10))
    torch.testing.assert_close(losses(log), losses(read_log(trained)[3:]), rtol=0, atol=0)
    for name, tensor in load_file(output / "weights.safetensors").items():
        torch.testing.assert_close(tensor, load_file(trained / "weights.safetensors")[name], rtol=0, atol=0)


def test_resume_auto_continues_in_place_and_knows_the_end(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    shutil.copyfile(output / "checkpoint-epoch-0002.pt", output / "checkpoint-last.pt")
    log = run(output, "--epochs", "3", "--resume", "auto")
    assert [record["step"] for record in log] == list(range(1, 10))
    torch.testing.assert_close(losses(log), losses(read_log(trained)), rtol=0, atol=0)
    run(output, "--epochs", "3", "--resume", "auto")
    assert "nothing to do: the 3 epochs of the run are done" in capsys.readouterr().err


def test_accumulation_and_workers_do_not_change_the_run(trained: Path, tmp_path: Path) -> None:
    log = run(tmp_path / "run", "--epochs", "3", "--accumulation", "3", "--workers", "2")
    torch.testing.assert_close(losses(log), losses(read_log(trained)), rtol=1e-5, atol=0)


def test_two_processes_follow_the_curve_of_one(trained: Path, tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--epochs", "3")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(read_log(tmp_path)), losses(read_log(trained)), rtol=1e-5, atol=0)


def test_fused_without_a_gpu_trains_the_same_and_says_which_forms_it_took(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run(tmp_path / "run", "--epochs", "3", "--fused", "--device", "cpu")
    assert "operator patch_embed: " in capsys.readouterr().err
    torch.testing.assert_close(losses(log), losses(read_log(trained)), rtol=1e-5, atol=0)


def test_encoder_starts_from_an_earlier_run(trained: Path, tmp_path: Path) -> None:
    weights = trained / "weights.safetensors"
    flags = [*TINY, "--output-dir", str(tmp_path), "--init-from", str(weights), "--seed", "7"]
    with join_ranks("cpu") as ranks:
        model = build(parse_arguments(flags), ranks).trainer.model
    for name, tensor in load_file(weights).items():
        if name.startswith("encoder."):
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    assert not torch.equal(model.decoder.pred.weight, load_file(weights)["decoder.pred.weight"])


@pytest.mark.parametrize(("mask", "kept"), [("time", 2 * 8), ("frequency", 4 * 4), ("time_frequency", 2 * 4)])
def test_structured_masks_train(mask: str, kept: int, tmp_path: Path) -> None:
    flags = ["--mask", mask, "--mask-ratio", "0.5", "--picture-every", "0"]
    with join_ranks("cpu") as ranks:
        trainer = build(parse_arguments([*TINY, "--output-dir", str(tmp_path / "none"), *flags]), ranks).trainer
    spec, masks = trainer.prepare(torch.randn(3, 10_480), torch.tensor([[0, 1], [0, 2], [1, 1]]))
    assert spec.shape == (3, 1, 64, 128)
    assert masks.ids_keep.shape == (3, kept)
    assert all(0 < record["loss"] < 3 for record in run(tmp_path / "run", "--epochs", "1", *flags))


def test_clipping_bounds_the_step_and_bf16_rounds_the_loss(trained: Path, tmp_path: Path) -> None:
    log = run(tmp_path / "clipped", "--epochs", "3", "--clip-grad", "1e-6", "--base-lr", "1e-3")
    assert all(record["gradient_norm"] > 1e-6 for record in log)
    exact = losses(read_log(trained))
    rounded = losses(run(tmp_path / "bf16", "--epochs", "3", "--precision", "bf16"))
    assert 1e-6 < ((rounded - exact) / exact).abs().max() < 0.02


def test_dropout_resumes_exactly_with_workers(tmp_path: Path) -> None:
    flags = ["--epochs", "2", "--model.bias-dropout", "0.3", "--workers", "1", "--keep-every", "1"]
    whole = run(tmp_path / "whole", *flags)
    resumed = run(tmp_path / "resumed", *flags, "--resume", str(tmp_path / "whole" / "checkpoint-epoch-0001.pt"))
    torch.testing.assert_close(losses(resumed), losses(whole[3:]), rtol=0, atol=0)


def test_resume_takes_new_settings_and_tells_them(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(trained / "checkpoint-epoch-0001.pt")
    flags = ["--resume", checkpoint, "--epochs", "2", "--weight-decay", "0.5", "--picture-every", "0"]
    output = tmp_path / "run"
    run(output, *flags)
    printed = capsys.readouterr().err
    assert "changed since the checkpoint: weight_decay was 0.0001, is 0.5" in printed
    assert "changed since the checkpoint: epochs was 3, is 2" in printed
    state = torch.load(output / "checkpoint-last.pt", weights_only=True)
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.5, 0.0]
    assert json.loads((output / "config.json").read_text())["weight_decay"] == 0.5


def test_a_wrong_setting_is_told_once_by_all_ranks(tmp_path: Path) -> None:
    done = torchrun(tmp_path / "run", "--mask-ratio", "0.99")
    assert done.returncode != 0
    assert done.stderr.count("audiomae.pretrain: error: a mask ratio of 0.99 keeps 0 of 32") == 1


def test_what_is_wrong_on_one_machine_alone_ends_all(tmp_path: Path) -> None:
    flags = ["--output-dir", str(tmp_path / "run")]
    missing = str(tmp_path / "weights.safetensors")
    here, there = two_machines(flags, [*flags, "--init-from", missing])
    assert here.returncode == there.returncode == 2
    assert here.stderr.splitlines()[-1].startswith("audiomae.pretrain: error: no such checkpoint: ")
    assert "error" not in there.stderr  # told once

    missing = str(tmp_path / "stats.json")
    here, there = two_machines([*flags, "--recipe", "none"], [*flags, "--stats", missing])
    assert here.stderr.splitlines()[-1].startswith("audiomae.pretrain: error: recipe is 'none'")
    assert there.returncode == 2
    assert there.stderr.splitlines()[-1].startswith("audiomae.pretrain: error (rank 1): ")
    assert missing in there.stderr.splitlines()[-1]


def test_flags_change_the_recipe() -> None:
    config = parse_arguments(["--recipe", "pretrain-audioset", "--fused", "--epochs", "7", "--model.decoder", "hybrid"])
    assert (config.recipe, config.fused, config.epochs, config.batch_size) == ("pretrain-audioset", True, 7, 512)
    assert config.model == AudioMAEConfig(decoder="hybrid")
    assert not parse_arguments(["--no-fused"]).fused
    assert parse_arguments(["--variant=released", "--recipe=pretrain-audioset"]).epochs == 33
    sized = parse_arguments(["--recipe", "pretrain-audioset", "--size", "large"]).model
    assert (sized.embed_dim, sized.depth, sized.num_heads) == (1024, 24, 16)


def test_statistics_of_the_data_normalise_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats = tmp_path / "stats.json"
    content = {"schema": SCHEMA, "version": VERSION, "mean": -7.5, "std": 5.25, "sample_rate": 16000, "num_mels": 128}
    stats.write_text(json.dumps(content))
    config = parse_arguments(["--stats", str(stats)])
    assert (config.model.mean, config.model.std) == (-7.5, 5.25)
    assert config.model == replace(parse_arguments([]).model, mean=-7.5, std=5.25)
    assert parse_arguments(["--stats", str(stats), "--model.std", "3"]).model.std == 3
    run(tmp_path / "run", "--epochs", "1", "--stats", str(stats), "--picture-every", "0")
    assert load(tmp_path / "run" / "weights.safetensors")[0].mean == -7.5

    stats.write_text(json.dumps({**content, "sample_rate": 32000}))
    for flags, message in (
        (["--stats", str(stats)], f"{stats} has a sample_rate of 32000, the model 16000"),
        (["--stats", str(tmp_path / "none.json")], "none.json"),
        (["--stats", str(tmp_path / "run" / "log.jsonl")], "log.jsonl: no"),
    ):
        with pytest.raises(SystemExit):
            main([*TINY, "--output-dir", str(tmp_path / "other"), *flags])
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert message in line


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--recipe", "pretrain-audioset", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for explained in ("Learning rate for a batch of 256", "Width of the decoder's tokens", "--fused", "--model.window"):
        assert explained in text


def write_broken_inputs(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "empty.csv").write_text("file,label\n")
    (folder / "weights.safetensors").write_bytes(b"")
    (folder / "text.pth").write_text("<html>not found</html>")
    torch.save({"model": {"encoder.norm.weight": torch.ones(3)}}, folder / "other.pth")
    (folder / "used").mkdir()
    (folder / "logged").mkdir()
    (folder / "logged" / "log.jsonl").write_text('{"step": 1}\n')
    (folder / "used" / "checkpoint-last.pt").write_bytes(b"")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--recipe audioset", "recipe is 'audioset', expected one of demo, pretrain-audioset"),
        ("--size giant", "size is 'giant', expected one of tiny, small, base, large, huge"),
        ("--data {folder}/none.csv", "none.csv"),
        ("--data {folder}/empty", "/empty"),
        ("--data {folder}/empty.csv", "empty.csv"),
        ("--batch-size 500", "batch of 500 clips, but the manifest has 126"),
        ("--accumulation 43", "a batch of 42 clips, expected at least 43: one for each of 43 parts on each of 1 ranks"),
        ("--clip-seconds 0.01", "clip_seconds is 0.01: 0 frames, expected at least the 16 of a patch"),
        ("--clip-seconds 20", "clip_seconds is 20.0, expected at most the 0.655 s of 64 frames"),
        ("--output-dir {folder}/logged", "logged holds a run already"),
        ("--variant released", "recipe demo has no variant 'released'"),
        ("--mask-ratio 0.99", "a mask ratio of 0.99 keeps 0 of 32"),
        ("--mask-ratio 0.0", "a mask ratio of 0.0 keeps 32 of 32"),
        ("--mask-ratio 1.5", "mask ratio is 1.5, expected a number between 0 and 1"),
        ("--model.num-heads 5", "5 heads do not divide a width of 32"),
        ("--model.patch-size 8 16", "patch_stride is 16 frames, expected at most the 8 of patch_size"),
        ("--init-from {folder}/none.pth", "none.pth"),
        ("--init-from {folder}/text.pth", "text.pth"),
        ("--init-from {folder}/other.pth", "other.pth"),
        ("--resume {folder}/none.pt", "no checkpoint at"),
        ("--resume {folder}/text.pth", "text.pth"),
        ("--resume {folder}/other.pth", "is not the state of a run: it has no settings"),
        ("--resume {folder}/weights.safetensors", "holds weights alone, expected a checkpoint-last.pt"),
        ("--output-dir {folder}/used", "used holds a run already: go on with --resume auto"),
        ("--output-dir {folder}/used --resume auto", "is empty"),
        ("--device cuda", "device is cuda, but PyTorch sees no GPU here"),
    ],
)
def test_what_is_wrong_ends_in_one_line_before_any_work(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    write_broken_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main([*TINY, "--output-dir", str(tmp_path / "run"), *flags.format(folder=tmp_path).split()])
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert len(printed.splitlines()) == 1, printed
    assert printed.startswith("audiomae.pretrain: error: ")
    assert message in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_refuses_epochs_of_another_length(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(trained / "checkpoint-last.pt")
    with pytest.raises(SystemExit):
        main([*TINY, "--output-dir", str(tmp_path), "--resume", checkpoint, "--batch-size", "21"])
    assert "counts 3 steps an epoch, this run 6: go on with the data, batch size" in capsys.readouterr().err


def test_resume_refuses_another_model(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(trained / "checkpoint-last.pt")
    with pytest.raises(SystemExit):
        main([*TINY, "--output-dir", str(tmp_path), "--resume", checkpoint, "--model.depth", "3"])
    assert "is the state of another model: depth was 2, is 3" in capsys.readouterr().err
