"""The distributions: a wheel with every file of the package, and a source distribution that builds the same wheel."""

import ast
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11
pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINKED = ("cards", "modeling")  # top-level folders that are sub-packages


def tracked() -> list[Path]:
    """Files of the checkout, those not added yet included; without git, all that an unpacked source distribution has."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        found = {Path(name) for name in names if name}
    else:
        found = {path.relative_to(ROOT) for path in ROOT.rglob("*") if "__pycache__" not in path.parts}
    return sorted(path for path in found if (ROOT / path).is_file())  # a link to a file counts as one, to a folder not


def build(kind: str, folder: Path, out: Path) -> Path:
    """As pip does it, with the setuptools that is installed."""
    script = f"from setuptools.build_meta import build_{kind}; print(build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def contents(wheel: Path) -> dict[str, str]:
    """Digests of the files, the record of them left out."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("RECORD")]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """(wheel of the checkout, source distribution, wheel of the unpacked source distribution)"""
    folder = tmp_path_factory.mktemp("dist")
    checkout = folder / "checkout"
    for path in tracked():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, checkout / path, follow_symlinks=False)
    for name in LINKED:
        (checkout / "granulon_hf" / name).symlink_to(Path("..", name))
    sdist = build("sdist", checkout, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    for name in ("one", "two"):
        (folder / name).mkdir()
    return build("wheel", checkout, folder / "one"), sdist, build("wheel", unpacked, folder / "two")


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(dist):
    wheel = {name for name in contents(dist[0]) if ".dist-info/" not in name}
    expected = {str(path) for path in tracked() if path.parts[0] == "granulon_hf"}
    expected |= {str(Path("granulon_hf", path)) for path in tracked() if path.parts[0] in LINKED}
    assert wheel == expected
    for name in ("py.typed", "judge/README.md", "demo/granulon-demo/adapter.safetensors", "modeling/chatml.jinja"):
        assert f"granulon_hf/{name}" in wheel


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(dist):
    assert contents(dist[0]) == contents(dist[2])


@pytest.mark.slow
def test_the_source_distribution_can_run_the_tests(dist):
    with tarfile.open(dist[1]) as archive:
        members = archive.getmembers()
    names = {str(Path(*Path(member.name).parts[1:])) for member in members if member.isfile()}
    top = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "MANIFEST.in", "pyproject.toml"}
    folders = {"granulon_hf", "modeling", "cards", "tests", "examples"}
    assert {str(path) for path in tracked() if path.parts[0] in folders} | top <= names
    assert not [member.name for member in members if not (member.isfile() or member.isdir())]
    assert not [name for name in names if name.startswith(tuple(f"granulon_hf/{name}/" for name in LINKED))]


@pytest.mark.slow
def test_the_metadata(dist):
    with zipfile.ZipFile(dist[0]) as archive:
        text = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    for line in (f"Version: {PROJECT['version']}", "License-Expression: Apache-2.0", "Description-Content-Type: text/markdown"):
        assert f"\n{line}\n" in text
    assert licences
    assert "\nClassifier: Typing :: Typed\n" in text


def test_the_changelog_has_the_version():
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert versions[0] == "Unreleased"
    assert PROJECT["version"] in versions


def test_the_version_is_stated_once():
    for path in (ROOT / "granulon_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value == PROJECT["version"]:
                pytest.fail(f"{path} states the version again, at line {node.lineno}.")
