"""The arrows between the parts, read from the source without importing it.

A rule is a function from an :class:`ImportGraph` to its violations, one line each: ``file:line: importer imports
target: reason``. The repository must violate none; small synthetic projects show that each rule can fail.
"""

import ast
import graphlib
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"audiomae": "audiomae", "mae_kernels": "kernels/mae_kernels", "bench": "bench", "tests": "tests"}
PYPROJECTS = {"audiomae": "pyproject.toml", "mae_kernels": "kernels/pyproject.toml"}
MAX_LINES = 450


def in_audiomae(names: str) -> tuple[str, ...]:
    return tuple(f"audiomae.{name}" for name in names.split())


ENTRY_POINTS = in_audiomae(
    "pretrain finetune evaluate extract predict reconstruct export data.check data.stats data.prepare"
)
MODEL_SIDE = in_audiomae(
    "config grid masking positions encoder decoder model classifier frontend windows embedding hub checkpoints"
)
MODELS = in_audiomae("encoder decoder model classifier embedding hub checkpoints")

# (importers, what they must not import, why); a name stands for the module and everything below it
ARROWS = [
    (("mae_kernels",), ("audiomae", "bench", "tests"), "mae_kernels stands alone"),
    (("mae_kernels.ops",), ("mae_kernels.modules", "mae_kernels.patching"), "operators are below modules"),
    (("audiomae",), ("bench", "tests"), "the package knows neither its benchmarks nor its tests"),
    (("audiomae",), ENTRY_POINTS, "entry points are leaves"),
    (MODEL_SIDE, in_audiomae("data training recipes"), "a model knows nothing of its training"),
    (in_audiomae("data"), (*MODELS, *in_audiomae("training recipes")), "data knows no model"),
    (in_audiomae("training"), in_audiomae("recipes"), "the loop is given its settings"),
    (("bench",), ("tests",), "benchmarks do not lean on tests"),
]

# What mae_kernels uses where it is found (triton comes with PyTorch) and loads at an operator's first call only,
# so that these can be loaded everywhere.
OPTIONAL = ("triton", "flash_attn", "flash_attn_interface")
EXTRAS = ("export", "parquet")
LOADABLE = ("mae_kernels", "mae_kernels.modules", "mae_kernels.patching")


@dataclass(frozen=True)
class Import:
    """One module's import of another; ``lazy`` if loading the importer does not execute it."""

    path: Path
    line: int
    importer: str
    target: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.path.as_posix()}:{self.line}: {self.importer} imports {self.target}"


@dataclass(frozen=True)
class ImportGraph:
    root: Path
    modules: dict[str, Path]
    imports: list[Import]


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def walk(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield the nodes below ``node``, each with whether it is left out when the module is loaded."""
    for child in ast.iter_child_nodes(node):
        yield child, lazy
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        )
        yield from walk(child, lazy or deferred)


def written_imports(path: Path, package: str) -> Iterator[tuple[int, str, str | None, bool]]:
    """Yield ``(line, module, name, lazy)``, with ``name`` None for a whole module and relative modules resolved."""

    def absolute(level: int, module: str) -> str:
        if level == 0:
            return module
        parents = package.split(".")
        return ".".join([*parents[: len(parents) - level + 1], *([module] if module else [])])

    for node, lazy in walk(ast.parse(path.read_text(), filename=str(path))):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name, None, lazy
            case ast.ImportFrom(module=module, names=names, level=level):
                for alias in names:
                    yield node.lineno, absolute(level, module or ""), alias.name, lazy
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                name = module.lstrip(".")
                yield node.lineno, absolute(len(module) - len(name), name), None, lazy


def read_graph(root: Path) -> ImportGraph:
    """Read all modules of ``FOLDERS``; a name imported through a package counts for the module that it comes from."""
    modules = {
        ".".join([name, *path.relative_to(root / folder).with_suffix("").parts]).removesuffix(".__init__"): path
        for name, folder in FOLDERS.items()
        for path in sorted((root / folder).rglob("*.py"))
    }
    written = {}
    exports: dict[str, dict[str, str]] = {}
    for module, path in modules.items():
        is_package = path.name == "__init__.py"
        written[module] = list(written_imports(path, module if is_package else module.rpartition(".")[0]))
        if is_package:
            exports[module] = {name: origin for _, origin, name, _ in written[module] if name}

    def targets(module: str, name: str | None) -> Iterator[str]:
        if name and f"{module}.{name}" in modules:
            yield f"{module}.{name}"
            return
        yield module
        for exported, origin in exports.get(module, {}).items():
            if name in (None, "*", exported) and origin != module:
                yield from targets(origin, exported)

    imports = [
        Import(modules[importer].relative_to(root), line, importer, target, lazy)
        for importer, found in written.items()
        for line, module, name, lazy in found
        for target in targets(module, name)
    ]
    return ImportGraph(root, modules, imports)


def wrong_arrows(graph: ImportGraph) -> list[str]:
    return [
        f"{found}: {reason}"
        for found in graph.imports
        for importers, forbidden, reason in ARROWS
        if within(found.importer, importers) and within(found.target, forbidden)
    ]


def cycles(graph: ImportGraph) -> list[str]:
    """Return the imports of one cycle, if there is any; a lazy import closes a cycle like any other."""
    edges = {
        (found.importer, found.target): found
        for found in graph.imports
        if within(found.importer, tuple(PYPROJECTS)) and found.target in graph.modules
    }
    sorter = graphlib.TopologicalSorter[str]()
    for importer, target in edges:
        if importer != target:
            sorter.add(importer, target)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        imported_first = error.args[1]
        return [f"{edges[importer, target]}: one of a cycle" for target, importer in itertools.pairwise(imported_first)]
    return []


def eager_optional(graph: ImportGraph) -> list[str]:
    """Return the imports of ``OPTIONAL`` that are executed when one of ``LOADABLE`` is loaded."""
    eager: dict[str, list[Import]] = {}
    for found in graph.imports:
        if not found.lazy:
            eager.setdefault(found.importer, []).append(found)
    errors = []
    reached = {module: f"import {module}" for module in LOADABLE if module in graph.modules}
    queue = list(reached)
    for module in queue:
        for found in eager.get(module, []):
            if within(found.target, OPTIONAL):
                errors.append(f"{found}: executed by {reached[module]}")
            # Loading a.b loads a, too.
            for target in itertools.accumulate(found.target.split("."), "{}.{}".format):
                if target in graph.modules and target not in reached:
                    reached[target] = f"{found.path.as_posix()}:{found.line}"
                    queue.append(target)
    return errors


def undeclared(graph: ImportGraph) -> list[str]:
    """Return the third-party imports whose distribution is missing from the dependencies.

    What an extra of users' brings (``EXTRAS``) may be imported where it is used, not when a module is loaded.
    """
    distributions = packages_distributions()

    def normalize(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    errors = []
    for package, pyproject in PYPROJECTS.items():
        project = tomllib.loads((graph.root / pyproject).read_text())["project"]
        optional = project.get("optional-dependencies", {})
        declared = {normalize(re.split(r"[^\w.-]", requirement)[0]) for requirement in project["dependencies"]}
        extras = {
            normalize(re.split(r"[^\w.-]", requirement)[0])
            for extra in EXTRAS
            for requirement in optional.get(extra, [])
        }
        for found in graph.imports:
            name = found.target.partition(".")[0]
            if not within(found.importer, (package,)) or name == package or name in sys.stdlib_module_names:
                continue
            candidates = {normalize(candidate) for candidate in [name, *distributions.get(name, [])]}
            allowed = declared | extras if found.lazy else declared
            if not candidates & allowed and not (package == "mae_kernels" and name in OPTIONAL):
                errors.append(f"{found}: not in the dependencies of {pyproject}")
    return errors


def too_long(graph: ImportGraph) -> list[str]:
    lengths = {path: len(path.read_text().splitlines()) for path in graph.modules.values()}
    return [
        f"{path.relative_to(graph.root).as_posix()}:{length}: more than {MAX_LINES} lines"
        for path, length in lengths.items()
        if length > MAX_LINES
    ]


RULES = [wrong_arrows, cycles, eager_optional, undeclared, too_long]


@pytest.fixture(scope="module")
def repository() -> ImportGraph:
    graph = read_graph(ROOT)
    # The rules hold for an empty graph, too.
    assert {"audiomae", "mae_kernels", "tests.test_layering"} <= graph.modules.keys()
    assert any(found.target.startswith("mae_kernels.ops.") for found in graph.imports)
    return graph


@pytest.mark.parametrize("rule", RULES)
def test_repository(repository: ImportGraph, rule: Callable[[ImportGraph], list[str]]):
    errors = rule(repository)
    assert not errors, "\n" + "\n".join(errors)


def test_import_touches_no_device(repository: ImportGraph):
    """Loading mae_kernels loads neither triton nor audiomae and asks nothing of a GPU, also where there is one."""
    modules = [module for module in LOADABLE if module in repository.modules]
    script = f"""
import importlib, sys
import torch

def refuse(*args, **kwargs):
    raise AssertionError("asked for the device")

for name in ("_lazy_init", "is_available", "device_count", "current_device", "get_device_properties",
             "get_device_capability", "get_device_name"):
    assert hasattr(torch.cuda, name), name
    setattr(torch.cuda, name, refuse)
for module in {modules}:
    importlib.import_module(module)
loaded = sorted(m for m in sys.modules if m.partition(".")[0] in ("triton", "audiomae"))
assert not loaded, loaded
assert not torch.cuda.is_initialized()
"""
    kernels = ROOT / "kernels"  # the working directory comes first on the path
    result = subprocess.run([sys.executable, "-c", script], cwd=kernels, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


CLEAN = {
    "pyproject.toml": '[project]\ndependencies = ["mae-kernels", "torch>=2", "huggingface_hub>=0.1"]',
    "kernels/pyproject.toml": '[project]\ndependencies = ["torch>=2"]',
    "kernels/mae_kernels/__init__.py": "from mae_kernels.ops.norm import norm",
    "kernels/mae_kernels/ops/__init__.py": "",
    "kernels/mae_kernels/ops/norm.py": "import torch\ndef norm():\n    from . import norm_triton",
    "kernels/mae_kernels/ops/norm_triton.py": "import triton.language as tl\nfrom .tiles import size",
    "kernels/mae_kernels/ops/tiles.py": "from triton import jit\nsize = 1",
    "audiomae/__init__.py": "from audiomae.model import AudioMAE",
    "audiomae/model.py": "import math\nfrom mae_kernels import norm\nclass AudioMAE: ...",
    "audiomae/database.py": '"""import audiomae.training"""\nimport huggingface_hub',
    "audiomae/encoder.py": "from audiomae.database import x",
    "audiomae/data/__init__.py": "from . import clips",
    "audiomae/data/clips.py": "",
    "audiomae/training/__init__.py": "",
    "audiomae/recipes.py": "from audiomae.training import loop\nfrom .model import AudioMAE",
    "audiomae/pretrain.py": "from audiomae import AudioMAE, recipes",
    "tests/test_model.py": "import audiomae, triton\nfrom .helpers import y",
    "tests/helpers.py": "",
}


def synthetic(root: Path, files: dict[str, str]) -> ImportGraph:
    for name, source in {**CLEAN, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read_graph(root)


@pytest.mark.parametrize("rule", RULES)
def test_rules_pass_a_clean_project(tmp_path: Path, rule: Callable[[ImportGraph], list[str]]):
    assert rule(synthetic(tmp_path, {})) == []


OP = "kernels/mae_kernels/ops/norm.py"


@pytest.mark.parametrize(
    ("rule", "file", "source", "error"),
    [
        (wrong_arrows, OP, "\nimport audiomae", f"{OP}:2: mae_kernels.ops.norm imports audiomae:"),
        (wrong_arrows, OP, "from ..patching import fuse", "mae_kernels.ops.norm imports mae_kernels.patching:"),
        (wrong_arrows, OP, "def f():\n  import bench.timing", f"{OP}:2: mae_kernels.ops.norm imports bench.timing:"),
        (wrong_arrows, "audiomae/model.py", "import tests", "audiomae/model.py:1: audiomae.model imports tests:"),
        (wrong_arrows, "audiomae/model.py", "from . import pretrain", "audiomae.model imports audiomae.pretrain:"),
        (wrong_arrows, "audiomae/finetune.py", "import audiomae.pretrain", "imports audiomae.pretrain: entry points"),
        (wrong_arrows, "audiomae/grid.py", "from .data.clips import read", "audiomae.grid imports audiomae.data.clips"),
        (wrong_arrows, "audiomae/data/read.py", "from .. import AudioMAE", "audiomae.data.read imports audiomae.model"),
        (wrong_arrows, "audiomae/data/read.py", "import audiomae", "audiomae.data.read imports audiomae.model:"),
        (wrong_arrows, "audiomae/training/loop.py", "from ..recipes import demo", "loop imports audiomae.recipes:"),
        (wrong_arrows, "audiomae/training/loop.py", 'import_module("..recipes")', "loop imports audiomae.recipes:"),
        (cycles, "audiomae/model.py", "from audiomae import x", "audiomae.model imports audiomae: one of a cycle"),
        (cycles, OP, "def f():\n  import mae_kernels", f"{OP}:2: mae_kernels.ops.norm imports mae_kernels: one of"),
        (eager_optional, OP, "import triton", "imports triton: executed by kernels/mae_kernels/__init__.py:1"),
        (eager_optional, OP, "from . import norm_triton", f"norm_triton imports triton.language: executed by {OP}:1"),
        (eager_optional, OP, "try:\n  from .tiles import a\nexcept: ...", f"imports triton: executed by {OP}:2"),
        (eager_optional, "kernels/mae_kernels/ops/__init__.py", "import triton", "mae_kernels.ops imports triton:"),
        (eager_optional, OP, "from flash_attn import f", "imports flash_attn: executed by"),
        (undeclared, "audiomae/model.py", "import triton", "audiomae.model imports triton: not in the dependencies of"),
        (undeclared, OP, "def f():\n  import numpy", f"{OP}:2: mae_kernels.ops.norm imports numpy: not in the"),
        (too_long, "bench/timing.py", "\n" * 451, "bench/timing.py:451: more than 450 lines"),
    ],
)
def test_rules_can_fail(tmp_path: Path, rule: Callable[[ImportGraph], list[str]], file: str, source: str, error: str):
    errors = rule(synthetic(tmp_path, {file: source}))
    assert any(error in found for found in errors), errors
