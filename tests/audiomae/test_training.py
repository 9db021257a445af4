"""Optimiser, schedule, masks, the loop's share of time spent waiting for data, and the state of a run."""

import math
import time
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from audiomae import AudioMAE, AudioMAEConfig, PatchGrid
from audiomae.data import Batch, ClipBatches, Manifest
from audiomae.recipes import PRETRAIN_RECIPES, pretrain_audioset
from audiomae.training import loop
from audiomae.training.config import PretrainConfig
from audiomae.training.distributed import Ranks
from audiomae.training.logging import NullLog
from audiomae.training.optimizer import build_adamw, cosine_lr
from audiomae.training.pretrainer import draw_mask

TINY = AudioMAEConfig(
    spec_size=(64, 32), embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=2, decoder_heads=2
)


def test_learning_rate_rises_then_falls_along_half_a_cosine() -> None:
    schedule = {"total": 320.0, "warmup": 30.0, "peak": 4e-4, "minimum": 1e-6}
    rates = [cosine_lr(step, **schedule) for step in range(321)]
    assert rates[0] == 0
    assert rates[15] == pytest.approx(2e-4)
    assert rates[30] == max(rates) == pytest.approx(4e-4)
    assert rates[175] == pytest.approx((4e-4 + 1e-6) / 2)
    assert rates[320] == pytest.approx(1e-6)
    assert all(a < b for a, b in pairwise(rates[:31]))
    assert all(a > b for a, b in pairwise(rates[30:]))
    halfway = cosine_lr(30 + 290 / 3, **schedule)
    assert halfway == pytest.approx(1e-6 + (4e-4 - 1e-6) * (1 + math.cos(math.pi / 3)) / 2)


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    assert cosine_lr(0, total=10, warmup=0, peak=1.0, minimum=0.0) == 1.0


def test_weight_decay_takes_matrices_and_tokens_and_spares_vectors() -> None:
    model = AudioMAE(TINY)
    optimizer = build_adamw(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    decayed, spared = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for name, parameter in model.named_parameters():
        expected = decayed if name.endswith(("cls_token", "mask_token")) or parameter.dim() >= 2 else spared
        assert id(parameter) in expected, name
    assert len(decayed) + len(spared) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("mask", "kept"),
    [("random", 102), ("time", 12 * 8), ("frequency", 1 * 64), ("time_frequency", 12 * 4)],
)
def test_masks_of_a_run(mask: str, kept: int) -> None:
    config = PretrainConfig(mask=mask, mask_ratio=0.8, mask_ratio_frequency=0.5)  # type: ignore[arg-type]
    assert draw_mask(config, PatchGrid(), torch.arange(3), impl="auto").ids_keep.shape == (3, kept)


@pytest.mark.parametrize("recipe", PRETRAIN_RECIPES)
def test_recipes_build_and_name_themselves(recipe: str) -> None:
    config = PRETRAIN_RECIPES[recipe]("paper")
    assert config.recipe == recipe
    assert config.variant == "paper"


def test_audioset_recipe_has_the_settings_of_the_papers_table_3() -> None:
    config = pretrain_audioset()
    assert (config.base_lr, config.peak_lr, config.min_lr) == (2e-4, 4e-4, 1e-6)
    assert (config.warmup_epochs, config.epochs, config.batch_size) == (3, 32, 512)
    assert (config.betas, config.weight_decay, config.clip_grad) == ((0.9, 0.95), 1e-4, None)
    assert (config.mask, config.mask_ratio, config.clip_seconds, config.gain, config.gain_db) == (
        "random",
        0.8,
        10.0,
        "uniform",
        6.0,
    )
    assert (round(config.model.mean, 3), round(config.model.std, 3)) == (-4.268, 4.569)
    assert config.model == AudioMAEConfig()


def test_released_variant_differs_where_the_code_does() -> None:
    config = pretrain_audioset("released")
    assert (config.epochs, config.min_lr, config.gain) == (33, 0.0, "beta")
    assert (config.model.bias_dropout, config.model.position_grid) == (0.1, "official")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected more than 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0, expected at least 0"),
        ({"clip_grad": 0.0}, "clip_grad is 0.0, expected more than 0"),
        ({"warmup_epochs": 40.0}, "warmup_epochs is 40.0, expected at most the 32 epochs of the run: lower both"),
        ({"max_skipped": 2.0}, "max_skipped is 2.0, expected a share from 0 to 1"),
        ({"skip_nonfinite": -1}, "skip_nonfinite is -1, expected at least 0"),
        ({"hang_timeout": -1.0}, "hang_timeout is -1.0, expected at least 0"),
        ({"save_steps": -1}, "save_steps is -1, expected at least 0"),
        ({"workers": -1}, "workers is -1, expected at least 0"),
        ({"model": AudioMAEConfig(in_channels=3)}, "model.in_channels is 3, expected 1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**settings)  # type: ignore[arg-type]


class Clock:
    """Stands for the time module of the loop, with a time that passes where tests say so."""

    def __init__(self) -> None:
        self.now = 1e3

    def perf_counter(self) -> float:
        return self.now


class Log(NullLog):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def step(self, **values: float) -> None:  # type: ignore[override]
        self.records.append(values)


class SlowLoader:
    """Gives a micro-batch of one clip for each list of clips; starting, and then each of them, takes its time."""

    def __init__(self, batches: ClipBatches, clock: Clock, starting: float, reading: float):
        self.batches, self.clock, self.starting, self.reading = batches, clock, starting, reading

    def __iter__(self):
        self.clock.now += self.starting
        return map(self.read, self.batches)

    def read(self, pairs: list[tuple[int, int]]) -> Batch:
        self.clock.now += self.reading
        return Batch(torch.ones(len(pairs), 1), ())


class SlowTrainer(loop.Trainer):
    """Trains a matrix of one element; the loss of each micro-batch takes its time."""

    clock = Clock()
    computing = 0.0

    def compute_loss(self, data, *, logged):
        self.clock.now += self.computing
        return self.replica(data).mean(), {}

    def visits(self, data):
        return torch.zeros(len(data), 2, dtype=torch.int64)


def make_trainer(config: PretrainConfig, batches: ClipBatches, loader: object) -> SlowTrainer:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    ranks = Ranks(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
    manifest = Manifest([("clip.wav", ())])
    return SlowTrainer(config, ranks, model, model, optimizer, manifest, batches, loader)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("starting", "reading", "computing"), [(0, 0, 2), (8, 0, 2), (0, 3, 2), (8, 3, 2), (8, 3, 0)])
def test_share_of_time_spent_waiting_for_data(
    monkeypatch: pytest.MonkeyPatch, accumulation: int, starting: float, reading: float, computing: float
) -> None:
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(SlowTrainer, "clock", clock)
    monkeypatch.setattr(SlowTrainer, "computing", computing)
    config = PretrainConfig(batch_size=3, accumulation=accumulation, log_every=2)
    batches = ClipBatches(15, 3, splits=accumulation)
    trainer = make_trainer(config, batches, SlowLoader(batches, clock, starting, reading))
    log = Log()
    for epoch in range(2):
        trainer.run_epoch(epoch, log)
        clock.now += 50  # a checkpoint is saved
    # Epochs have 5 steps; every second step is logged, and the last of an epoch: 2, 4, 5 and 6, 8, 10. Each has
    # `accumulation` micro-batches, and in the first one of an epoch the workers start.
    assert [record["step"] for record in log.records] == [2, 4, 5, 6, 8, 10]
    for steps, first, record in zip((2, 2, 1, 1, 2, 2), (1, 0, 0, 1, 0, 0), log.records, strict=True):
        waited = first * starting + steps * accumulation * reading
        seconds = waited + steps * accumulation * computing
        assert record["waiting"] == pytest.approx(waited / seconds, rel=1e-12)
        assert record["clips_per_second"] == pytest.approx(steps * 3 / seconds, rel=1e-12)


class SlowClips:
    """Clips that take 30 ms each."""

    def __getitem__(self, index: tuple[int, int]) -> torch.Tensor:
        time.sleep(0.03)
        return torch.ones(1)


def as_batch(samples: list[torch.Tensor]) -> Batch:
    return Batch(torch.stack(samples), ())


@pytest.mark.parametrize("workers", [0, 1])
def test_waiting_for_a_slow_loader(workers: int) -> None:
    batches = ClipBatches(8, 2)
    clips = SlowClips()
    loader = DataLoader(clips, batch_sampler=batches, collate_fn=as_batch, num_workers=workers)  # type: ignore[arg-type]
    log = Log()
    make_trainer(PretrainConfig(batch_size=2, log_every=1), batches, loader).run_epoch(0, log)
    assert len(log.records) == 4
    assert all(0.5 < record["waiting"] < 1 for record in log.records), log.records


def test_an_epoch_averages_what_steps_give_and_no_more() -> None:
    batches = ClipBatches(4, 2)
    loader = SlowLoader(batches, Clock(), 0, 0)
    result = make_trainer(PretrainConfig(batch_size=2), batches, loader).run_epoch(0, NullLog())
    assert list(result.scalars) == ["gradient_norm"]
