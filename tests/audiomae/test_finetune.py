"""Fine-tuning and evaluation from the command line, on miniatures of every data set of the paper."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiomae import AudioClassifierConfig, AudioMAE, AudioMAEConfig
from audiomae.checkpoints import load_classifier, save_weights
from audiomae.data import check
from audiomae.evaluate import main as evaluate
from audiomae.finetune import build, main, parse_arguments
from audiomae.training.config import FinetuneConfig
from audiomae.training.distributed import join_ranks
from audiomae.training.finetuner import draw_mask
from tests.audiomae.miniatures import (
    make_audioset,
    make_class_folders,
    make_esc50,
    make_manifest,
    make_speech_commands,
    make_voxceleb1,
)

ENCODER: dict[str, Any] = {"embed_dim": 192, "depth": 2, "num_heads": 3}
TINY = shlex.split(
    "--model.embed-dim 192 --model.depth 2 --model.num-heads 3 --workers 0 --warmup-epochs 1 --log-every 1"
)
SMALL_INPUT = [*TINY, *shlex.split("--model.spec-size 64 128 --time-mask 16 --batch-size 4 --base-lr 6e-2")]


def finetune(output: Path, *flags: str) -> dict[str, Any]:
    main(["--output-dir", str(output), *flags])
    return json.loads((output / "results.json").read_text())


def read_log(output: Path, name: str = "log.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in read_log(output)]


def same_beginning(output: Path, expected: Path) -> None:
    """Sums of other orders round differently, which training then amplifies: the first steps must agree closely."""
    assert len(losses(output)) == len(losses(expected))
    assert losses(output)[:24] == pytest.approx(losses(expected)[:24], rel=1e-5)
    assert losses(output)[-1] == pytest.approx(losses(expected)[-1], rel=0.2)


def pretrained(path: Path, **settings: Any) -> Path:
    torch.manual_seed(1)
    config = AudioMAEConfig(**{**ENCODER, **settings}, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    save_weights(path, AudioMAE(config))
    return path


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("lists")
    train = make_manifest(root, classes=("bell", "horn", "siren"), clips=4)
    files = {"data": train, "valid-data": root / "valid.csv", "test-data": root / "test.csv"}
    return ["--dataset", "manifest", *(text for name, path in files.items() for text in (f"--{name}", str(path)))]


@pytest.fixture(scope="module")
def trained(lists: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "whole"
    finetune(output, *lists, *SMALL_INPUT, "--epochs", "4", "--keep-every", "1", "--repeats", "12")
    return output


def sizes(frames: int) -> list[str]:
    return [*TINY, "--epochs", "1", "--model.spec-size", str(frames), "128"]


RECIPES: list[tuple[str, str, Callable[[Path], Path], list[str], str]] = [
    ("finetune-audioset", "audioset", make_audioset, [*sizes(128), "--balanced-clips", "8"], "mAP"),
    ("finetune-audioset-20k", "audioset-20k", make_audioset, sizes(128), "mAP"),
    ("esc50", "esc50", make_esc50, [*sizes(128), "--fold", "2"], "top-1"),
    ("spc1", "speech-commands-v1", lambda root: make_speech_commands(root, 1), sizes(128), "top-1"),
    ("spc2", "speech-commands-v2", lambda root: make_speech_commands(root, 2), sizes(128), "top-1"),
    ("voxceleb-sid", "voxceleb1", make_voxceleb1, sizes(128), "top-1"),
]


@pytest.mark.parametrize(("recipe", "dataset", "make", "flags", "metric"), RECIPES, ids=[row[0] for row in RECIPES])
def test_recipe_from_check_to_evaluation(
    tmp_path: Path, recipe: str, dataset: str, make: Callable[[Path], Path], flags: list[str], metric: str
) -> None:
    root = make(tmp_path / "data")
    with pytest.raises(SystemExit) as ended:
        check.main([dataset, str(root)])
    assert ended.value.code in (0, 1)  # a miniature holds less than was published
    output = tmp_path / "run"
    source = pretrained(tmp_path / "pretrained.safetensors", spec_size=(256, 128))
    masks = ["--time-mask", "48", "--batch-size", "4", "--data", str(root), "--checkpoint", str(source)]
    results = finetune(output, "--recipe", recipe, *flags, *masks)
    assert len(losses(output)) >= 1
    assert np.isfinite(losses(output)).all()
    split = results["chosen_on"]
    assert split == ("test" if dataset in ("audioset", "audioset-20k", "esc50") else "valid")
    value = results["best"]["test"][metric]
    assert 0 <= value <= 1

    fold = ["--fold", "2"] if dataset == "esc50" else []
    report = tmp_path / "report"
    weights = str(output / "weights-best.safetensors")
    evaluate(["--checkpoint", weights, "--dataset", dataset, "--data", str(root), "--output-dir", str(report), *fold])
    written = json.loads((report / "evaluation.json").read_text())
    assert written["summary"][metric] == pytest.approx(value, abs=1e-6)
    assert (report / "classes.csv").exists()
    assert (report / "evaluation.png").stat().st_size > 5000


def test_all_folds_by_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_esc50(tmp_path / "data")
    flags = [*sizes(64), "--recipe", "esc50", "--data", str(root), "--time-mask", "16", "--batch-size", "8"]
    results = finetune(tmp_path / "run", *flags)
    values = [
        json.loads((tmp_path / "run" / f"fold-{fold}" / "results.json").read_text())["last"]["test"]["top-1"]
        for fold in (1, 2, 3, 4, 5)
    ]
    assert results["last"]["top-1"]["mean"] == pytest.approx(np.mean(values))
    assert results["last"]["top-1"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert f"5 folds, last epoch of each: top-1 {np.mean(values):.4f}" in capsys.readouterr().out


def test_a_run_learns_and_leaves_what_it_promises(trained: Path) -> None:
    results = json.loads((trained / "results.json").read_text())
    assert losses(trained)[-1] < 0.8 * losses(trained)[0]
    assert results["best"]["test"]["top-1"] > 0.6
    names = {path.name for path in trained.iterdir()}
    assert {"log.jsonl", "evaluations.jsonl", "tensorboard", "config.json", "results.json", "valid", "test"} <= names
    assert {"checkpoint-last.pt", "weights.safetensors", "weights-best.safetensors"} <= names
    evaluations = read_log(trained, "evaluations.jsonl")
    assert [record["epoch"] for record in evaluations] == [1, 2, 3, 4]
    best = max(evaluations, key=lambda record: record["valid top-1"])
    assert results["best_epoch"] == best["epoch"]
    assert results["best"]["valid"]["top-1"] == pytest.approx(best["valid top-1"])
    model = load_classifier(trained / "weights-best.safetensors")
    assert model.config.labels == ("bell", "horn", "siren")
    assert model.config.activation == "softmax"
    assert not model.config.multi_label


def test_resumed_run_ends_where_the_whole_run_ended(trained: Path, lists: list[str], tmp_path: Path) -> None:
    output = tmp_path / "resumed"
    shutil.copytree(trained, output)
    shutil.copyfile(output / "checkpoint-epoch-0002.pt", output / "checkpoint-last.pt")
    again = finetune(output, *lists, *SMALL_INPUT, "--epochs", "4", "--repeats", "12", "--resume", "auto")
    assert again == json.loads((trained / "results.json").read_text())
    assert losses(output) == losses(trained)
    assert len(read_log(output, "evaluations.jsonl")) == 4
    for name in ("weights.safetensors", "weights-best.safetensors"):
        model, expected = (load_classifier(folder / name) for folder in (output, trained))
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected.state_dict()[key], rtol=0, atol=0)


def resume_elsewhere(trained: Path, output: Path, *flags: str) -> dict[str, Any]:
    return finetune(output, *SMALL_INPUT, "--repeats", "12", "--resume", str(trained / "checkpoint-last.pt"), *flags)


def test_a_run_resumed_into_another_folder_takes_its_best_epoch_along(
    trained: Path, lists: list[str], tmp_path: Path
) -> None:
    results = resume_elsewhere(trained, tmp_path / "other", *lists, "--epochs", "4")
    assert results == json.loads((trained / "results.json").read_text())


def test_a_best_epoch_chosen_otherwise_is_left_out(
    trained: Path, lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = resume_elsewhere(trained, tmp_path / "other", *lists, "--epochs", "4", "--select", "last")
    best = json.loads((trained / "results.json").read_text())["best_epoch"]
    assert f"the best epoch until now, {best}, is left out: select changed" in capsys.readouterr().err
    assert (results["best_epoch"], results["chosen_on"]) == (4, "last")
    assert results["best"] == results["last"]


def test_a_fold_is_not_gone_on_with_from_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_esc50(tmp_path / "data")
    flags = [*sizes(64), "--recipe", "esc50", "--data", str(root), "--time-mask", "16", "--batch-size", "8"]
    finetune(tmp_path / "run", *flags, "--fold", "3")
    last = str(tmp_path / "run" / "checkpoint-last.pt")
    line = error_of(capsys, main, *flags, "--fold", "1", "--resume", last, "--output-dir", str(tmp_path / "other"))
    assert "is of another fold: it was trained on clips that this one tests on" in line
    line = error_of(capsys, main, *flags, "--output-dir", str(tmp_path / "run"))
    assert "holds the run of a fold: choose another --output-dir for all five" in line


def test_small_encoders_learn_at_their_own_rate() -> None:
    rates = {
        (recipe, size): parse_arguments(["--recipe", recipe, "--size", size]).base_lr
        for recipe in ("finetune-audioset", "spc2")
        for size in ("small", "base")
    }
    assert list(rates.values()) == [5e-4, 2e-4, 2e-3, 1e-3]
    assert parse_arguments(["--recipe", "spc2", "--size", "small", "--base-lr", "1e-4"]).base_lr == 1e-4


def test_accumulation_and_workers_do_not_change_the_run(trained: Path, lists: list[str], tmp_path: Path) -> None:
    flags = ["--accumulation", "2", "--workers", "2", "--repeats", "12"]
    finetune(tmp_path / "run", *lists, *SMALL_INPUT, "--epochs", "4", *flags)
    same_beginning(tmp_path / "run", trained)


def test_two_ranks_give_the_same_run(trained: Path, lists: list[str], tmp_path: Path) -> None:
    output = tmp_path / "ranks"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "audiomae.finetune", *lists, *SMALL_INPUT, "--epochs", "4", "--repeats", "12", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--output-dir", str(output)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    same_beginning(output, trained)
    results, expected = (json.loads((folder / "results.json").read_text()) for folder in (output, trained))
    assert results["best"]["test"]["clips"] == expected["best"]["test"]["clips"] == 12


def test_fused_trains_the_same(trained: Path, lists: list[str], tmp_path: Path) -> None:
    finetune(tmp_path / "run", *lists, *SMALL_INPUT, "--epochs", "4", "--repeats", "12", "--fused")
    same_beginning(tmp_path / "run", trained)


def test_a_frozen_encoder_stays_as_it_was(lists: list[str], tmp_path: Path) -> None:
    source = pretrained(tmp_path / "pretrained.safetensors", spec_size=(64, 128))
    flags = ["--checkpoint", str(source), "--freeze", "--epochs", "1"]
    finetune(tmp_path / "run", *lists, *SMALL_INPUT, *flags)
    model = load_classifier(tmp_path / "run" / "weights.safetensors")
    before = load_encoder_state(source)
    for name, tensor in model.encoder.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert model.head.weight.abs().max() > 1e-3
    run = build(parse_arguments([*lists, *SMALL_INPUT, *flags, "--output-dir", str(tmp_path / "other")]), one_rank())
    assert draw_mask(run.trainer.config, run.trainer.model.grid, torch.arange(2)) is None
    assert run.trainer.model.config.drop_path == 0


def load_encoder_state(path: Path) -> dict[str, torch.Tensor]:
    from audiomae.checkpoints import load

    state = load(path)[1]
    return {name.removeprefix("encoder."): tensor for name, tensor in state.items()}


def one_rank() -> Any:
    with join_ranks("cpu") as ranks:
        return ranks


def test_folders_of_classes_are_a_data_set(tmp_path: Path) -> None:
    root = make_class_folders(tmp_path / "sounds")
    flags = ["--dataset", "manifest", "--data", str(root), "--select", "last", "--batch-size", "2", "--epochs", "1"]
    results = finetune(tmp_path / "run", *SMALL_INPUT, *flags)
    assert results["best"] == {}
    assert load_classifier(tmp_path / "run" / "weights.safetensors").config.labels == ("bell", "horn")


def test_evaluating_with_ranks_counts_every_clip_once(trained: Path, lists: list[str], tmp_path: Path) -> None:
    test = lists[lists.index("--test-data") + 1]
    flags = ["--checkpoint", str(trained / "weights-best.safetensors"), "--dataset", "manifest", "--data", test]
    evaluate([*flags, "--output-dir", str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "audiomae.evaluate", *flags, "--batch-size", "5", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "two")], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert one["summary"]["clips"] == two["summary"]["clips"] == 12
    assert one["summary"] == pytest.approx(two["summary"])


def test_clips_that_cannot_be_read_are_left_out_of_an_evaluation_and_told(
    trained: Path, lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(lists[lists.index("--test-data") + 1]).parent
    shutil.copytree(folder, tmp_path / "clips")
    with (tmp_path / "clips" / "test.csv").open(newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    (tmp_path / "clips" / paths[5]).write_text("no sound")
    (tmp_path / "clips" / paths[2]).unlink()
    test = str(tmp_path / "clips" / "test.csv")
    weights = str(trained / "weights-best.safetensors")
    flags = ["--checkpoint", weights, "--dataset", "manifest", "--data", test, "--output-dir", str(tmp_path / "all")]
    told = f"2 of the 12 clips of the manifest cannot be read, more than the 1.00% of max_skipped: {tmp_path}"
    assert told in error_of(capsys, evaluate, *flags)
    evaluate([*flags, "--max-skipped", "0.2"])
    printed = capsys.readouterr().err
    assert "2 of the 12 clips of the manifest cannot be read and are left out: " in printed
    assert f"{paths[2]}: No such file or directory; " in printed
    assert f"{paths[5]}: cannot be read as audio" in printed
    assert json.loads((tmp_path / "all" / "evaluation.json").read_text())["summary"]["clips"] == 10
    with (tmp_path / "all" / "skipped.csv").open(newline="") as file:
        assert [row["clip"] for row in csv.DictReader(file)] == ["2", "5"]

    # As without them: what replaces them counts for nothing.
    with (tmp_path / "clips" / "test.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    with (tmp_path / "clips" / "fine.csv").open("w", newline="") as file:
        csv.writer(file).writerows(row for number, row in enumerate(rows) if number not in (3, 6))
    fine = str(tmp_path / "clips" / "fine.csv")
    evaluate([*flags, "--data", fine, "--output-dir", str(tmp_path / "fine")])
    left, kept = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("all", "fine"))
    assert left["summary"] == pytest.approx(kept["summary"])

    run = [*lists, "--test-data", test, *SMALL_INPUT, "--epochs", "1", "--max-skipped", "0.2"]
    finetune(tmp_path / "run", *run)
    assert "2 of the 12 clips of test cannot be read and are left out: " in capsys.readouterr().err


def error_of(capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], None], *flags: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command(list(flags))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_what_is_wrong_is_told_in_one_line(
    trained: Path, lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", str(tmp_path / "run")]
    base = [*SMALL_INPUT, "--epochs", "1", *out]
    labels = tmp_path / "labels.txt"
    labels.write_text("bell\nhorn\nsirens\n")
    line = error_of(capsys, main, *base, *lists, "--labels", str(labels))
    assert "label 'siren' is not in" in line
    assert "did you mean 'sirens'?" in line

    one = tmp_path / "one.csv"
    one.write_text("path,label\na.wav,bell\nb.wav,bell\n")
    line = error_of(capsys, main, *base, "--dataset", "manifest", "--data", str(one), "--select", "last")
    assert "all 2 training clips are of one class, 'bell'" in line

    root = make_esc50(tmp_path / "esc50")
    line = error_of(capsys, main, *base, "--recipe", "esc50", "--data", str(root), "--fold", "7")
    assert "fold is 7" in line

    weights = str(trained / "weights-best.safetensors")
    esc50 = [*base, "--recipe", "esc50", "--data", str(root)]
    line = error_of(capsys, main, *esc50, "--fold", "1", "--checkpoint", weights)
    assert "classifies 3 classes, expected 4: --reset-head starts with a new head" in line

    other = str(pretrained(tmp_path / "other.safetensors", embed_dim=128, num_heads=2))
    line = error_of(capsys, main, *base, *lists, "--checkpoint", other)
    assert "does not fit the encoder: width is 128, expected 192" in line

    sounds = make_class_folders(tmp_path / "sounds")
    line = error_of(capsys, main, *base, "--dataset", "manifest", "--data", str(sounds))
    assert line.endswith("select is valid, but manifest has no valid split: take --select last")

    line = error_of(capsys, main, *esc50, "--resume", "runs/fold-1/checkpoint-last.pt")
    assert "resume is runs/fold-1/checkpoint-last.pt, but five folds go on from five checkpoints" in line
    line = error_of(capsys, main, *base, *lists, "--resume", str(trained / "checkpoint-last.pt"))
    assert line.endswith("has 4 epochs behind it, the run has 1 in all")
    line = error_of(capsys, main, *base, *lists, "--resume", weights)
    assert "start from weights with --checkpoint" in line

    line = error_of(capsys, evaluate, "--checkpoint", other, *out)
    assert "expected a classifier" in line
    line = error_of(capsys, evaluate, "--checkpoint", weights, "--dataset", "demo", "--split", "test", *out)
    assert "demo has no test split" in line
    line = error_of(capsys, evaluate, "--checkpoint", weights, "--dataset", "demo", "--split", "valid", *out)
    assert "has 3 classes, the data has 11" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multi_label": True, "dataset": "manifest", "loss": "ce"}, "loss is ce with multi_label, expected bce"),
        ({"multi_label": True, "dataset": "esc50"}, "multi_label is True with esc50, expected False"),
        ({"multi_label": False, "dataset": "audioset"}, "multi_label is False with audioset, expected True"),
        ({"balanced_clips": 100, "repeats": 2}, "repeats is 2 with balanced_clips, expected 1"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5, expected at most 1"),
        ({"mixup": 1.5}, "mixup is 1.5, expected a probability"),
        ({"drop_path": 1.0}, "drop_path is 1.0, expected 0 up to but not 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**settings)


def test_a_new_head_on_request(trained: Path, tmp_path: Path) -> None:
    root = make_class_folders(tmp_path / "sounds")
    flags = ["--dataset", "manifest", "--data", str(root), "--select", "last", "--batch-size", "2", "--epochs", "1"]
    weights = str(trained / "weights-best.safetensors")
    finetune(tmp_path / "run", *SMALL_INPUT, *flags, "--checkpoint", weights, "--reset-head")
    assert load_classifier(tmp_path / "run" / "weights.safetensors").config.num_classes == 2


def test_a_broken_clip_is_replaced_and_named(
    lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_class_folders(tmp_path / "sounds")
    (root / "bell" / "0.wav").write_bytes(b"RIFF nothing")
    flags = ["--dataset", "manifest", "--data", str(root), "--select", "last", "--batch-size", "2", "--epochs", "1"]
    flags += ["--mixup", "0"]
    with pytest.raises(SystemExit):
        main([*SMALL_INPUT, *flags, "--output-dir", str(tmp_path / "refused")])
    assert "more than the 1.00% of max_skipped" in capsys.readouterr().err.strip().splitlines()[-1]
    main([*SMALL_INPUT, *flags, "--max-skipped", "1", "--output-dir", str(tmp_path / "run")])
    assert f"skipped {root / 'bell' / '0.wav'}: cannot be read as audio" in capsys.readouterr().err
    assert str(root / "bell" / "0.wav") in (tmp_path / "run" / "skipped.csv").read_text()


def test_the_configuration_of_the_classifier_follows_the_run(lists: list[str], tmp_path: Path) -> None:
    config = parse_arguments([*lists, *SMALL_INPUT, "--loss", "bce", "--output-dir", str(tmp_path)])
    made = build(config, one_rank()).trainer.model.config
    expected = AudioClassifierConfig(
        **config.model.encoder_settings(), num_classes=3, labels=("bell", "horn", "siren"), multi_label=False
    )
    assert made == replace(expected, activation="sigmoid", drop_path=0.1)
