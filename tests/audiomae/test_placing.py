import json
import os

from audiomae.data import Manifest
from audiomae.data.preparation.journal import Entry, Journal
from audiomae.data.preparation.placing import Places


def test_places_are_different_and_inside():
    long = "x" * 251
    names = [
        "a.wav", "a.mp3", "a.mp3.wav", "a.wav.flac", "b/../a.wav", "./a.wav", "a", "a.flac/c.wav", "../a.wav", "/a.wav",
        "/etc/../a.wav", "outside/a.wav", "outside/a.mp3", ".prepare/writing/a.wav", "..", "sub/..", "sub/",
        "manifest.csv/a.wav", f"{long}.wav", f"{long}.mp3", f"{long}y.wav", f"{long}/z.wav", "\udcff.wav", "%FF.wav",
        "é.wav", "é.mp3", " .wav", "line\nbreak.wav", "~/a.wav", "a\\b.wav",
    ]  # fmt: skip
    manifest = Manifest(((name, ()) for name in names), root="/data/list")
    places = Places(manifest, ".flac", {".prepare", "manifest.csv"})
    given = {}
    for clip, name in enumerate(names):
        place = places[clip]
        assert os.path.normpath(place) == place
        assert not place.startswith(("/", "..", ".prepare", "manifest.csv/"))
        assert place.endswith(".flac")
        assert all(len(part.encode()) <= 255 for part in place.split("/"))
        given.setdefault(place, []).append(os.path.normpath(os.path.join("/data/list", name)))
    assert all(len(set(sources)) == 1 for sources in given.values())
    folders = {os.path.dirname(place) for place in given}
    assert not folders & given.keys()
    assert places[0] == "a.wav-2.flac"  # a.flac is a folder, a.wav.flac another clip
    assert places[names.index("/a.wav")] == "outside/a.flac"
    assert places[names.index("../a.wav")] == "outside/data/a.flac"
    assert places[names.index(".prepare/writing/a.wav")] == "outside/data/list/.prepare/writing/a.flac"
    assert {places[names.index("\udcff.wav")], places[names.index("%FF.wav")]} == {"%FF.flac", "%FF.wav.flac"}
    assert list(places.first[:6]) == [0, 1, 2, 3, 0, 0]


def test_a_journal_that_was_cut_off(tmp_path):
    first, second = Entry(1, 2, 3, 4, 5, 6), Entry(7, 8, 9, 10, 11, 12)
    journal = Journal(tmp_path)
    assert (len(journal), journal.find("a.flac")) == (0, None)
    journal.add("a.flac", first)
    journal.add("b.flac", second)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    later = Journal(tmp_path)
    assert (len(later), later.find("a.flac"), later.find("b.flac")) == (1, first, None)
    later.add("b.flac", second)
    later.add("a.flac", second)
    older = json.dumps(["a.flac", *first, 0]).encode()  # in another process's file, but older
    path.with_name("journal-z.jsonl").write_bytes(b'\n["a.flac", 1]\n{}\n[1]\nnull\n\xff\n' + older)
    last = Journal(tmp_path)
    assert (last.find("a.flac"), last.find("b.flac"), last.find("")) == (second, second, None)
    assert set(last.places()) == {"a.flac", "b.flac"}
