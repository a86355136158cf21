"""The package: one set of files under two names, the declared folders, the import rules, the version check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import typer
from rich.text import Text

from granulon_hf.cli import app

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_modeling_is_one_folder():
    import granulon_hf.modeling

    assert Path(granulon_hf.modeling.__file__).resolve().parent == ROOT / "modeling"


def test_declared_packages_are_the_folders():
    links = {ROOT / "granulon_hf" / name for name in ("cards", "modeling")}
    folders = {path.parent for path in (ROOT / "granulon_hf").rglob("__init__.py")} | links
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(names)


@pytest.mark.parametrize("path", sorted((ROOT / "modeling").glob("*.py")), ids=lambda path: path.name)
def test_remote_code_is_self_contained(path):
    """Checkpoints carry these files: torch, transformers, what that needs, the standard library, and each other."""
    allowed = {"PIL", "numpy", "torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level == 1 and node.module and (ROOT / "modeling" / f"{node.module}.py").exists()
            else:
                assert node.module.split(".")[0] in allowed


def test_import_rules():
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


OLD = "import transformers; transformers.__version__ = '4.57.0'"


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        f"{OLD}; import granulon_hf",
        f"import granulon_hf; {OLD}; granulon_hf.GranulonConfig",
        f"import granulon_hf; {OLD}; transformers.AutoConfig",
        f"import granulon_hf; {OLD}; import granulon_hf.modeling.processing_granulon",
    ],
)
def test_an_old_transformers_is_refused_with_the_remedy(script):
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: granulon_hf needs transformers >= " in done.stderr
    assert "pip install -U" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import granulon_hf, transformers",
        "import transformers, granulon_hf",
        "from transformers import AutoConfig; import granulon_hf, transformers",
        "import granulon_hf.modeling.aggregation_granulon, transformers",
        "from granulon_hf import AutoModelForVision2Seq, GranulonConfig; import transformers",
        "import granulon_hf, transformers; from transformers import Trainer",  # whose modules import the Auto classes half-way
        "import granulon_hf, transformers; from transformers import CLIPImageProcessor",
    ],
)
def test_importing_the_package_registers_it(imports, build, tmp_path):
    """In whatever order; nothing of the package but its name has to be used."""
    for part in build():
        part.save_pretrained(tmp_path)
    script = f"""
{imports}
import pickle, sys
where = sys.argv[1]
config = transformers.AutoConfig.from_pretrained(where)
processor = transformers.AutoProcessor.from_pretrained(where)
model = transformers.AutoModelForImageTextToText.from_pretrained(where)
for auto in (transformers.AutoModel, transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM):
    assert type(config) in auto._model_mapping
assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
print(*(type(one).__module__ + "." + type(one).__name__ for one in (config, processor, model)))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [
        "granulon_hf.modeling.configuration_granulon.GranulonConfig",
        "granulon_hf.modeling.processing_granulon.GranulonProcessor",
        "granulon_hf.modeling.modeling_granulon.GranulonForConditionalGeneration",
    ], done.stderr


def test_names_of_the_package_are_those_of_its_modules():
    import granulon_hf
    from granulon_hf.modeling.configuration_granulon import GranulonConfig

    assert granulon_hf.GranulonConfig is GranulonConfig
    assert granulon_hf.AutoModelForVision2Seq is transformers.AutoModelForImageTextToText
    assert set(granulon_hf.__all__) <= set(dir(granulon_hf))
    assert all(hasattr(granulon_hf, name) for name in granulon_hf.__all__)
    assert not hasattr(granulon_hf, "GranulonTokenizer")


def test_the_minimum_of_transformers_is_stated_once():
    import granulon_hf

    assert f"transformers>={granulon_hf.MINIMUM_TRANSFORMERS.removesuffix('.0')},<6" in PROJECT["project"]["dependencies"]


def test_help_loses_no_brackets():
    """Rich takes [words] for markup: what is meant as text is written with a backslash."""

    def options(command):
        yield from command.params
        for inner in getattr(command, "commands", {}).values():
            yield from options(inner)

    texts = [option.help for option in options(typer.main.get_command(app)) if getattr(option, "help", None)]
    assert len(texts) > 100 and any("@revision]" in text for text in texts)
    for text in texts:
        assert Text.from_markup(text).plain == text.replace("\\[", "[")
