"""Tables of rows: everyone is in them, in units that fit, within the width of a terminal."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import tables
from bench.rows import Row
from bench.tables import WIDTH, build_tables, device_slug, markdown_tables, text_tables

from .result_rows import CPU, GPU, OPERATORS, SPEEDS, cpu_rows, gpu_rows, operator_rows, step_rows, timed

ROOT = Path(__file__).resolve().parents[2]


def text_of(rows: list[Row], title: str) -> str:
    """The one table whose title starts so."""
    (text,) = [text for name, text in text_tables(rows) if name.startswith(title)]
    return text


def line_of(text: str, group: str, provider: str) -> list[str]:
    """Cells of a provider's line below a group's name."""
    after = text[text.index(f"{group}\n") :].splitlines()[1:]
    (line,) = [line for line in after if line.startswith(f"  {provider} ")][:1]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_every_operator_and_provider_has_a_line():
    text = text_of(cpu_rows(), "operators")
    assert {line.split(",")[0] for line in text.splitlines() if line.strip() and line[0] != " "} == set(OPERATORS)
    providers = [line.strip().split("  ")[0] for line in text.splitlines() if line.startswith("  ")]
    for provider in SPEEDS:
        assert providers.count(provider) == len(OPERATORS) + 3, provider  # attention comes in four sizes
    assert {"sdpa", "timm", "sdpa-flash", "math", "fa2", "fa3", "fa4", "fa9"} <= set(providers)


def test_who_is_absent_or_wrong_is_shown_with_the_reason_and_no_time():
    text = text_of(cpu_rows(), "operators")
    assert text.count("  fa3                  absent: flash-attn is not installed\n") == 4
    assert "  fa9                  wrong: output 0 is off by 1.00e-02, expected at most 1.00e-05\n" in text
    # After those that were timed, whatever the order of the rows.
    assert text.index("  fa2") > text.index("  math")


def test_an_operators_line_has_all_modes():
    text = text_of(cpu_rows(), "operators forward + backward, float32, batch 8, threads 1")
    assert line_of(text, "patch_embed, tokens 103, width 768", "fused") == [
        *("fused", "27.9 ms (26.5 to 30.6)", "2.00x (1.80 to 2.10)", "2.20x", "2.00x"),
        *("30% memory", "20.0 MiB", "10.8 MiB"),
    ]
    assert line_of(text, "patch_embed, tokens 103, width 768", "reference")[2].strip() == "1x"
    heads = [line for line in text.splitlines() if line.startswith(" " * 10)]
    assert heads[-1].split()[-5:] == ["backward", "ceiling", "peak", "saved", "compile"]


def test_a_provider_without_a_whole_has_a_line_for_each_mode():
    rows = [
        row for row in operator_rows(CPU, "float32", 8) if row.task == "mlp" and row.mode in ("forward", "backward")
    ]
    ((_, text),) = text_tables(rows)
    lines = [line.split()[:2] for line in text.splitlines() if line.startswith("  fused  ")]
    assert lines == [["fused", "forward"], ["fused", "backward"]]


@pytest.mark.parametrize("rows", [cpu_rows(), gpu_rows()], ids=["cpu", "gpu"])
def test_lines_fit_a_terminal(rows):
    long = "it does not import: " + "no such thing as this; " * 20
    rows = [*rows, Row("operators", "mlp", "fa7", "reference", absent=long, about=rows[0].about)]
    for title, text in text_tables(rows):
        assert max(map(len, [title, *text.splitlines()])) <= WIDTH
    shown = " ".join(" ".join(text.split()) for _, text in text_tables(rows))
    assert long.strip() in shown


def test_a_step_has_rates_and_its_shares_have_a_table():
    rows = step_rows(CPU | {"threads": 2}, "float32", 2, 9810.0)
    text = text_tables(rows)[0][1]
    assert line_of(text, "ViT-B local", "fused + compile") == [
        *("fused + compile", "4.46 s (4.24 to 4.91)", "2.20x (1.98 to 2.31)", "0.449", "1.46 GiB", "1,000 MiB"),
        *("61.0 s", "55%"),
    ]
    title, shares = text_tables(rows)[1]
    assert title == "steps, float32, batch 2, threads 2: where the time goes"
    assert line_of(shares, "ViT-B local", "fused") == ["fused", "4.91 s", "<1%", "25%", "60%", "5%", "10%"]
    assert "compile" not in shares


def test_columns_that_would_be_empty_are_left_out():
    (fine_tuning,) = [table for table in build_tables(cpu_rows()) if table.title.startswith("fine-tuning")]
    assert fine_tuning.columns == ["median (p20 to p80)", "over fused, all patches", "saved"]


def test_what_sizes_share_stands_in_the_title_and_what_differs_in_the_group():
    front_end = text_of(cpu_rows(), "front end, float32, batch 8, seconds 10")
    assert "log-mel, threads 1\n" in front_end
    assert "log-mel, threads 2\n" in front_end
    batches = [title for title, _ in text_tables(gpu_rows()) if title.startswith("operators forward + backward, bfl")]
    assert batches == [f"operators forward + backward, bfloat16, batch {batch}" for batch in (64, 512)]
    growth = text_of(gpu_rows(), "operators forward + backward by window, bfloat16, batch 8, tokens 512, width 512")
    assert "window_attention, window 16x8\n" in growth


def test_ceilings_that_two_tests_needed_are_shown_once():
    text = text_of(cpu_rows() + cpu_rows()[:2], "ceilings")
    assert text.count("copy, threads 1\n") == 1
    assert line_of(text, "matrix product, float32, threads 2", "torch") == ["torch", "0.610"]


def test_a_title_names_the_device_if_there_are_several():
    both = [title for title, _ in text_tables(step_rows(CPU, "float32", 2, 9.0) + step_rows(GPU, "float32", 2, 9.0))]
    assert both[0].startswith("Some Processor @ 2.5GHz, steps")
    assert both[2].startswith("NVIDIA H200, steps")


def test_rows_of_a_task_come_together():
    rows = [Row("steps", task, "fused", "reference") for task in ("a", "b", "a", "c", "b")]
    assert [row.task for row in tables.together(rows)] == ["a", "a", "b", "b", "c"]


def test_markdown_holds_the_same_cells():
    text, mark = text_tables(cpu_rows()), markdown_tables(cpu_rows())
    assert [title for title, _ in text] == [title for title, _ in mark]
    for (_, plain), (_, table) in zip(text, mark, strict=True):
        cells = {cell.strip() for line in table.splitlines()[2:] for cell in line.split("|") if cell.strip()}
        assert cells
        assert {cell for cell in cells if cell not in plain} == set()


def test_markdown_is_not_broken_by_a_reason():
    row = Row("operators", "mlp", "fa2", "reference", absent="a | b\n  c")
    done = timed(replace(row, provider="fused", absent=None), 1.0, 1.0)
    ((_, table),) = markdown_tables([row, done])
    assert "| absent: a \\| b c |" in table
    assert {line.replace("\\|", "").count("|") for line in table.splitlines()} == {5}


def test_a_table_in_which_everyone_is_absent():
    rows = [Row("operators", "mlp", "fa2", "reference", absent="not here")]
    assert text_tables(rows) == [("operators, float32", "mlp\n  fa2  absent: not here")]
    assert markdown_tables(rows)[0][1].endswith("| mlp | fa2 | absent: not here |")


def test_no_rows_make_no_tables():
    assert text_tables([]) == []


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0.0004, "0.400 µs"), (0.45, "450 µs"), (0.9999, "1,000 µs"), (1.0, "1.00 ms"), (9.998, "10.0 ms"),
        (139.4, "139 ms"), (1000.0, "1.00 s"), (98765.0, "98.8 s"), (5e6, "5,000 s"),
    ],
)  # fmt: skip
def test_times_have_a_unit_that_fits(ms, text):
    assert tables.format_times(ms) == [text]


def test_a_spread_is_in_the_unit_of_the_median():
    row = Row("steps", "x", "fused", "reference", p20_ms=800.0, p50_ms=1200.0, p80_ms=123456.0)
    assert tables.format_time(row) == "1.20 s (0.800 to 123)"
    assert tables.format_time(replace(row, p20_ms=None)) == "1.20 s"
    assert tables.format_time(replace(row, p50_ms=None)) == ""


@pytest.mark.parametrize(
    ("mib", "text"),
    [(None, ""), (0.0, "0 MiB"), (0.03125, "32.0 KiB"), (12.09, "12.1 MiB"), (1023.0, "1,023 MiB"), (3300, "3.22 GiB")],
)
def test_memory_has_a_unit_that_fits(mib, text):
    assert tables.format_mib(mib) == text


def test_facts_are_rates_shares_or_counts():
    facts = {
        "clips/s": 0.2039,
        "waiting for data": 0.021,
        "masks": 0.001,
        "loss": 0.0,
        "workers": 1234,
        "codec": "FLAC",
    }
    shown = [tables.format_fact(name, value) for name, value in facts.items()]
    assert shown == ["0.204", "2%", "<1%", "0%", "1,234", "FLAC"]


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H200", "nvidia-h200"), ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-r-xeon-r-cpu-2-20ghz"), ("x", "x")],
)
def test_a_devices_name_becomes_a_files(name, slug):
    assert device_slug(name) == slug


def test_tables_need_no_torch():
    code = "import sys, bench.tables, bench.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
