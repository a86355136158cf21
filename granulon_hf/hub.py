"""Export a model as a folder that loads without this package, prove that it does, and upload it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

import numpy as np
from huggingface_hub import CommitInfo, HfApi, ModelCard, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from transformers import PreTrainedConfig

import granulon_hf
from granulon_hf import cards, modeling
from granulon_hf import export_check as probe
from granulon_hf.errors import GranulonError, one_line
from granulon_hf.loading import find_source, is_quantized, read_config, read_model
from granulon_hf.modeling.adapter_granulon import ADAPTER_WEIGHTS, find_adapter, name_backbone
from granulon_hf.modeling.configuration_granulon import GranulonConfig
from granulon_hf.quantization import quantization_config
from granulon_hf.training.checkpoints import RUN
from granulon_hf.training.stages import save_adapter

FORMS = ("full", "adapter")
TUNING = ("projector+lora", "full")  # the stages of training that change the backbones
CODE = Path(modeling.__file__).parent
AUTO_MAP = {
    "AutoConfig": "configuration_granulon.GranulonConfig",
    "AutoModel": "modeling_granulon.GranulonModel",
    "AutoModelForImageTextToText": "modeling_granulon.GranulonForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_granulon.GranulonForConditionalGeneration",  # `transformers serve`
    "AutoModelForVision2Seq": "modeling_granulon.GranulonForConditionalGeneration",  # the name before transformers 5
    "AutoProcessor": "processing_granulon.GranulonProcessor",
}
# All that is ever uploaded; pickles, optimizer states and caches match none of these.
UPLOADED = ["*.safetensors", "*.json", "*.jinja", "*.py", "*.txt", "*.model", "README.md", "LICENSE"]
# What an upload replaces at the top of a repository: shards and code that an earlier one left behind would be read too.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "*_granulon.py", "*.jinja"]
SECRETS = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{36}|\bAKIA[0-9A-Z]{16}\b"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
TOLERANCE = 1e-4  # of the largest logit; on one machine the difference is 0


def export(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    form: Literal["full", "adapter"] | None = None,
    backbones: dict[str, str] | None = None,
    name: str | None = None,
    repo_id: str | None = None,
    results: dict[str, Any] | None = None,
    quantize: Literal["4bit", "8bit"] | None = None,
    validate: bool = True,
) -> Path:
    """Write a model as the folder that goes to the Hub: weights, configs, processor, chat template, code, licence and card.

    Args:
        source (`str` or `os.PathLike`): folder or Hub id of a model, in either form, or of a run of `examples/train.py`.
        folder (`str` or `os.PathLike`): where to; a new or an empty folder.
        form (`str`, *optional*): "full" holds all weights, "adapter" the trained ones and the names of the frozen backbones.
            By default that of `source`.
        backbones (`dict[str, str]`, *optional*): for the adapter form, `{"vision": "org/name", "text": "org/name@revision"}`
            in place of what the config says.
        name (`str`, *optional*): the variant of the paper that it is, for the card.
        repo_id (`str`, *optional*): where it will be, for the card.
        results (`dict`, *optional*): `scores.json` of `granulon eval run`, for the card.
        quantize (`str`, *optional*): "4bit" or "8bit" for the language model, of the full form.
        validate (`bool`, defaults to `True`): load the folder where this package is not to be had, and compare logits.

    Returns:
        `Path`: the folder.

    Raises:
        GranulonError: the source cannot be read, its backbones are not known or not the ones named, the folder is not empty, or
            the exported model says something else than the source.
    """
    source, folder = find_source(os.fspath(source)), Path(folder)
    if source.startswith("tiny:"):
        raise GranulonError(f"{source!r} has random weights at toy size; name a folder or a Hub id.")
    if form not in (None, *FORMS):
        raise GranulonError(f"Unknown form {form!r}; the forms are {', '.join(FORMS)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise GranulonError(f"{str(folder)!r} is not an empty folder; name a new one.")
    if repo_id is not None:
        cards.check_repo_id(repo_id)
    if name is not None:
        cards.card_data(name)
    config = read_config(source)
    if name is not None:
        cards.check_variant(config, name)
    trained = find_adapter(source)
    form = form or ("adapter" if trained and not quantize else "full")
    if quantize and form == "adapter":
        raise GranulonError("The adapter form names its backbones and cannot quantize them; leave out --form.")
    if quantize and results:
        raise GranulonError(
            "--results are of the model before --quantize: export it (--dry-run --out FOLDER), evaluate FOLDER, and push that "
            "with its results."
        )
    if backbones and form == "full":
        raise GranulonError("Backbones are named in the adapter form only; add form='adapter'.")
    named = named_backbones(config.backbones, backbones) if form == "adapter" else config.backbones
    local = [one["name"] for one in (named or {}).values() if os.path.isabs(one["name"])]
    if local and form == "adapter" and repo_id is not None:
        raise GranulonError(
            f"The backbone {local[0]!r} is a folder of this machine, which no one else can read: name its repository on the "
            "Hub (--vision org/name, --text org/name), or upload the full form."
        )
    # An adapter whose config names none is read with those that are given.
    options: dict[str, Any] = {"backbones": named} if trained and config.backbones is None else {}
    whole: str | list[str] | None = None  # what a quantized model was
    if quantize:
        options["quantization_config"] = quantization_config(quantize, config)
        whole = source if cards.is_hub_id(source) else None
    elif is_quantized(config):
        whole = read_base_model(source)
    model, processor, _ = read_model(source, **options)
    named = None if local and form == "full" else named
    # Merged low-rank factors, or a run that trained all, make other models of the backbones.
    tuned = (config.backbones is not None and model.config.backbones is None) or read_stage(source) in TUNING
    model.config.backbones = None if tuned and form == "full" else named

    # A folder appears under its name when it is whole and was tried.
    target, folder = folder, folder.with_name(f".{folder.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write_folder(model, processor, folder, form, trained, source if is_quantized(config) else None)
        card = cards.model_card(
            model.config,
            name=name,
            repo_id=repo_id,
            form=form,
            backbones=named,
            results=results,
            source=source,
            tuned=tuned,
            whole=whole,
        )
        card.save(folder / "README.md")
        check_export(folder)
        if validate:
            # After it was written: bitsandbytes packs 4-bit weights anew when a CPU first uses them, and saves those wrongly.
            expected = probe.logits(model, processor)
            if bad := [level for level, values in expected.items() if not np.isfinite(values).all()]:
                raise GranulonError(
                    f"The logits of {source!r} at the level {bad[0]} are not all finite numbers: the model is broken."
                )
            del model
            compare(folder, expected)
        if target.is_dir():
            target.rmdir()
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def read_stage(source: str) -> str | None:
    """Read which stage a training run's folder is of; `None` for anything else."""
    try:
        return json.loads((Path(source) / RUN).read_text(encoding="utf-8"))["model"]["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_base_model(source: str) -> str | list[str] | None:
    """Read from its card what a model comes from; `None` where none says so."""
    try:
        return ModelCard.load(Path(source) / "README.md" if os.path.isdir(source) else source).data.to_dict().get("base_model")
    except (OSError, ValueError):
        return None


def write_folder(
    model: Any, processor: Any, folder: Path, form: str, trained: str | None, quantized: str | None = None
) -> None:
    """Write all files of an export but its card; `quantized` is where a model's weights are that cannot be saved again."""
    folder.mkdir(parents=True)
    model.config.auto_map = AUTO_MAP
    model.config.architectures = [type(model).__name__]
    if quantized is not None:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        weights = ["*.safetensors", "*.safetensors.index.json"]
        place = Path(quantized if os.path.isdir(quantized) else snapshot_download(quantized, allow_patterns=weights))
        for path in (path for pattern in weights for path in place.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    elif form == "full":
        model.save_pretrained(folder, max_shard_size="5GB")
    else:
        model.requires_grad_(False)  # of what is frozen nothing is saved
        save_adapter(folder, model)
        if trained is not None:  # as it was trained: in float32, and low-rank factors not merged
            shutil.copyfile(trained, folder / ADAPTER_WEIGHTS)
    vars(processor).update(model.config.slot_options)  # an older one does not know the levels
    processor.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    processor.save_pretrained(folder)
    for path in (*CODE.glob("*_granulon.py"), *CODE.glob("*.jinja")):
        shutil.copyfile(path, folder / path.name)
    (folder / "LICENSE").write_text(read_license())
    config = json.loads((folder / "config.json").read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("_name_or_path", None)  # paths of this machine
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors leaves its files to their owner alone


def named_backbones(known: dict[str, Any] | None, given: dict[str, str] | None) -> dict[str, Any]:
    """Return both backbones with their commits; raise GranulonError where one is not known or has none."""
    found: dict[str, Any] = {part: (known or {}).get(part) for part in ("vision", "text")}
    for part, text in (given or {}).items():
        if part not in found:
            raise GranulonError(f"Unknown backbone {part!r}; a model has a vision and a text backbone.")
        name, _, revision = text.partition("@")
        found[part] = name_backbone(name, {"revision": revision} if revision else {})
    for part, source in found.items():
        if source is None:
            raise GranulonError(
                f"The model does not say where its {part} backbone comes from, which the adapter form needs: name it "
                f"(--{part} org/name), or export the full form."
            )
        if "revision" not in source and not os.path.isabs(source["name"]):
            found[part] = name_backbone(source["name"], source)
            if "revision" not in found[part]:
                raise GranulonError(f"The {part} backbone {source['name']!r} cannot be found on the Hub to pin its commit.")
    return found


def read_license() -> str:
    """Read the license of the code, as installed or in the checkout."""
    try:
        text = distribution("granulon-hf").read_text("licenses/LICENSE")
    except PackageNotFoundError:
        text = None
    return text or (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")


def check_export(folder: Path) -> None:
    """Raise GranulonError for a file that is not expected, code that is not this package's, or what looks like a secret."""
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        if not any(path.match(pattern) for pattern in UPLOADED):
            raise GranulonError(f"{path.name} is not part of a model; it is not uploaded.")
        if path.suffix == ".safetensors" or path.name == "tokenizer.json":
            continue
        content = path.read_bytes()
        own = CODE / path.name
        if path.suffix == ".py" and not (own.is_file() and own.read_bytes() == content):
            raise GranulonError(f"{path.name} is not the code of this package.")
        if SECRETS.search(content):
            raise GranulonError(f"{path.name} holds what looks like a secret; it is not uploaded.")
        if path.suffix == ".json":
            for code in auto_maps(json.loads(content)):
                if not isinstance(code, dict) or not code.items() <= AUTO_MAP.items():
                    raise GranulonError(f"{path.name} names code that is not this package's: {json.dumps(code)[:200]}.")


def auto_maps(content: Any) -> Iterator[Any]:
    """Find every `auto_map` in a JSON value, at any depth."""
    if isinstance(content, dict):
        if content.get("auto_map"):
            yield content["auto_map"]
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from auto_maps(value)


def compare(folder: str | os.PathLike, expected: dict[str, np.ndarray]) -> float:
    """Load a folder, or Hub id, in a process that cannot import this package, and compare what it says.

    Returns:
        `float`: largest difference of a logit, as a part of the largest logit, which is small or raises GranulonError.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.npz"
        name = os.path.abspath(folder) if os.path.isdir(folder) else os.fspath(folder)
        command = [sys.executable, "-c", Path(probe.__file__).read_text(), name, str(out)]
        # A cache of its own: code that was loaded before must not stand in for the code in the folder.
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise GranulonError(f"The exported folder does not load without granulon_hf ({reason}).")
        found = dict(np.load(out))
    differences = [np.abs(found[level] - values).max() / (np.abs(values).max() or 1) for level, values in expected.items()]
    worst = float(np.max(differences))  # NaN if one of them is
    if not worst <= TOLERANCE:
        raise GranulonError(
            f"The exported model says something else than its source (logits differ by {worst:.1e} of the largest): the "
            "backbones that it names are not the ones that it has."
        )
    return worst


class HubNotAsked(GranulonError):
    """There is no login on the Hub, or no way to it: nothing is known of a repository."""


@dataclass(frozen=True)
class Target:
    """A repository that an upload may go to, and what it holds now."""

    repo_id: str
    exists: bool
    private: bool  # as it is, or as it would be made
    files: dict[str, RepoFile] = field(default_factory=dict)  # of the branch, or of main where the branch is new
    branch: str | None = None
    new_branch: bool = False
    doubt: str | None = None  # why the Hub may refuse to make it

    @property
    def replaced(self) -> list[str]:
        """Files that go away if an upload does not bring them."""
        return list(filter_repo_objects(self.files, allow_patterns=REPLACED, ignore_patterns="*/*"))


def push(
    source: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    folder: str | os.PathLike | None = None,
    **options,
) -> CommitInfo:
    """Export a model, prove that it loads, and upload it in one commit.

    Args:
        source (`str` or `os.PathLike`): as for [`export`].
        repo_id (`str`): "org/name".
        private (`bool`, defaults to `True`): who may see a repository that does not exist yet.
        revision (`str`, *optional*): branch; it is made if need be.
        message (`str`, *optional*): of the commit.
        token (`str`, *optional*): of the Hub; by default the one of `hf auth login`.
        folder (`str` or `os.PathLike`, *optional*): keep what is uploaded here.
        **options: of [`export`].

    Raises:
        GranulonError: no login, a repository that may not be written or is public though `private`, a card whose metadata the
            Hub does not accept, or what [`export`] raises.
    """
    api = HfApi(token=token)
    target = find_target(repo_id, private=private, revision=revision, token=token)
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        path = export(source, place, repo_id=target.repo_id, **options)
        check_card(path)
        api.create_repo(target.repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(target.repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=target.repo_id,
            folder_path=path,
            revision=revision,
            commit_message=message or f"Upload with granulon_hf {granulon_hf.__version__}",
            allow_patterns=UPLOADED,
            delete_patterns=target.replaced or None,
        )


def find_target(repo_id: str, *, private: bool = True, revision: str | None = None, token: str | None = None) -> Target:
    """Look at the repository that an upload would go to, without writing anything.

    Raises:
        HubNotAsked: no login, or no way to the Hub.
        GranulonError: one that may not be written, is not as private as asked for, or holds another model.
    """
    cards.check_repo_id(repo_id)
    user = who_am_i(token)
    api = HfApi(token=token)
    if "/" not in repo_id:
        repo_id = f"{user['name']}/{repo_id}"
    try:
        known = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return Target(repo_id, False, private, branch=revision, new_branch=bool(revision), doubt=doubt(user, repo_id))
    if private and not known.private:
        raise GranulonError(f"{repo_id} exists and is public; say so (--public), or name another repository.")
    if not private and known.private:
        raise GranulonError(f"{repo_id} exists and is private; make it public in its settings, or leave out --public.")
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise GranulonError(
                f"{user['name']} may not write to {repo_id} with this token: use one that may, or name another repository."
            ) from error
    new_branch = False
    try:
        files = list_files(api, repo_id, revision)
    except RevisionNotFoundError:
        files, new_branch = list_files(api, repo_id), True
    if files.keys() - {".gitattributes", "README.md"}:
        try:
            at = None if new_branch else revision
            kind = PreTrainedConfig.get_config_dict(repo_id, revision=at, token=api.token)[0].get("model_type")
        except OSError:
            kind = None
        if kind != GranulonConfig.model_type:
            raise GranulonError(f"{repo_id} holds something else than a Granulon model; name another repository.")
    return Target(repo_id, True, bool(known.private), files, revision, new_branch)


def who_am_i(token: str | None) -> dict[str, Any]:
    """Return what the Hub knows of a token's user.

    Raises:
        HubNotAsked: there is no token that the Hub accepts, or no way to it.
        GranulonError: the token may only read.
    """
    try:
        if not (token or get_token()):
            raise LocalTokenNotFoundError("there is no token")
        user = HfApi(token=token).whoami()
    except Exception as error:
        reason = one_line(error)[:200]
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            raise HubNotAsked(f"No login on the Hub: run `hf auth login`, or set HF_TOKEN ({reason}).") from error
        raise HubNotAsked(f"The Hub cannot be reached: connect, and unset HF_HUB_OFFLINE if it is set ({reason}).") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise GranulonError("The token may only read; make one that may write at https://huggingface.co/settings/tokens.")
    return user


def doubt(user: dict[str, Any], repo_id: str) -> str | None:
    """Say why a user may not be able to make a repository, as far as the Hub tells."""
    owner = repo_id.split("/")[0]
    roles = {one["name"]: one.get("roleInOrg") for one in user.get("orgs", [])}
    if owner == user["name"] or roles.get(owner, "read") != "read":
        return None
    what = "may only read in" if owner in roles else "is not a member of"
    return f"{user['name']} {what} {owner}: the Hub will refuse to make the repository."


def list_files(api: HfApi, repo_id: str, revision: str | None = None) -> dict[str, RepoFile]:
    """Return the files of a repository by their paths, with their hashes."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def check_card(folder: Path) -> None:
    """Have the Hub look at the card's metadata; raise GranulonError for what it does not accept."""
    try:
        ModelCard.load(folder / "README.md").validate()
    except ValueError as error:
        raise GranulonError(f"The Hub does not accept the metadata of the card: {one_line(error)}") from error


def plan(folder: Path, target: Target) -> dict[str, str]:
    """Say of every file, here or there, what an upload makes of it: "new", "changed", "same", "removed" or "left"."""
    told: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        there = target.files.get(name)
        told[name] = "new" if there is None else "same" if is_same(path, there) else "changed"
    replaced = set(target.replaced)
    return told | {name: "removed" if name in replaced else "left" for name in sorted(target.files.keys() - told.keys())}


def is_same(path: Path, there: RepoFile) -> bool:
    """Compare a file with one on the Hub by size and hash: SHA-256 of large files, Git's own of others."""
    if path.stat().st_size != there.size:
        return False
    if there.lfs is None:
        return git_hash(path.read_bytes()) == there.blob_id
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == there.lfs.sha256
