"""Patch features of a frozen tower and the clusters that AdaTA finds in them, kept in memory-mapped files (ours)."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.progress import track

from granulon_hf.errors import GranulonError
from granulon_hf.io import Journal, batches
from granulon_hf.modeling import aggregation_granulon, reducers_granulon
from granulon_hf.modeling.aggregation_granulon import record_clusters
from granulon_hf.modeling.images_granulon import open_rgb
from granulon_hf.modeling.reducers_granulon import REDUCERS

DESCRIPTION, INDEX, VALUES = "cache.json", "index.jsonl", "features.bin"
MORE = {"attention", "scales"}  # what reducers may need of the tower beside features
# What AdaTA's clusters depend on, beside features, levels and code.
OPTIONS = ("num_semantic_tokens", "relation", "relation_weight", "clustering", "clustering_steps", "filter_weights")


class FeatureCache:
    """Features [N x D] in bfloat16 of every image, by the hash of its encoded bytes.

    A folder belongs to one tower and one preprocessing. Features are appended, then named in the index: a killed `fill` loses
    the batch that it was at, and the next one goes on.

    Beside them it keeps the clusters that AdaTA finds of every image at every level, or at the one budget of a run, so that no
    step looks for them again ([`fill_clusters`]). Not so with another reducer: it has trained weights, depends on the question,
    draws at random, or costs next to nothing.

    Args:
        budget (`int`, *optional*): visual tokens of every image, instead of the levels'.

    Raises:
        GranulonError: the folder belongs to another tower or preprocessing, or is damaged; the tower is trained; or relation
            or reducer need more of the tower than its features.
    """

    def __init__(self, folder: str, model: Any, processor: Any, budget: int | None = None):
        self.folder, self.model, self.processor, self.budget = Path(folder), model, processor, budget
        if any(parameter.requires_grad for parameter in model.model.vision_tower.parameters()):
            raise GranulonError("--feature_cache needs a frozen vision tower; leave it out in this stage.")
        levels, reducer = model.config.granularity_levels, model.config.reducer
        if levels and model.config.relation == "attention":
            raise GranulonError("--feature_cache keeps no attention, which relation='attention' needs; leave it out.")
        # A tower without attention has features alone to look at.
        more = MORE if model.model.last_attention is not None else MORE - {"attention"}
        if levels and REDUCERS[reducer].needs & more:
            others = ", ".join(name for name in REDUCERS if not REDUCERS[name].needs & more)
            raise GranulonError(
                f"--feature_cache keeps the tower's features alone, and the reducer {reducer} looks at more of the images: "
                f"leave it out, or use one of {others}."
            )
        self.index = Journal(self.folder / INDEX, key="key")
        self.rows: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()  # until the first image
        steps = json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
        self.description = {
            "tower": fingerprint(model.model.vision_tower),
            "layer": str(model.config.vision_feature_layer),
            "preprocessing": digest(steps.encode()),
        }
        # The level as an argument of `aggregate`, and its pooling.
        self.choices: list[tuple[dict[str, int], int]] = []
        if levels and reducer == "adata":
            self.choices = [({"granularity": index}, level["alpha"]) for index, level in enumerate(levels)]
            if budget is not None:
                self.choices = [({"visual_tokens": budget}, 1)]
        self.clusters = self.folder / f"clusters-{self.clusters_name()}.bin"
        self.read()
        values = self.folder / VALUES
        if self.rows and (not values.exists() or values.stat().st_size < (max(self.rows.values()) + 1) * self.row_size):
            raise GranulonError(f"{str(values)!r} has lost its end; remove the folder {folder!r}, and it will be made again.")

    @property
    def row_size(self) -> int:
        """Bytes of one image's features."""
        return 2 * math.prod(self.shape)

    def clusters_name(self) -> str:
        """Hash all that decides which clusters AdaTA finds, its code included."""
        config = self.model.config
        settings = {name: getattr(config, name) for name in OPTIONS}
        levels = [(level["alpha"], level["beta"]) for level in config.granularity_levels]
        code = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (aggregation_granulon, reducers_granulon)]
        return digest(json.dumps([self.description, settings, levels, self.budget, code]).encode())

    @property
    def clusters_shape(self) -> tuple[int, ...]:
        """Shape of one image's clusters, of 4 bytes each."""
        return len(self.choices), 2, self.shape[0]

    def read(self) -> None:
        """Read what the folder holds, if anything."""
        path = self.folder / DESCRIPTION
        if path.exists():
            before = json.loads(path.read_text())
            if changed := [name for name, value in self.description.items() if before.get(name) != value]:
                raise GranulonError(
                    f"The features in {str(self.folder)!r} are of another {' and '.join(changed)}; name another folder."
                )
            self.shape = tuple(before["shape"])
        self.rows |= {row["key"]: row["row"] for row in self.index}

    @torch.inference_mode()
    def fill(self, images: Iterable[Any], batch_size: int = 16, total: int | None = None) -> None:
        """Compute what is missing; on the main process, while the others wait. What cannot be read is left to the collator."""
        state = PartialState()
        if state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            tower = self.model.model.vision_tower
            device, before = next(tower.parameters()).device, tower.training
            tower.to(state.device).eval()
            for batch in batches(self.missing(track(images, description="vision features", total=total)), batch_size):
                self.append([key for key, _ in batch], [image for _, image in batch], state.device)
            tower.train(before).to(device)
        state.wait_for_everyone()
        self.read()

    def count_clusters(self) -> int:
        """Count the images whose clusters are there; they are the first ones."""
        return self.clusters.stat().st_size // (4 * math.prod(self.clusters_shape)) if self.clusters.exists() else 0

    @torch.inference_mode()
    def fill_clusters(self, batch_size: int = 64) -> None:
        """Find the clusters that are missing, on the main process, while the others wait."""
        state, done = PartialState(), self.count_clusters()
        if state.is_main_process and done < len(self.rows):
            with open(self.clusters, "ab") as file:
                file.truncate(done * 4 * math.prod(self.clusters_shape))  # of what a killed run wrote in part
                for rows in batches(track(range(done, len(self.rows)), description="clusters"), batch_size):
                    features = torch.stack([self.features(row) for row in rows]).to(state.device)
                    found = [record_clusters(self.model.aggregate(features, **choice), alpha) for choice, alpha in self.choices]
                    file.write(torch.stack(found, dim=1).cpu().numpy().tobytes())
        state.wait_for_everyone()

    def missing(self, images: Iterable[Any]) -> Iterator[tuple[str, Any]]:
        seen = set(self.rows)
        for image in images:
            try:
                key = key_of(image)
                if key not in seen:
                    seen.add(key)
                    yield key, open_rgb(image)
            except (OSError, ValueError):
                continue

    def append(self, keys: list[str], images: list[Any], device: torch.device) -> None:
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(device)
        features = self.model.model._patch_features(pixels)[0].features.to(torch.bfloat16).cpu().contiguous()
        if not self.rows:
            for old in self.folder.glob("clusters-*.bin"):  # of other rows
                old.unlink()
        if not self.shape:
            self.shape = tuple(features.shape[1:])
            (self.folder / DESCRIPTION).write_text(json.dumps({**self.description, "shape": self.shape}) + "\n")
        with open(self.folder / VALUES, "ab") as values:
            values.truncate(len(self.rows) * self.row_size)  # what a killed run wrote without naming it
            values.seek(0, os.SEEK_END)
            values.write(features.view(torch.int16).numpy().tobytes())
            values.flush()
            os.fsync(values.fileno())
        new = {key: len(self.rows) + number for number, key in enumerate(keys)}
        self.index.append({"key": key, "row": row} for key, row in new.items())
        self.rows |= new

    def __call__(self, image: Any) -> torch.Tensor:
        """Return the features [N x D] of an encoded image; ValueError if the cache lacks it, since it cannot be read."""
        row = self.rows.get(key_of(image))
        if row is None:
            open_rgb(image)  # says what is wrong with it
            raise ValueError("the image is not in the feature cache")
        return self.features(row)

    def features(self, row: int) -> torch.Tensor:
        values = np.memmap(self.folder / VALUES, np.int16, "r", offset=row * self.row_size, shape=self.shape)
        return torch.from_numpy(np.array(values)).view(torch.bfloat16)

    def clusters_of(self, image: Any) -> torch.Tensor:
        """Return AdaTA's clusters [n x 2 x N] of an encoded image that the cache holds."""
        shape = self.clusters_shape
        offset = self.rows[key_of(image)] * 4 * math.prod(shape)
        return torch.from_numpy(np.array(np.memmap(self.clusters, np.int32, "r", offset=offset, shape=shape)))


def key_of(image: Any) -> str:
    data = image.get("bytes")
    return digest(data if data is not None else Path(image["path"]).read_bytes())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def fingerprint(module: torch.nn.Module) -> str:
    """Hash a module's weights: every 997th value of each."""
    found = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        found.update(name.encode() + parameter.detach().flatten()[::997].float().cpu().numpy().tobytes())
    return found.hexdigest()[:32]
