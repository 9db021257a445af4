"""The examples of kernels/README.md, run as a reader would."""

import re
import sys
from pathlib import Path

import pytest

from bench import mae_models

TEXT = (Path(__file__).resolve().parents[2] / "kernels" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example {number + 1}" for number in range(len(EXAMPLES))])
def test_example(example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if "transformers" in example:
        pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, "models_mae", mae_models)  # a reader's own copy
    exec(compile(example, "kernels/README.md", "exec"), {})
    if "print(fuse" in example:
        reports = re.findall(r"(\d+) replaced, \d+ left as they are", capsys.readouterr().out)
        assert reports
        assert all(int(replaced) > 0 for replaced in reports)


def test_there_is_an_example_for_each_kind() -> None:
    for name in ("ViTMAE", "models_mae", "timm", "torchvision", "mae_kernels.modules", "linear_masked_mse"):
        assert any(name in example for example in EXAMPLES), name
