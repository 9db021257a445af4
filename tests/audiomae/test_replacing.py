"""Clips that cannot be read: which others come in their places, and what is told of them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from audiomae.data import (
    Batch,
    ClipBatches,
    ClipDataset,
    ClipError,
    Manifest,
    Replacing,
    Unread,
    collate_visits,
    read_waveform,
)
from audiomae.data.labelled import Augmentation, Example, LabelledClips
from audiomae.data.labels import Labels
from audiomae.seeding import clip_generator

RATE, SAMPLES, CLIPS = 8_000, 400, 12
BROKEN = {
    1: "No such file or directory",
    4: "cannot be read as audio (Format not recognised)",
    5: "silent",
    8: "holds samples that are not finite",
    9: "holds no samples",
}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    draw = np.random.default_rng(0)
    for clip in range(CLIPS):
        sound = draw.uniform(-0.5, 0.5, 300 + 100 * clip).astype(np.float32)
        match BROKEN.get(clip, ""):
            case "silent":
                sound[:] = 0.25
                sound = sound[:SAMPLES]
            case "holds samples that are not finite":
                sound[:] = np.nan
            case "holds no samples":
                sound = sound[:0]
        sf.write(tmp_path / f"{clip}.wav", sound, RATE, subtype="FLOAT")
    (tmp_path / "1.wav").unlink()
    (tmp_path / "4.wav").write_text("this is no sound")
    return Manifest([(f"{clip}.wav", ["ab"[clip % 2]]) for clip in range(CLIPS)], tmp_path)


def crops(manifest: Manifest, seed: int = 3) -> ClipDataset:
    return ClipDataset(manifest, RATE, SAMPLES, seed)


def labelled(manifest: Manifest, augmentation: Augmentation, seed: int = 3) -> LabelledClips:
    classes = Labels(("a", "b"), ("a", "b")).indices(manifest)
    sizes = {"sample_rate": RATE, "samples": SAMPLES, "spec_size": (40, 32)}
    return LabelledClips(manifest, classes, **sizes, augmentation=augmentation, seed=seed)


def candidates(seed: int, epoch: int, clip: int, count: int) -> list[int]:
    draw = clip_generator(seed, epoch, clip, "replacement")
    return [int(draw.integers(CLIPS)) for _ in range(count)]


def test_clips_that_can_be_read_are_left_alone(manifest: Manifest) -> None:
    dataset = crops(manifest)
    clips = Replacing(dataset, 3)
    assert len(clips) == CLIPS
    for clip in set(range(CLIPS)) - BROKEN.keys():
        (waveform, pair), unread = clips[2, clip]
        torch.testing.assert_close(waveform, dataset[2, clip][0], rtol=0, atol=0)
        assert pair.tolist() == [2, clip]
        assert unread == ()


def test_a_replacement_is_drawn_from_seed_epoch_and_clip(manifest: Manifest) -> None:
    clips = Replacing(crops(manifest), 3)
    attempts = set()
    for epoch in range(4):
        for clip in BROKEN:
            met, tried = [clip], candidates(3, epoch, clip, 50)
            while tried[0] in BROKEN:
                met.append(tried.pop(0))
            (waveform, pair), unread = clips[epoch, clip]
            visit = -(100 * (epoch * CLIPS + clip) + len(met))
            assert pair.tolist() == [visit, tried[0]]
            assert unread == tuple(Unread(other, BROKEN[other]) for other in met)
            torch.testing.assert_close(waveform, crops(manifest)[visit, tried[0]][0], rtol=0, atol=0)
            torch.testing.assert_close(clips[epoch, clip][0][0], waveform, rtol=0, atol=0)
            attempts.add(len(met))
    assert attempts > {1, 2}


def test_replacements_have_visits_of_their_own_and_any_clip_alike(manifest: Manifest) -> None:
    clips = Replacing(crops(manifest), 3)
    pairs = [tuple(clips[epoch, clip][0][1].tolist()) for epoch in range(200) for clip in BROKEN]
    assert len({visit for visit, _ in pairs}) == len(pairs)
    assert all(visit < 0 for visit, _ in pairs)
    counts = Counter(clip for _, clip in pairs)
    assert counts.keys() == set(range(CLIPS)) - BROKEN.keys()
    expected = len(pairs) / len(counts)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 22.5  # chi-squared of 6, 1 in 1,000


def test_another_seed_draws_others(manifest: Manifest) -> None:
    drawn = [[Replacing(crops(manifest), seed)[epoch, 1][0][1].tolist() for epoch in range(20)] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_partner_that_cannot_be_read_is_named(manifest: Manifest) -> None:
    dataset = labelled(manifest, Augmentation(mixup=1.0))
    clips = Replacing(dataset, 3)
    seen = set()
    for epoch in range(30):
        draw = clip_generator(3, epoch, 0, "mixup")
        draw.random()
        partner = int(draw.integers(CLIPS))
        example, unread = clips[epoch, 0]
        assert isinstance(example, Example)
        # Silence is a sound here.
        if partner in BROKEN.keys() - {5}:
            assert unread[0] == Unread(partner, BROKEN[partner])
            assert example.pair[0] < 0
            seen.add(partner)
        else:
            assert unread == ()
            assert example.pair.tolist() == [epoch, 0]
        for tensor, expected in zip(example, dataset[tuple(example.pair.tolist())], strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    assert len(seen) > 1


def test_another_crop_of_the_same_clip_can_take_its_place(tmp_path: Path) -> None:
    sound = np.zeros(8_000)
    sound[:2_000] = np.random.default_rng(0).uniform(-0.5, 0.5, 2_000)
    sf.write(tmp_path / "a.wav", sound, RATE)
    clips = Replacing(crops(Manifest([("a.wav", ())], tmp_path)), 3)
    told = [clips[epoch, 0] for epoch in range(20)]
    replaced = [(pair, unread) for (_, pair), unread in told if unread]
    assert 5 < len(replaced) < 20
    assert max(len(unread) for _, unread in replaced) > 1
    for pair, unread in replaced:
        assert pair.tolist()[1] == 0
        assert {clip for clip, _ in unread} == {0}
        assert all(reason.startswith("silent from ") for _, reason in unread)


def test_where_no_clip_can_be_read_the_first_reason_is_told(tmp_path: Path) -> None:
    manifest = Manifest([("a.wav", ()), ("b.wav", ())], tmp_path)
    reason = (
        rf"{tmp_path}/b\.wav: No such file or directory; nor can any of 100 clips that were drawn in its place be read"
    )
    with pytest.raises(ClipError, match=f"^{reason}$") as info:
        Replacing(crops(manifest), 3)[0, 1]
    assert info.value.clip == 1


def test_a_clip_after_99_that_cannot_be_read_is_found(manifest: Manifest) -> None:
    class Seldom:
        def __init__(self, manifest: Manifest, fine: int):
            self.manifest, self.visits, self.fine = manifest, 0, fine

        def __len__(self) -> int:
            return CLIPS

        def __getitem__(self, index: tuple[int, int]) -> int:
            self.visits += 1
            if self.visits < self.fine:
                raise ClipError("no path: bad")  # one that does not know its clip
            return self.visits

    sample, unread = Replacing(Seldom(manifest, 101), 3)[0, 7]
    assert sample == 101
    assert unread == tuple(Unread(clip, "no path: bad") for clip in (7, *candidates(3, 0, 7, 99)))
    with pytest.raises(ClipError, match="no path: bad; nor can any of 100 clips"):
        Replacing(Seldom(manifest, 102), 3)[0, 7]


def test_other_errors_are_not_caught(manifest: Manifest) -> None:
    clips = Replacing(crops(manifest), 3)
    with pytest.raises(IndexError):
        clips[0, CLIPS]
    with pytest.raises(TypeError, match=r"drawn by \(epoch, clip\)"):
        clips[3]  # type: ignore[index]


@pytest.mark.parametrize("kind", ["crops", "labelled"])
def test_workers_ranks_and_batch_sizes_give_the_same(manifest: Manifest, kind: str) -> None:
    clips: Replacing = Replacing(
        crops(manifest) if kind == "crops" else labelled(manifest, Augmentation(roll=True, mixup=0.5)), 3
    )

    def epochs(workers: int, world_size: int, splits: int) -> tuple[dict[int, torch.Tensor], list[Unread]]:
        """The samples of two epochs by their place, and all that could not be read."""
        found, unread = {}, []
        for rank in range(world_size):
            batches = ClipBatches(CLIPS, 6, seed=3, rank=rank, world_size=world_size, splits=splits)
            loader = DataLoader(
                clips,
                batch_sampler=batches,
                num_workers=workers,
                persistent_workers=workers > 0,
                collate_fn=collate_visits,
            )
            for epoch in range(2):
                batches.set_epoch(epoch)
                place = 0
                for batch in loader:
                    assert isinstance(batch, Batch)
                    unread += batch.unread
                    waveform, pairs = (batch.data[0], batch.data[-1])
                    assert len(waveform) == len(pairs) == 6 // world_size // splits
                    for row, pair in zip(waveform, pairs.tolist(), strict=True):
                        step, within = divmod(place, 6 // world_size)
                        found[epoch * 100 + step * 6 + rank * 6 // world_size + within] = torch.cat(
                            [torch.tensor(pair, dtype=torch.float32), row]
                        )
                        place += 1
        return found, sorted(unread)

    expected, unread = epochs(0, 1, 1)
    assert len(expected) == 2 * CLIPS
    assert {clip for clip, _ in unread} == BROKEN.keys() - ({5} if kind == "labelled" else set())
    for other in ((2, 1, 1), (0, 2, 1), (1, 1, 3)):
        found, met = epochs(*other)
        assert met == unread
        assert found.keys() == expected.keys()
        for place, sample in expected.items():
            torch.testing.assert_close(found[place], sample, rtol=0, atol=0)


def test_batches_of_examples_keep_their_names(manifest: Manifest) -> None:
    clips = Replacing(labelled(manifest, Augmentation()), 3)
    batch = collate_visits([clips[0, 0], clips[0, 1], clips[0, 4]])
    assert isinstance(batch.data, Example)
    assert batch.data.waveform.shape == (3, SAMPLES)
    assert [clip for clip, _ in batch.unread if clip in (1, 4)][:1] == [1]
    expected = read_waveform(manifest.path(0), RATE)
    torch.testing.assert_close(batch.data.waveform[0, : len(expected)], expected, rtol=0, atol=0)


def test_a_batch_can_be_pinned(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    clips = Replacing(crops(manifest), 3)
    batch = collate_visits([clips[0, 0], clips[0, 1]])
    copy = pin_memory(batch)
    assert type(copy) is Batch
    assert len(pinned) == 2
    assert copy.unread == batch.unread
    assert type(copy.unread[0]) is Unread
