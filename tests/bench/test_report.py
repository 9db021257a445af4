"""From files of rows to pages, plots, the README's section and the costs."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bench import plots, report
from bench.cost import cost_page
from bench.readme import drop_in_section, fill, performance_section
from bench.rows import Row, write_rows
from bench.tables import build_tables

from .result_rows import CPU, GPU, ceiling_rows, cpu_rows, gpu_rows, growth_rows, operator_rows, step_rows, timed

ROOT = Path(__file__).resolve().parents[2]
FEW = ("random_mask", "flash_attention", "mlp", "window_attention")
LOADER = Row("loader", "MP3", "ClipDataset", "libsndfile", absent="no decoder", about=CPU)
README = "# Title\r\n\r\nbefore | \u00b5\r\n<!-- performance -->\r\nold 12.3 ms\r\n<!-- /performance -->\r\nafter\n"


def few(rows: list[Row]) -> list[Row]:
    """Without most operators, and most sizes of attention, which take long to draw."""
    return [
        row for row in rows if row.suite != "operators" or (row.task in FEW and row.shape["tokens"] not in (221, 307))
    ]


def slower(rows: list[Row], task: str, by: float) -> list[Row]:
    """Another run, in which the ratios of a task's whole are other ones."""
    return [
        timed(row, row.p50_ms or 0, (row.ratio or 1) * by) if row.task == task and row.mode in ("both", "all") else row
        for row in rows
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two runs of a processor and one of a GPU, drawn."""
    folder = tmp_path_factory.mktemp("report")
    write_rows(folder / "first.json", few(cpu_rows()))
    write_rows(folder / "again.json", [*slower(few(cpu_rows()), "mlp", 1.5), LOADER])
    gpu = [row for row in few(gpu_rows()) if row.suite != "operators" or row.shape["batch"] != 64]
    write_rows(folder / "gpu.json", [row for row in gpu if row.suite != "steps" and row.task != "flash_attention"])
    (folder / "README.md").write_bytes(README.encode())
    (folder / "docs/benchmarks/nvidia-h200").mkdir(parents=True)
    (folder / "docs/benchmarks/nvidia-h200/stale.png").touch()
    names = [folder / name for name in ("first.json", "again.json", "gpu.json")]
    report.write_report(names, folder / "docs", [folder / "README.md"])
    return folder


def test_pages_hold_everyone_and_every_plot_is_a_picture(folder):
    for slug, count in {"some-processor-2-5ghz": 5, "nvidia-h200": 5}.items():
        page = (folder / f"docs/benchmarks/{slug}.md").read_text()
        for provider in ("reference + compile", "fused + compile", "sdpa", "fa9", "timm", "ClipDataset", "torchaudio"):
            assert f"| {provider} |" in page, provider
        assert "| wrong: output 0 is off by 1.00e-02, expected at most 1.00e-05 |" in page
        pictures = re.findall(r"!\[(.+)\]\((.+)\)", page)
        assert len(pictures) == count
        assert {path for _, path in pictures} == {
            f"{slug}/{path.name}" for path in (folder / f"docs/benchmarks/{slug}").iterdir()
        }
        for _, path in pictures:
            picture = Image.open(folder / "docs/benchmarks" / path).convert("RGB")
            assert min(picture.size) > 250
            darkest, brightest = picture.convert("L").getextrema()
            assert darkest < 50
            assert brightest == 255


def test_a_page_tells_how_and_with_what(folder):
    page = (folder / "docs/benchmarks/some-processor-2-5ghz.md").read_text()
    assert "| `first.json` | cores 2, threads 1 and 2, python 3.12.3, torch 2.11.0" in page
    assert "commit abc1234, date 2026-11-26" in page
    assert "Rounds: operators 15, steps 15" in page
    assert "`share of ceiling` is" in page
    assert "|  | fa3 | absent: flash-attn is not installed |" in page
    # What the first file lacks comes from the second.
    assert "| MP3, threads 1 | ClipDataset | absent: no decoder |" in page


def test_a_page_tells_which_ratios_a_second_run_reproduces(folder):
    page = (folder / "docs/benchmarks/some-processor-2-5ghz.md").read_text()
    ratios = [row for row in few(cpu_rows()) if row.ratio and row.provider != row.baseline]
    outside = 3  # mlp's by three providers
    assert f"Of {len(ratios)} ratios, {len(ratios) - outside} reproduce within their spread" in page
    assert f"Of the other {outside}, the spreads of 0 overlap." in page
    sizes = "batch 8, tokens 103, width 768, threads 1"
    line = f"| operators: mlp, {sizes} | fused | both | 2.00x (1.80 to 2.10) | 3.00x (2.70 to 3.15) | apart |"
    assert line in page
    assert "Runs against each other" not in (folder / "docs/benchmarks/nvidia-h200.md").read_text()


def test_runs_that_agree_have_no_table():
    rows = step_rows(CPU, "float32", 2, 9.0)
    device = report.Device("x", {Path("a"): rows, Path("b"): slower(rows, "ViT-B local", 1.04)})
    text = report.agreement(device)
    assert text.startswith("Of 3 ratios, 3 reproduce within their spread")
    assert "|" not in text
    wide = report.Device("x", {Path("a"): rows, Path("b"): slower(rows, "ViT-B local", 1.07)})
    assert "Of 3 ratios, 0 reproduce" in report.agreement(wide)
    assert "Of the other 3, the spreads of 3 overlap." in report.agreement(wide)
    half = report.Device("x", {Path("a"): rows, Path("b"): slower(rows, "ViT-B local", 0.5)})
    assert "Of 3 ratios, 0 reproduce" in report.agreement(half)
    assert "the spreads of 0 overlap." in report.agreement(half)
    apart = report.Device("x", {Path("a"): rows, Path("b"): step_rows(CPU, "float32", 4, 9.0)})
    assert report.agreement(apart) == "The files have no ratio in common."


def test_threads_of_a_processor_are_not_compared_with_others():
    rows, two = step_rows(CPU, "float32", 2, 9.0), step_rows(CPU | {"threads": 2}, "float32", 2, 9.0)
    assert report.Device("x", {Path("a"): rows, Path("b"): two}).repeated() == []
    rows, two = step_rows(GPU, "float32", 2, 9.0), step_rows(GPU | {"threads": 2}, "float32", 2, 9.0)
    assert len(report.Device("x", {Path("a"): rows, Path("b"): two}).repeated()) == 3


def test_an_old_plot_is_removed_and_the_index_lists_the_devices(folder):
    assert not (folder / "docs/benchmarks/nvidia-h200/stale.png").exists()
    index = (folder / "docs/benchmarks/README.md").read_text()
    assert "| [NVIDIA H200](nvidia-h200.md) | ceilings, operators, fine-tuning, " in index
    assert "| [Some Processor @ 2.5GHz](some-processor-2-5ghz.md) |" in index


def test_only_what_stands_between_the_markers_is_replaced(folder):
    text = (folder / "README.md").read_bytes().decode()
    before, after = README.split("\r\nold 12.3 ms\r\n")
    assert text.startswith(f"{before}\nProviders take turns")
    assert text.endswith(f"README.md`.\n{after}")
    assert "old 12.3 ms" not in text
    again = fill(text, {"performance": "new"}, "README.md")
    assert fill(again, {"performance": "new"}, "README.md") == again


def test_the_readme_has_the_figures(folder):
    text = (folder / "README.md").read_text()
    for line in (
        "| fused | 4.91 s (4.66 to 5.40) | 2.00x (1.80 to 2.10) | 1.60x | 0.408 | 50% | 1.61 GiB | 1.07 GiB |",
        "| `random_mask`, tokens 512 | 450 µs (428 to 495) | 360 µs (342 to 396) | 225 µs (214 to 248) "
        "| 2.00x (1.80 to 2.10) | 1.60x |",
        "| fine-tuning: ViT-B, batch 2, threads 2, float32 | fused, masked 0.3/0.3 | 1.00 s (0.950 to 1.10) |  "
        "| fused, all patches: 2.60 s (2.47 to 2.86) | 2.60x (2.34 to 2.73) |",
        "| loader: FLAC, clips 64, threads 2, float32 | ClipDataset | 64.0 ms (60.8 to 70.4) | 1,000 "
        "| libsndfile: 77.0 ms (73.2 to 84.7) | 1.20x (1.08 to 1.26) |",
        "Training loop, demo, threads 2: waiting for data 2%, workers 2.",
    ):
        assert line in text, line
    flat = " ".join(text.split())
    assert "[Some Processor @ 2.5GHz](docs/benchmarks/some-processor-2-5ghz.md)" in flat
    assert "cost](docs/cost.md)" in flat
    assert "`pytest bench/ --benchmark-only`: cores 2, threads 1 and 2, python 3.12.3, torch 2.11.0" in flat
    assert f"--out {folder.as_posix()}/docs --readme {folder.as_posix()}/README.md`" in flat
    # The GPU's table is of the largest batch.
    assert "forward + backward, batch 512, bfloat16 |" in text
    assert "fused over reference + compile (quotient of medians)" in text


def test_the_readme_says_who_is_wrong_or_absent():
    rows = [row for row in operator_rows(CPU, "float32", 8) if row.task == "mlp" and row.provider != "fa9"]
    shape = rows[0].shape
    gone = [
        Row("operators", "mlp", name, "reference", shape=shape, about=CPU, **{how: "a reason"})
        for name, how in {"fused": "wrong", "reference + compile": "absent"}.items()
    ]
    left = [row for row in rows if row.provider == "reference"]
    section = performance_section({"x": left + gone}, {"x": "x.md"}, "cost.md", "made by hand")
    line = next(line for line in section.splitlines() if line.startswith("| `mlp`"))
    assert line == "| `mlp`, tokens 103, width 768 | 158 ms (150 to 174) | absent | wrong |  |  |"


def test_the_command_of_a_run_is_told_if_it_is_known():
    rows = step_rows(CPU | {"command": "python -m bench.gpu --out x"}, "float32", 2, 9.0)
    section = performance_section({"x": rows}, {"x": "x.md"}, "cost.md", "made")
    assert "`python -m bench.gpu --out x`: cores 2," in section
    assert "command" not in section.replace("`python", "")


def test_hours_are_those_computed_by_hand():
    page = cost_page([*step_rows(GPU, "bfloat16", 64, 80.0), *step_rows(CPU, "float32", 2, 9810.0)])
    # 1,981,000 clips x 32 epochs / 64 clips x 0.040 s / 3,600 = 11.006 h; by 8 1.376, by 64 0.172; at 0.038 s 10.455.
    assert "| NVIDIA H200 | fused | bfloat16, batch 64 | 40.0 ms | 1,600 | 11.0 (10.5 to 12.1) | 1.38 | 0.172 |" in page
    # 63,392,000 / 2 x 9.81 / 3,600 = 86,372 h.
    assert "| reference | float32, batch 2, threads 1 | 9.81 s | 0.204 | 86,372 (82,053 to 95,009) | 10,796 |" in page
    assert "2,304 V100-hours" in page
    assert "hours on 64, if linear" in page
    assert "This is assumed, not measured" in page
    assert "The loader is not measured." in page
    assert "No GPU is measured" not in page


def test_the_cost_page_tells_what_it_lacks():
    page = cost_page([*step_rows(CPU, "float32", 2, 9810.0), *[r for r in cpu_rows() if r.suite == "loader"]])
    assert "**No GPU is measured.**" in page
    assert "clips/s: WAV 1,000 (clips 64, threads 2); FLAC 1,000 (clips 64, threads 2)." in page
    assert "No training step is measured." in cost_page([])
    wrong = replace(step_rows(GPU, "bfloat16", 64, 80.0)[2], p50_ms=None, wrong="loss is off")
    assert "| NVIDIA H200 | fused | bfloat16, batch 64 | wrong: loss is off |" in cost_page([wrong])


def test_a_provider_looks_the_same_everywhere_and_unlike_the_others():
    assert len(set(plots.STYLES.values())) == len(plots.STYLES)
    assert plots.style_of("fused")["color"] == "#0072B2"
    assert plots.style_of("xformers") == plots.style_of("xformers")
    known = set(plots.STYLES.values())
    assert (plots.style_of("xformers")["color"], plots.style_of("xformers")["marker"]) not in known


def test_a_ceiling_is_one_of_the_same_conditions():
    rows = [
        *ceiling_rows(CPU, "float32", 9.0, 0.1),
        *ceiling_rows(CPU | {"threads": 2}, "float32", 14.0, 0.2),
        *ceiling_rows(CPU, "bfloat16", 9.0, 0.3),
    ]
    two = Row("operators", "mlp", "fused", "reference", about=CPU | {"threads": 2})
    assert plots.find_ceiling(rows, "GB/s", two) == 14.0
    assert plots.find_ceiling(rows, "TFLOP/s", two) == 0.2
    assert plots.find_ceiling(rows, "TFLOP/s", replace(two, dtype="bfloat16")) is None
    one = replace(two, about=CPU, dtype="bfloat16")
    assert plots.find_ceiling(rows, "TFLOP/s", one) == 0.3


def test_growth_takes_in_the_main_rows_that_belong_to_it():
    main = [row for row in operator_rows(CPU, "float32", 8) if row.task in ("mlp", "window_attention")]
    series = [row for row in growth_rows(CPU, "float32", 1.0) if row.task in ("mlp", "window_attention")]
    by_batch = [row for row in series if row.varies == "batch"]
    figure = plots.growth_figure(by_batch, "batch", main + series)
    lines = {axis.get_title(): [line.get_xdata().tolist() for line in axis.lines] for axis in figure.axes if axis.lines}
    sizes = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert lines == {"mlp": [sizes, sizes], "window_attention": [sizes, sizes]}
    by_window = [row for row in series if row.varies == "window"]
    figure = plots.growth_figure(by_window, "window", main + series)
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [[4.0, 16.0, 32.0, 64.0, 128.0]] * 2


def test_what_was_not_measured_is_not_drawn():
    absent = [Row("operators", "mlp", "fa2", "reference", absent="not here", about=CPU)]
    only = [row for row in operator_rows(CPU, "float32", 8) if row.provider == "reference" and row.task == "mlp"]
    bare = [replace(row, peak_mib=None, saved_mib=None, tflop_per_s=None, gb_per_s=None) for row in only]
    for rows in (absent, bare, [r for r in cpu_rows() if r.suite == "training loop"]):
        assert list(plots.draw(build_tables(rows)[0].rows, rows)) == []


def test_unusable_files_are_told_in_a_line(tmp_path, monkeypatch):
    good, odd, empty = tmp_path / "good.json", tmp_path / "odd.json", tmp_path / "empty.json"
    write_rows(good, step_rows(CPU, "float32", 2, 9.0))
    odd.write_text('{"suite": "steps"}')
    empty.write_text("[]")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- /performance -->\n<!-- performance -->\n")
    for arguments, message in (
        (
            [tmp_path / "no.json"],
            f"{tmp_path}/no.json is no file, expected rows of results, as pytest bench/ writes them",
        ),
        ([odd], f"{odd} holds no rows of results, as pytest bench/ writes them: "),
        ([empty], f"{empty} holds no rows of results, expected at least one"),
        ([good, good], f"{good} is given twice, expected another run"),
        (
            [good, "--readme", readme],
            f"{readme} has not <!-- performance --> once and <!-- /performance --> once after it, expected both around",
        ),
        ([good, "--readme", tmp_path / "none.md"], "[Errno 2] No such file or directory: "),
        ([good, "--out", good], "[Errno 20] Not a directory: "),
    ):
        out = [] if "--out" in arguments else ["--out", tmp_path / "docs"]
        monkeypatch.setattr(sys, "argv", ["report", *map(str, [*arguments, *out])])
        with pytest.raises(SystemExit) as error:
            report.main()
        assert str(error.value).startswith(f"bench.report: {message}")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize(
    "text",
    [
        "<!-- performance -->", "<!-- /performance -->",
        "<!-- performance --><!-- /performance --><!-- performance --><!-- /performance -->",
        "<!-- /performance --><!-- performance --><!-- /performance -->",
    ],
)  # fmt: skip
def test_markers_stand_once_each_and_in_order(text):
    with pytest.raises(ValueError, match="expected both around the figures"):
        fill(text, {"performance": "new"}, "README.md")


def test_a_text_without_any_markers():
    with pytest.raises(ValueError, match=r"README\.md has no <!-- performance --> or <!-- drop-in -->"):
        fill("text", {"performance": "new", "drop-in": "new"}, "README.md")


def test_a_section_is_put_where_its_markers_are():
    text = "a<!-- drop-in -->b<!-- /drop-in -->c"
    assert fill(text, {"performance": "x", "drop-in": "y"}, "") == "a<!-- drop-in -->\ny\n<!-- /drop-in -->c"


def test_the_drop_in_section_has_before_and_after():
    def row(provider, **fields):
        about = {"device": "x", "threads": 2}
        return Row("drop-in", "Swin", provider, "original", shape={"batch": 2}, about=about, **fields)

    original = row("original", p50_ms=20.0, ratio=1.0, peak_mib=100.0, saved_mib=60.0, error=1e-6)
    facts = {"modules replaced": 3}
    fused = row("fused", p50_ms=10.0, ratio=2.0, peak_mib=50.0, saved_mib=20.0, error=2e-6, facts=facts)
    absent = Row("drop-in", "ViTMAE", "fused", "original", shape={"batch": 2}, absent="transformers is not installed")
    section = drop_in_section({"x": [original, fused, absent], "y": []}, "made")
    line = "| Swin, batch 2, float32 | 20.0 ms | 10.0 ms | 2.00x | 100 MiB to 50.0 MiB | 60.0 MiB to 20.0 MiB | "
    assert line + "1.0e-06 to 2.0e-06 | 3 |" in section
    assert "| ViTMAE |  | transformers is not installed |" in section
    assert "Written by `made`" in section


def test_the_command_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "a.json", [row for row in cpu_rows() if row.suite == "loader"])
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "a.json"), "--out", str(tmp_path / "docs")])
    report.main()
    names = ["benchmarks/some-processor-2-5ghz.md", "benchmarks/README.md", "cost.md"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "docs" / name) for name in names]


def test_the_projects_own_readme_has_the_markers():
    text = (ROOT / "README.md").read_text()
    assert fill(text, {"performance": "new"}, "README.md") != text
