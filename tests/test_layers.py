"""The house keeps its order: a room imports only from rooms below it, and the light rooms stay light."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "matplotlib", "transformers"}


def test_import_contract() -> None:
    tool = Path(sys.executable).parent / "lint-imports"
    if not tool.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([tool, "--no-cache"], check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "1 kept, 0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import pascaline; dir(pascaline)",
        "import pascaline.cli, pascaline.recipe, pascaline.tokenizer",
        "import pascaline.data.puzzles, pascaline.data.sources, pascaline.data.shards",
        "import pascaline.model.config, pascaline.post.check, pascaline.post.chain; import pascaline; pascaline.run",
        "import pascaline.post.verifiers.mathematics, pascaline.post.verifiers.latex",
        "import pascaline.eval.report, pascaline.eval.plots, pascaline.eval.passk, pascaline.chat",
    ],
)
def test_light_rooms_import_nothing_heavy(code: str) -> None:
    check = f"import sys; {code}; found = {HEAVY!r} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


@pytest.mark.parametrize("script", sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_there_is(script: Path) -> None:
    """Nothing else runs them: a renamed function would be noticed by whoever measures next."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pascaline"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")


def test_the_public_names() -> None:
    import pascaline

    assert {name: getattr(pascaline, name).__module__ for name in pascaline.__all__} == {
        "Engine": "pascaline.engine.engine",
        "Sampling": "pascaline.engine.sampler",
        "load": "pascaline.model.hf",
        "run": "pascaline.post.chain",
    }
    with pytest.raises(AttributeError, match="generate"):
        pascaline.generate  # noqa: B018
