"""transformers' own common model tests, from the source distribution of the very version that is installed.

`python -m tests.transformers_suite` fetches them once (from the package index, as `make test` does); nothing of them is kept
in this repository.
"""

import importlib
import importlib.util
import subprocess
import sys
import tarfile
import types
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers

FOLDER = Path(__file__).parents[1] / ".cache" / f"transformers-{transformers.__version__}-tests"
PACKAGE = "transformers_suite_tests"


def fetch() -> None:
    """Download the source distribution and keep its `tests` folder."""
    if FOLDER.exists():
        return
    with TemporaryDirectory() as folder:
        requirement = f"transformers=={transformers.__version__}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "--dest", folder]
        subprocess.run([*command, requirement], check=True)
        (archive,) = Path(folder).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as tar:
            members = [member for member in tar.getmembers() if member.name.split("/")[1:2] == ["tests"]]
            tar.extractall(folder, members=members, filter="data")
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        next(Path(folder).glob("transformers-*/tests")).rename(FOLDER)


def load(name: str) -> types.ModuleType | None:
    """Import one of its modules, such as `test_modeling_common`; `None` where the folder was not fetched.

    The distribution leaves out the sub-packages of the test folder: the mixins that it imports from them stand empty here.
    """
    if not FOLDER.exists():
        return None
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(FOLDER)]
        sys.modules[PACKAGE] = package
        for module, mixin in (
            ("exporters.test_export", "ExportTesterMixin"),
            ("generation.test_utils", "GenerationTesterMixin"),
        ):
            if importlib.util.find_spec(f"{PACKAGE}.{module.split('.')[0]}") is None:
                stub = types.ModuleType(f"{PACKAGE}.{module}")
                setattr(stub, mixin, type(mixin, (), {}))
                parent = sys.modules.setdefault(f"{PACKAGE}.{module.split('.')[0]}", types.ModuleType(module.split(".")[0]))
                parent.__path__ = []
                sys.modules[stub.__name__] = stub
    return importlib.import_module(f"{PACKAGE}.{name}")


if __name__ == "__main__":
    fetch()
