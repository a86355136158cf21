"""Samples, features and clusters that all arms share, and one run: training to its plateau, then every question alone."""

import fcntl
import functools
import json
import math
import os
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging

from granulon_hf.data.collator import GranulonCollator, encode_prompts
from granulon_hf.data.granuscenes import GranuScenes, Pictures
from granulon_hf.data.granuscenes.cutouts import VERSION
from granulon_hf.data.granuscenes.questions import LEVELS as QUESTION_LEVELS
from granulon_hf.data.granuscenes.scenes import Scene
from granulon_hf.data.sample import Sample
from granulon_hf.demo_model import load_image_processor, load_language_model, load_vision_tower
from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.metrics import exact
from granulon_hf.io import batches, write_text
from granulon_hf.modeling.aggregation_granulon import aggregate
from granulon_hf.training.arguments import RecipeArguments
from granulon_hf.training.checkpoints import last_checkpoint
from granulon_hf.training.controller import ControllerArguments, Question, logits_of, question_states, train_controller
from granulon_hf.training.feature_cache import FeatureCache, key_of
from granulon_hf.training.loss_labels import answer_losses, score_rows
from granulon_hf.training.loss_targets import ScoredQuestion
from granulon_hf.training.stages import adapter_state, load_adapter_state, trainable
from granulon_hf.training.trainer import GranulonTrainer, TrainingStopped

from .alignment import align
from .arms import (
    ARMS,
    LEVELS,
    PRICES,
    AggregateStore,
    arm,
    build,
    forward_flops,
    reads_question,
    store_name,
    views_of,
    with_positions,
)
from .language_model import SEED, TextSettings, make_tokenizer, untrained
from .paraphrase import paraphrase

SPLITS = ("train", "validation", "test", "test_heldout")
CONTROLS = ("none", "blind", "shuffled")
ANSWER_TOKENS = 3  # no answer is longer
PARAPHRASES = 3  # of each question that a controller of budgets learns from, beside its own words
Task = tuple[Scene, int]  # a question of a scene, by its place in it


@dataclass
class Settings:
    """What all runs share.

    Args:
        scenes (`dict`): how many of each split.
        scene_seed (`int`): of all scenes; another number gives other scenes of the same pictures.
        orders (`int`): orders of a conversation's questions, each a sample of its own.
        control_scenes (`int`): of the test split, for the blind and the shuffled control.
        batch_size, learning_rate, warmup_steps: of the training; the rate is constant behind the warm-up.
        max_steps (`int`), validate_every (`int`), window (`int`), min_steps (`int`): training ends when the mean accuracy of
            the last `window` validations is not above that of the `window` before them by `min_gain`, not before `min_steps`,
            or at `max_steps`. What is tested is the mean of the weights at the last `window` validations.
        alignment_epochs (`int`): over the training scenes, of the projector before any question (`alignment.py`); 0 is none.
        precision (`str`): of the frozen parts, "float32" or "bfloat16"; what is trained is in float32.
        language_model (`dict`): fields of [`TextSettings`], or `{name: smollm2}`.
        controller_steps (`int`): of the controller's training.
    """

    scenes: dict[str, int] = field(default_factory=lambda: {"train": 3000, "validation": 100, "test": 200, "test_heldout": 200})
    scene_seed: int = 0
    orders: int = 2
    control_scenes: int = 60
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    max_steps: int = 1500
    min_steps: int = 800
    validate_every: int = 100
    window: int = 4
    min_gain: float = 0.004
    alignment_epochs: int = 10
    precision: str = "float32"
    language_model: dict[str, Any] = field(default_factory=dict)
    controller_steps: int = 600

    def __post_init__(self) -> None:
        for name in ("scenes", "language_model"):
            if not isinstance(value := getattr(self, name), dict):
                raise ValueError(f"The setting {name} is {value!r}; it takes names with values.")
        numbers = {one.name: getattr(self, one.name) for one in fields(self) if one.type in (int, float)}
        numbers |= {f"scenes.{split}": self.scenes.get(split) for split in SPLITS}
        for name, value in numbers.items():
            whole = name not in ("learning_rate", "min_gain")
            low = 0 if name in ("scene_seed", "warmup_steps", "min_steps", "alignment_epochs") else 1
            low = 2 if name in ("control_scenes", "scenes.test") else low  # shuffled: the next scene's image
            check_number(name, value, low if whole else None, zero=name == "min_gain")
        if not max(self.min_steps, self.validate_every) <= self.max_steps:
            raise ValueError(f"The settings min_steps and validate_every must not be above max_steps, {self.max_steps}.")
        if set(self.scenes) != set(SPLITS):
            raise ValueError(f"The setting scenes has {', '.join(map(str, self.scenes))}; it takes {', '.join(SPLITS)}.")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"The setting precision is {self.precision!r}; it takes float32 or bfloat16.")
        name = self.language_model.get("name", "tiny")
        if name == "smollm2":
            if self.alignment_epochs:
                raise ValueError("language_model: {name: smollm2} has no words for cells; set alignment_epochs: 0.")
        elif name != "tiny":
            raise ValueError(f"There is no language model {name!r}; there are tiny and smollm2.")
        else:
            try:
                text = TextSettings(**self.language_model)
            except TypeError as error:
                raise ValueError(f"The setting language_model cannot be used: {error}.") from None
            for name, value in vars(text).items():
                if name != "name":
                    low = None if name == "learning_rate" else 0 if name == "seed" else 1
                    check_number(f"language_model.{name}", value, low)
            if text.width % (2 * text.heads):
                raise ValueError(f"The setting language_model has width {text.width}, no multiple of 2 · {text.heads} heads.")
            if self.scene_seed in (SEED + text.seed, SEED + text.seed + 1):
                raise ValueError(f"The scenes of scene_seed {self.scene_seed} are those that the language model learns from.")


def check_number(name: str, value: Any, low: int | None, zero: bool = False) -> None:
    """
    Args:
        low (`int`, *optional*): the least whole number; `None` for any positive one, or with `zero` also 0.

    Raises:
        ValueError: the setting is another thing.
    """
    if low is not None:
        fits, kind = isinstance(value, int) and value >= low, f"a whole number from {low}"
    else:
        fits = isinstance(value, int | float) and math.isfinite(value) and (value > 0 or (zero and value == 0))
        kind = f"a number {'from' if zero else 'above'} 0 (1.0e-3, not 1e-3, in YAML)"
    if isinstance(value, bool) or not fits:
        raise ValueError(f"The setting {name} is {value!r}; it takes {kind}.")


def commit() -> str | None:
    """Of the working tree that this code lies in; `None` outside of one."""
    try:
        line = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def unreadable(path: Path, error: Exception) -> GranulonError:
    above = [parent.name for parent in path.parents]  # the study itself may lie in a folder "runs"
    what = path.parent if above[2:3] == ["runs"] or above[1:2] == ["alignment"] else path  # a run is made anew as a whole
    return GranulonError(
        f"{str(path)!r} cannot be read ({error}); remove {str(what)!r} and give the command of the study again."
    )


def read_json(path: Path, *needed: str) -> Any:
    """
    Args:
        needed (`str`): what an object must hold; without any the file may hold anything.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if needed and not (isinstance(value, dict) and value.keys() >= {*needed}):
            raise ValueError(f"it does not hold {', '.join(needed)}")
        return value
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(f"[{','.join(path.read_text(encoding='utf-8').splitlines())}]")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


class Study:
    """The folder of a study, and what its runs share.

    Args:
        out (`Path`): the folder.
        settings ([`Settings`]): the same for all runs.
        pictures (`str`, *optional*): the folder of the pictures; drawn ones by default.
    """

    def __init__(self, out: Path, settings: Settings, pictures: str | None = None):
        self.out, self.settings, self.parent = out, settings, os.getppid()
        self.pictures = Pictures(folder=pictures) if pictures is not None else Pictures()
        self.scenes = {
            split: GranuScenes(split, settings.scenes[split], self.pictures, seed=settings.scene_seed) for split in SPLITS
        }
        self.by_id = {f"{split}-{settings.scene_seed}": scenes for split, scenes in self.scenes.items()}

    def orphaned(self) -> bool:
        """Whether the command that began this process was killed: then another may be at work in the same folder."""
        return os.getppid() != self.parent

    def stop_if_orphaned(self) -> None:
        if self.orphaned():
            raise TrainingStopped("The run was stopped; the same command goes on.")

    def scene_of(self, name: str):
        prefix, _, index = name.rpartition("-")
        scenes = self.by_id[prefix]
        return scenes, scenes.scene(int(index))

    def source(self) -> dict[str, Any]:
        """Return what the scenes are made of, as files of a study name it."""
        return {"pictures": self.pictures.digest, "granuscenes": VERSION}

    def questions(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """The words of the questions of predictions."""
        return [self.scene_of(row["scene"])[1].questions[int(row["question"].rpartition("-")[2])].text for row in rows]

    def image(self, name: str) -> dict[str, Any]:
        """A scene's image as samples hold it: only its name, since features are computed before."""
        return {"bytes": name.encode(), "path": None}

    def images(self) -> Iterator[dict[str, Any]]:
        for split, scenes in self.scenes.items():
            for index in range(len(scenes)):
                yield self.image(f"{split}-{self.settings.scene_seed}-{index}")

    # --- frozen parts ---

    def load_language_model(self, stand_in: bool = False):
        """Return the frozen language model and its tokenizer.

        Args:
            stand_in (`bool`): an untrained model, for work that it has no part in, which need not wait for its training.

        Raises:
            GranulonError: none is trained yet.
        """
        if self.settings.language_model.get("name") == "smollm2":
            return load_language_model()
        folder = self.out / "language_model"
        if stand_in:
            tokenizer = make_tokenizer(self.pictures)
            return untrained(tokenizer, self.text_settings()).eval(), tokenizer
        if not (folder / "results.json").exists():
            raise GranulonError(f"{str(self.out)!r} has no trained language model; give the command of the study first.")
        dtype = getattr(torch, self.settings.precision)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), PreTrainedTokenizerFast.from_pretrained(folder)

    def frozen(self) -> dict[str, str | None]:
        """Digests of what all runs share and this study trained."""
        files = {"language_model": "language_model/model.safetensors", "controller": "controller/controller.safetensors"}
        paths = {name: self.out / path for name, path in files.items()}
        return {name: sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None for name, path in paths.items()}

    def text_settings(self) -> TextSettings:
        return TextSettings(**self.settings.language_model)

    def model(self, name: str, seed: int, store: AggregateStore | None = None, controller=None, stand_in: bool = False):
        language_model, tokenizer = self.load_language_model(stand_in)
        tower = load_vision_tower(torch.float32)
        cache = self.out / "features" / "cache.json"
        patches, width = json.loads(cache.read_text())["shape"] if cache.exists() else (196, 1280)
        options = dict(width=width, patches=patches, seed=seed, store=store, controller=controller)
        return build(ARMS[name][1], language_model, tokenizer, tower, **options)

    def features(self, model: Any) -> "SceneFeatures":
        return SceneFeatures(self, model)

    def store(self) -> AggregateStore:
        return AggregateStore(self.out / "clusters")

    def fill_features(self) -> None:
        self.features(self.model("pixel", 0, stand_in=True)[0]).fill(self.images(), total=sum(map(len, self.scenes.values())))

    def fill_aggregates(self, names: Sequence[str], progress: Progress) -> None:
        """Clusters of every image at every level that the arms have: k-means has no learned part."""
        model, _ = self.model("pixel", 0, stand_in=True)
        cache, folder = self.features(model), self.out / "clusters"
        folder.mkdir(exist_ok=True)
        images = list(self.images())
        if not (folder / "keys.txt").exists():
            keys = [AggregateStore.key(cache(image)) for image in progress.track(images, description="keys of the features")]
            write_text(folder / "keys.txt", "\n".join(keys) + "\n")
        wanted = {
            store_name(arm, one): (name, one)
            for name, arm in ((name, ARMS[name][1]) for name in names)
            if arm["maker"] == "clusters"
            for one in arm["levels"]
        }
        for stored, (name, one) in sorted(wanted.items()):
            path, beta = self.store().path(stored), one["beta"]
            if path.exists():
                continue
            part = path.with_suffix(".part")
            done = part.stat().st_size if part.exists() else 0
            size = 2 * beta * (cache.shape[1] + 2)
            begun = done // size
            with open(part, "ab") as file:
                file.truncate(begun * size)
                task = progress.add_task(f"tokens {path.stem}", total=len(images), completed=begun)
                small = self.downsampling(one) if stored.startswith("downsample") else None
                for batch in batches(images[begun:], 16):
                    if small is None:
                        features = torch.stack([cache(image) for image in batch])
                        tokens = cluster(features, one["alpha"], beta, ARMS[name][1]["clustering"])
                    else:
                        tokens = small(batch)
                    file.write(tokens.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
                    progress.advance(task, len(batch))
            part.rename(path)

    def downsampling(self, level: dict[str, Any]) -> Callable[[Sequence[Any]], torch.Tensor]:
        """What makes tokens of scenes, and the mean cell of each, as the package's reducer of that name does."""
        described = {**arm(False, "reducer", "fixed", [level]), "reducer": "downsample"}
        language_model, tokenizer = self.load_language_model(stand_in=True)
        tower = load_vision_tower(torch.float32)
        model, _ = build(described, language_model, tokenizer, tower, width=1280, patches=196, seed=0)
        processor = load_image_processor()

        @torch.inference_mode()
        def make(images: Sequence[Any]) -> torch.Tensor:
            scenes = [self.scene_of(image["bytes"].decode()) for image in images]
            pictures = [made.render(scene) for made, scene in scenes]
            return with_positions(
                model.model.aggregate(processor(pictures, return_tensors="pt")["pixel_values"], granularity=0)
            )

        return make

    # --- the controller ---

    def train_controller(self) -> dict[str, Any]:
        """On the training questions' levels; measured on phrasings that are not among them."""
        folder = self.out / "controller"
        if (folder / "results.json").exists():
            return json.loads((folder / "results.json").read_text())
        model, processor = self.model("pixel+adaptive", 0)
        arguments = ControllerArguments(steps=self.settings.controller_steps, as_typed=False)
        results = train_controller(model, processor, self.level_questions(), arguments, show=False)
        folder.mkdir(exist_ok=True)
        state = {name: value.float().contiguous() for name, value in model.model.controller.state_dict().items()}
        save_file(state, folder / "controller.safetensors")
        write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
        return results

    def level_questions(self, paraphrased: Callable[[str], list[str]] = lambda text: []) -> list[Question]:
        """Return the questions that a controller of levels learns from, each followed by what `paraphrased` makes of it, and
        those that it is measured on; each with the level that it was written for."""
        names = [one["name"] for one in LEVELS]
        # As often as they are asked: coarse questions name nothing, so that few of them differ.
        questions: list[Question] = []
        for split, count in (
            ("train", min(600, len(self.scenes["train"]))),
            ("test_heldout", len(self.scenes["test_heldout"])),
        ):
            for index in range(count):
                for question in self.scenes[split].scene(index).questions:
                    weights = {name: float(name == question.level) for name in names}
                    texts = [question.text, *(paraphrased(question.text) if split == "train" else [])]
                    questions += [Question(text, weights, split != "train") for text in texts]
        return questions

    # --- samples ---

    def conversations(self, split: str, seed: int, orders: int) -> "Conversations":
        return Conversations(self, split, seed, orders)


def cluster(features: torch.Tensor, alpha: int, beta: int, clustering: str) -> torch.Tensor:
    """Semantic tokens as Granulon's own `_aggregate` makes them, and the mean cell of each [I x beta x (D + 2)]; zeros where
    there are fewer clusters."""
    count, side = len(features), int(features.shape[1] ** 0.5)
    data = {"alpha": torch.full((count,), alpha), "beta": torch.full((count,), beta)}
    return with_positions(aggregate(features, (side, side), **data, num_slots=beta, max_clusters=beta, clustering=clustering))


class SceneFeatures(FeatureCache):
    """[`FeatureCache`] of scenes, which are rendered when their features are missing."""

    def __init__(self, study: Study, model: Any):
        self.study = study
        processor = type("Processor", (), {"image_processor": load_image_processor()})
        super().__init__(str(study.out / "features"), model, processor)

    def missing(self, images) -> Iterator[tuple[str, Any]]:
        for image in images:
            if (key := key_of(image)) not in self.rows:
                scenes, scene = self.study.scene_of(image["bytes"].decode())
                yield key, scenes.render(scene)


class Conversations(Sequence):
    """One conversation for each scene, level and order of questions, the same for every arm."""

    def __init__(self, study: Study, split: str, seed: int, orders: int = 1):
        self.study, self.split, self.seed, self.orders = study, split, seed, orders
        self.levels = list(QUESTION_LEVELS)
        self.scene = functools.cache(study.scenes[split].scene)  # to make one takes as long as to tokenise it

    def __len__(self) -> int:
        return len(self.study.scenes[self.split]) * len(self.levels) * self.orders

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(number)
        rest, order = divmod(int(number), self.orders)
        index, level = divmod(rest, len(self.levels))
        scene = self.scene(index)
        name = self.levels[level]
        questions = [question for question in scene.questions if question.level == name]
        random.Random(f"{self.seed} {number}").shuffle(questions)
        messages = []
        for turn, question in enumerate(questions):
            text = {"type": "text", "text": question.text}
            messages.append({"role": "user", "content": [text] if turn else [{"type": "image"}, text]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
        types = [question.type for question in questions]
        meta = {"scene": scene.id, "level": name, "types": types}
        sample = f"{scene.id}-{name}-{order}"
        return Sample(sample, [self.study.image(scene.id)], messages, questions[-1].answer, "vqa", None, meta)


def single_questions(sample: Sample) -> Iterator[Sample]:
    """The questions of a conversation, each with the image and nothing before it."""
    for n, kind in enumerate(sample.meta["types"]):
        asked, answered = sample.messages[2 * n : 2 * n + 2]
        messages = [{**asked, "content": [{"type": "image"}, asked["content"][-1]]}, answered]
        answer = answered["content"][0]["text"]
        yield replace(sample, id=f"{sample.id}-{n}", messages=messages, reference=answer, meta={**sample.meta, "types": [kind]})


def on_plateau(history: Sequence[tuple[int, float]], settings: dict[str, Any]) -> bool:
    """Whether, of steps and their validation accuracies, the last step is not before `min_steps`, and the mean of the last
    `window` is not above that of the `window` before them by `min_gain`: single validations go up and down by more than
    training gains in the meantime."""
    window, scores = settings["window"], [score for _, score in history]
    if len(scores) < 2 * window or history[-1][0] < settings["min_steps"]:
        return False
    before, after = np.mean(scores[-2 * window : -window]), np.mean(scores[-window:])
    return bool(after - before < settings["min_gain"])


def forced_level(policy: str, level: str, name: str, seed: int) -> str | None:
    """The level that an arm's policy forces on a sample; `None` where the model chooses."""
    if policy == "oracle":
        return level
    if policy == "random":
        return random.Random(f"{seed} {name}").choice([one["name"] for one in LEVELS])
    return None


class ArmCollator:
    """[`GranulonCollator`] with cached features, and with the levels that the arm's policy forces."""

    def __init__(self, processor: Any, features: Any, arm: dict[str, Any], seed: int):
        self.collator = GranulonCollator(processor, image_features=features)
        self.arm, self.seed, self.processor = arm, seed, processor
        self.names = [one["name"] for one in arm["levels"]]

    def rows(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """The conversations; where a question makes the image's tokens, each of their questions is one of its own."""
        if not reads_question(self.arm):
            return samples
        return [one for sample in samples for one in single_questions(sample)]

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        samples = self.rows(samples)
        batch = self.collator(samples)
        if self.collator.problems:
            raise RuntimeError(f"A sample cannot be used: {self.collator.problems[0]}")
        forced = [forced_level(self.arm["policy"], s.meta["level"], s.id, self.seed) for s in samples]
        if forced[0] is not None:
            batch["granularity"] = torch.tensor([self.names.index(name) for name in forced])
        return batch


# --- one run -----------------------------------------------------------------------------------------------------------


class Validation(TrainerCallback):
    """Every some steps: accuracy on the validation split, the curve, the weights, and whether to stop."""

    def __init__(self, run: "Run"):
        self.run, self.rows = run, run.read_history()
        self.began, self.spent, self.clock = 0.0, 0.0, run.folder / "clock.json"

    def on_train_begin(self, args, state, control, **kwargs):
        self.rows = [row for row in self.rows if row["step"] <= state.global_step]
        self.run.write_history(self.rows)
        self.spent = self.saved_at().get(str(state.global_step), self.rows[-1]["seconds"] if self.rows else 0.0)
        self.began = time.time()

    def saved_at(self) -> dict[str, float]:
        """Seconds of training at each checkpoint."""
        return json.loads(self.clock.read_text()) if self.clock.exists() else {}

    def on_save(self, args, state, control, **kwargs):  # also where a run is stopped between two validations
        seconds = round(self.spent + time.time() - self.began, 2)
        write_text(self.clock, json.dumps(self.saved_at() | {str(state.global_step): seconds}) + "\n")

    def on_step_end(self, args, state, control, **kwargs):
        if self.run.study.orphaned():
            control.should_training_stop = control.should_save = True
            return
        settings = self.run.study.settings
        if state.global_step % settings.validate_every == 0 or state.global_step == args.max_steps:
            seconds = self.spent + time.time() - self.began
            found = self.run.validate()
            self.began, self.spent = time.time(), seconds  # validation is not training
            loss = self.run.trainer.mean_loss()
            self.rows.append({"step": state.global_step, "seconds": round(seconds, 2), "loss": loss, "validation": found})
            self.run.keep_weights(self.rows)
            self.run.write_history(self.rows)
            control.should_save = True
            if self.run.plateau(self.rows):
                control.should_training_stop = True


class ArmTrainer(GranulonTrainer):
    """[`GranulonTrainer`] that also remembers its losses between two validations."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.recent = [*getattr(self, "recent", []), float((result[0] if return_outputs else result).detach())]
        return result

    def mean_loss(self) -> float | None:
        recent, self.recent = getattr(self, "recent", []), []
        return round(sum(recent) / len(recent), 4) if recent else None


class Run:
    """One arm with one seed, in `OUT/runs/<arm>/<seed>`.

    Args:
        study ([`Study`]): with features, clusters and controller.
        name (`str`): of the arm.
        seed (`int`): of new weights, order of samples and random levels.
    """

    def __init__(self, study: Study, name: str, seed: int):
        self.study, self.name, self.seed = study, name, seed
        self.group, self.arm = ARMS[name]
        self.folder = study.out / "runs" / name / str(seed)
        self.names = [one["name"] for one in self.arm["levels"]]
        self.trainer: Any = None

    def manifest(self) -> dict[str, Any]:
        return {
            "arm_name": self.name,
            "group": self.group,
            "arm": self.arm,
            "settings": {**vars(self.study.settings), **self.study.source()},
            "frozen": self.study.frozen(),
            "seed": self.seed,
        }

    def done(self) -> bool:
        return (self.folder / "done.json").exists()

    def __call__(self) -> None:
        """Train, evaluate, write; a killed run goes on where it was.

        Raises:
            ValueError: the folder holds a run of other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a process of a study that was killed stops at its next step or batch
            path, manifest = self.folder / "manifest.json", json.loads(json.dumps(self.manifest()))
            if path.exists() and read_json(path) != manifest:
                raise ValueError(f"{str(self.folder)!r} holds a run of other settings; name another --out, or remove it.")
            write_text(path, json.dumps(manifest, indent=1) + "\n")
            if not self.done():
                self.train_and_evaluate()

    def assemble(self) -> None:
        """The model with its new weights, and what feeds it."""
        logging.set_verbosity_error()
        controller = load_file(self.study.out / "controller" / "controller.safetensors")
        store = self.study.store() if self.arm["maker"] == "clusters" else None
        self.model, self.processor = self.study.model(self.name, self.seed, store, controller)
        self.features = self.study.features(self.model)
        self.collator = ArmCollator(self.processor, self.features, self.arm, self.seed)

    def train_and_evaluate(self) -> None:
        study, settings = self.study, self.study.settings
        self.assemble()
        if (aligned := align(study, self.seed)) is not None:
            for part in (self.model.model.multi_modal_projector, self.model.model.semantic_projector):
                if part is not None:
                    part.load_state_dict({name: aligned[name] for name in part.state_dict()})
        arguments = RecipeArguments(
            output_dir=str(self.folder),
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=1,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=settings.warmup_steps,
            max_steps=settings.max_steps,
            seed=self.seed,
            data_seed=self.seed,
            save_strategy="no",
            save_total_limit=1,
            logging_steps=settings.validate_every,
            report_to="none",
            budgets="random" if self.arm["policy"] == "nested" else "controller",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            average_tokens_across_devices=False,
        )
        validation = Validation(self)
        samples: Any = study.conversations("train", self.seed, settings.orders)
        conversations = study.conversations("validation", 0, 1)
        self.validation = [(some, self.collator(some)) for some in batches(conversations, 2 * settings.batch_size)]
        if self.arm["policy"] == "nested":  # each budget in turn
            for _, batch in self.validation:
                batch["granularity"] = torch.arange(len(batch["input_ids"])) % len(self.arm["levels"])
        self.trainer = ArmTrainer(
            model=self.model, args=arguments, train_dataset=samples, data_collator=self.collator, callbacks=[validation]
        )
        checkpoint = last_checkpoint(self.folder)
        finished = (
            checkpoint is not None
            and bool(rows := self.read_history())
            and (self.plateau(rows) or rows[-1]["step"] >= settings.max_steps)
        )
        if not finished:
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if study.orphaned() or self.trainer.stop_on_signal.stopped:
            raise TrainingStopped("The run was stopped; the same command goes on.")
        self.finish()

    # --- validation ---

    @torch.inference_mode()
    def validate(self) -> dict[str, Any]:
        """Accuracy of the answers' first tokens, each behind the true answers to the questions before it."""
        self.model.eval()
        right: dict[str, list[float]] = defaultdict(list)
        for samples, batch in self.validation:
            inputs = {name: value.to(self.model.device) for name, value in batch.items() if name != "labels"}
            labels, outputs = batch["labels"], self.model(**inputs, use_cache=False)
            said = outputs.logits.argmax(-1).cpu()
            first = (labels != -100) & (torch.nn.functional.pad(labels[:, :-1], (1, 0), value=-100) == -100)
            for i, sample in enumerate(self.collator.rows(samples)):
                places = first[i].nonzero().flatten().tolist()
                for kind, at in zip(sample.meta["types"], places, strict=True):
                    right[kind].append(float(said[i, at - 1] == labels[i, at]))
        everything = [value for values in right.values() for value in values]
        by_type = {kind: round(sum(values) / len(values), 4) for kind, values in sorted(right.items())}
        return {"accuracy": round(sum(everything) / len(everything), 4), "by_type": by_type}

    def plateau(self, rows: list[dict[str, Any]]) -> bool:
        return on_plateau([(row["step"], row["validation"]["accuracy"]) for row in rows], vars(self.study.settings))

    def kept_weights(self, rows: list[dict[str, Any]]) -> list[Path]:
        return [self.folder / f"weights-{row['step']}.safetensors" for row in rows[-self.study.settings.window :]]

    def keep_weights(self, rows: list[dict[str, Any]]) -> None:
        """Those of the last validations; the newest are the model's own."""
        kept = self.kept_weights(rows)
        save_file(adapter_state(self.model), self.folder / ".weights.part")
        (self.folder / ".weights.part").rename(kept[-1])
        for path in set(self.folder.glob("weights-*.safetensors")) - set(kept):
            path.unlink()

    def load_mean_weights(self, rows: list[dict[str, Any]]) -> None:
        states = [load_file(path) for path in self.kept_weights(rows)]
        load_adapter_state(self.model, {name: sum(state[name] for state in states) / len(states) for name in states[0]})

    def read_history(self) -> list[dict[str, Any]]:
        path = self.folder / "history.jsonl"
        return read_lines(path) if path.exists() else []

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.folder / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    # --- evaluation ---

    def finish(self) -> None:
        rows = self.read_history()
        self.load_mean_weights(rows)
        validation = self.validate()
        done = {
            "steps": rows[-1]["step"],
            "validation": validation["accuracy"],
            "seconds_training": rows[-1]["seconds"],
            "commit": commit(),
            "trainable_parameters": sum(p.numel() for _, p in trainable(self.model)),
        }
        views = views_of(self.name)
        if not views:
            self.write(self.name, self.predict_all(), done)
            return
        fixed = [view for view in views if ARMS[view][1]["policy"] == "fixed"]
        predicted = {ARMS[view][1]["levels"][0]["name"]: self.predict_all(ARMS[view][1]["levels"][0]["name"]) for view in fixed}
        for view, predictions in zip(fixed, predicted.values(), strict=True):
            self.write(view, predictions, done)
        if priced := [view for view in views if view not in fixed]:
            chosen, measured = self.choose_budgets(next(iter(predicted.values())))
            write_text(self.folder / "controller.json", json.dumps(measured, indent=1) + "\n")
            for view, levels in zip(priced, chosen, strict=True):
                self.write(view, [predicted[level][i] for i, level in enumerate(levels)], done)
        write_text(self.folder / "done.json", json.dumps(done, indent=1) + "\n")

    def write(self, name: str, predictions: list[dict[str, Any]], done: dict[str, Any]) -> None:
        """What the report reads of this run, or of a view of it."""
        folder = self.study.out / "runs" / name / str(self.seed)
        folder.mkdir(parents=True, exist_ok=True)
        if name != self.name:
            write_text(folder / "manifest.json", json.dumps(Run(self.study, name, self.seed).manifest(), indent=1) + "\n")
            write_text(folder / "history.jsonl", (self.folder / "history.jsonl").read_text())
        write_text(folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in predictions))
        write_text(folder / "done.json", json.dumps({**done, **self.flops(ARMS[name][1], predictions)}, indent=1) + "\n")

    def predict_all(self, level: str | None = None) -> list[dict[str, Any]]:
        """Answers to both splits, and of the controls; at one level of a nested arm."""
        predictions = []
        for split in ("test", "test_heldout"):
            for control in CONTROLS if split == "test" else ("none",):
                count = len(self.study.scenes[split])
                count = count if control == "none" else min(count, self.study.settings.control_scenes)
                predictions += self.predict(split, control, count, level)
        return predictions

    def choose_budgets(self, rows: list[dict[str, Any]]) -> tuple[list[list[str]], dict[str, Any]]:
        """Levels of the rows' questions at each price, by a controller that learns from the losses of training answers.

        The questions that it learns from are paraphrased, since it must read phrasings that it never saw.
        """
        rng, known, scored = random.Random(self.seed), self.processor.tokenizer.get_vocab(), []
        for split, count in (("train", 600), ("validation", len(self.study.scenes["validation"]))):
            levels = len(QUESTION_LEVELS)
            conversations = self.study.conversations(split, self.seed, 1)
            asked = [one for i in range(min(count * levels, len(conversations))) for one in single_questions(conversations[i])]
            for some in batches(asked, 32):
                losses, tokens = answer_losses(self.model, self.collator.collator(some))
                for row in score_rows(some, losses, tokens, self.names):
                    texts = [row["text"]]
                    texts += [paraphrase(row["text"], rng, known) for _ in range(PARAPHRASES * (split == "train"))]
                    scored += [ScoredQuestion(text, row["losses"], row["tokens"], split != "train") for text in texts]
        arguments = ControllerArguments(
            targets="loss", price=list(PRICES), labels="scores", steps=self.study.settings.controller_steps, seed=self.seed
        )
        measured = train_controller(self.model, self.processor, scored, arguments, show=False)
        found = self.study.questions(rows)
        states = question_states(self.model, self.processor, list(dict.fromkeys(found)), show=False)
        controller = self.model.model.controller
        chosen = logits_of(controller, states.to(controller.in_proj.weight)).argmax(-1)
        by_text = dict(zip(dict.fromkeys(found), chosen.tolist(), strict=True))
        return [[self.names[by_text[text][price]] for text in found] for price in range(len(PRICES))], measured

    def flops(self, arm: dict[str, Any], predictions: list[dict[str, Any]]) -> dict[str, int]:
        seen = [row for row in predictions if row["control"] == "none"]
        visual, text = (float(np.mean([row[name] for row in seen])) for name in ("visual_tokens", "text_tokens"))
        lengths = torch.cat([batch["attention_mask"].sum(1) for _, batch in self.validation])
        conversation = float(lengths.float().mean()) - self.processor.slots
        rows_per_sample = len(lengths) / sum(len(samples) for samples, _ in self.validation)
        patches, width = self.features.shape
        one = (arm, self.model.model.language_model, width, patches, visual)
        training = rows_per_sample * forward_flops(*one, conversation, cached=True)
        layers, bits = self.model.model.language_model.layers, torch.finfo(self.model.dtype).bits
        keys = 2 * len(layers) * layers[0].self_attn.k_proj.out_features * bits // 8  # bytes of one token's keys and values
        return {
            "flops_per_question": round(forward_flops(*one, text)),
            "training_flops_per_sample": round(training),
            "cache_bytes": round(keys * (visual + text)),
        }

    @torch.inference_mode()
    def generate(
        self, inputs: Any, tasks: Sequence[Task], level: str | None = None, **options
    ) -> tuple[torch.Tensor, list[str | None]]:
        """Token ids [B x L] of the tasks' answers, and the levels that they are answered with; `level` is a nested arm's."""
        names = self.names
        levels: list[str | None] = [level] * len(tasks)
        if self.arm["policy"] == "adaptive":
            mask = {name: inputs[name] for name in ("input_ids", "attention_mask", "question_mask")}
            levels = [names[i] for i in self.model.get_granularity_probs(**mask).argmax(-1).tolist()]
        elif self.arm["policy"] in ("oracle", "random"):
            levels = [forced_level(self.arm["policy"], s.questions[n].level, f"{s.id}-{n}", self.seed) for s, n in tasks]
        elif names and level is None:
            levels = [names[0]] * len(tasks)
        if names:
            options["granularity"] = levels
        return self.model.generate(
            **inputs.to(self.model.device), max_new_tokens=ANSWER_TOKENS, do_sample=False, **options
        ), levels

    def prompts(self, tasks: Sequence[Task]) -> Any:
        """Inputs of `generate`, every question alone, without the features of their images."""
        blank = Image.new("RGB", (8, 8))
        content = [[{"type": "image", "image": blank}, {"type": "text", "text": s.questions[n].text}] for s, n in tasks]
        return encode_prompts(self.processor, [[{"role": "user", "content": parts}] for parts in content])

    def features_of(self, scenes: Sequence[Scene]) -> torch.Tensor:
        return torch.stack([self.features(self.study.image(scene.id)) for scene in scenes])

    @torch.inference_mode()
    def predict(self, split: str, control: str, count: int, level: str | None = None) -> list[dict[str, Any]]:
        """Greedy answers, every question alone."""
        rows, scenes = [], self.study.scenes[split]
        tasks = [(scene, n) for scene in scenes[:count] for n in range(len(scene.questions))]
        if control == "blind":  # the mean of all features, place by place: it tells nothing and is not as strange as zeros
            features = self.features_of(scenes[:count])
            mean = features.float().mean(0)
            if self.arm.get("reducer") == "downsample":  # the store knows no such image, and features do not tell its tokens
                store = self.model.model.store
                keys, key = [store.key(one) for one in features], store.key(mean)
                for stored in {store_name(self.arm, one) for one in self.arm["levels"]}:
                    store.remember(key, stored, store.mean(keys, stored))
        for batch in batches(tasks, 64):
            self.study.stop_if_orphaned()
            inputs = self.prompts(batch)
            shown = [scenes.scene((s.index + 1) % count) if control == "shuffled" else s for s, _ in batch]
            pixels = self.features_of(shown)
            inputs["pixel_values"] = mean.expand_as(pixels) if control == "blind" else pixels
            output, levels = self.generate(inputs, batch, level)
            answers = self.processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            betas = {one["name"]: one["beta"] for one in self.arm["levels"]}
            pixel_tokens = self.features.shape[0] if self.arm["pixels"] else 0
            text_tokens = (inputs["attention_mask"].sum(1) - self.processor.slots).tolist()
            kept = [betas.get(level, 0) for level in levels]
            if self.arm.get("reducer") == "adaptive-prune":  # of its budget it may keep less
                kept = self.model.model.aggregate(inputs["pixel_values"], granularity=levels).keep.sum(1).tolist()
            for (scene, n), answer, used, text, tokens in zip(batch, answers, levels, text_tokens, kept, strict=True):
                question, answer = scene.questions[n], answer.strip()
                rows.append(
                    {
                        "scene": scene.id,
                        "question": f"{scene.id}-{n}",
                        "split": split,
                        "control": control,
                        "type": question.type,
                        "level": question.level,
                        "chance": question.chance,
                        "reference": question.answer,
                        "prediction": answer,
                        "correct": int(exact(answer, question.answer)),
                        "level_used": used,
                        "visual_tokens": pixel_tokens + tokens,
                        "text_tokens": text,
                    }
                )
        return rows
