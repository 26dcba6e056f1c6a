from __future__ import annotations

import ast
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import onestill

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src" / "onestill").rglob("*.py"))
HEAVY = {"PIL", "diffusers", "fastapi", "numpy", "openvino", "tokenizers", "sqlalchemy", "torch", "transformers"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after `code`."""
    probe = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_public_names_are_these_and_sorted() -> None:
    assert onestill.__all__ == sorted(onestill.__all__)
    assert set(onestill.__all__) == {
        "CheckpointError",
        "DataError",
        "ImageError",
        "MissingExtraError",
        "ModelInfo",
        "ModelNotFoundError",
        "NotEnoughMemoryError",
        "NotFiniteError",
        "OnestillError",
        "Output",
        "OutputError",
        "Pipeline",
        "PromptError",
        "RecipeError",
        "ScheduleError",
        "SizeError",
        "StepsError",
        "Timings",
        "UnsafeFormatError",
        "__version__",
        "list_models",
        "load",
        "model_path",
    }
    assert dir(onestill) == onestill.__all__


def test_every_public_name_is_there_and_documented() -> None:
    for name in onestill.__all__:
        value = getattr(onestill, name)
        assert name == "__version__" or value.__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        onestill.no_such_name  # noqa: B018


def test_the_package_is_typed() -> None:
    assert resources.files("onestill").joinpath("py.typed").is_file()


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not modules_after("import onestill") & (HEAVY | {"typer", "rich"})


def test_the_base_needs_no_torch() -> None:
    code = (
        "import onestill.errors, onestill.schedule, onestill.noise, onestill.sampling, onestill.checkpoint\n"
        "import onestill.pipeline, onestill.engine.openvino.engine, onestill.cli.app, onestill.serve.run\n"
        "onestill.cli.app.make_app()"
    )
    heavy = {"alembic", "c2pa", "ray", "sqlalchemy", "torch", "diffusers", "transformers"} | {
        "tokenizers",
        "accelerate",
        "huggingface_hub",
    }
    assert not modules_after(code) & heavy


@pytest.mark.parametrize("command", [["gallery", "list"], ["gallery", "remove", "x"], ["keys", "list"]], ids=str)
def test_without_the_database_the_extra_is_named(command: list[str]) -> None:
    code = f"import sys\nsys.modules['sqlalchemy'] = None\nfrom onestill.cli import main\nsys.exit(main({command}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "onestill[access]" in done.stderr


def test_measuring_on_a_gpu_needs_no_openvino() -> None:
    code = "import onestill.cli.commands.bench, onestill.bench.roofline, onestill.engine.torch.fast"
    assert "openvino" not in modules_after(code)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["generate"],
        ["models"],
        ["doctor"],
        ["train"],
        ["evaluate"],
        ["bench"],
        ["export"],
        ["data", "sheet"],
        ["serve"],
        ["keys"],
    ],
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = f"from onestill.cli import main\nassert main([*{command!r}, '--help']) == 0"
    assert not modules_after(code) & HEAVY


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many lines a function has without its signature and docstring, which may be as long as they need."""
    body = node.body[ast.get_docstring(node, clean=False) is not None :]
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert body_lines(node) <= 60, node.name
