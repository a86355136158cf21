"""GranuScenes as a data set: rows of `datasets`, samples of `load`, and what can be scored without looking."""

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from granulon_hf.data.datasets.base import Adapter
from granulon_hf.data.datasets.custom import by_group
from granulon_hf.data.granuscenes.cutouts import VERSION
from granulon_hf.data.granuscenes.drawn import DRAWN
from granulon_hf.data.granuscenes.pictures import Pictures
from granulon_hf.data.granuscenes.questions import PHRASINGS, QUESTIONS, Question, numbers_of, to_sample
from granulon_hf.data.granuscenes.scenes import SCENES, SIDE, GranuScenes, Scene
from granulon_hf.data.readers import Source
from granulon_hf.errors import GranulonError


def features():
    """Return the columns of [`granuscenes`]: one row is a scene."""
    from datasets import Features, Image, List, Value

    string = Value("string")
    question = dict.fromkeys(("question", "answer", "type", "level", "phrasing"), string) | {"choices": List(string)}
    tag = {"letter": string, "colour": string, "centre": List(Value("float32"), length=2)}
    thing = {"name": string, "category": string, "picture": string, "box": List(Value("int32"), length=4), "tags": List(tag)}
    return Features({"id": string, "image": Image(), "questions": List(question), "objects": List(thing), "background": string})


def make_rows(scenes: GranuScenes, shards: list[range]) -> Iterator[dict[str, Any]]:
    """Make the rows of [`granuscenes`]; `datasets` gives each worker some of the shards."""
    for index in itertools.chain(*shards):
        yield scenes.row(index)


def granuscenes(
    split: str = "train",
    scenes: int = SCENES,
    pictures: Pictures | str | Path | None = None,
    *,
    seed: int = 0,
    side: int = SIDE,
    streaming: bool = False,
    num_proc: int | None = None,
):
    """Make GranuScenes as a data set of `datasets`: a row is a scene with its image, questions and objects.

    Args:
        split, scenes, pictures, seed, side: as for [`GranuScenes`].
        streaming (`bool`): make scenes while iterating instead of once for the cache.
        num_proc (`int`, *optional*): processes that make them for the cache.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` when streaming (in shards of 100 scenes, for several workers).
    """
    from datasets import Dataset, IterableDataset

    made = GranuScenes(split, scenes, pictures, seed=seed, side=side)
    given = {"scenes": made, "shards": [range(len(made))[start : start + 100] for start in range(0, len(made), 100)]}
    if streaming:
        return IterableDataset.from_generator(make_rows, features=features(), gen_kwargs=given)
    return Dataset.from_generator(make_rows, features=features(), gen_kwargs=given, num_proc=num_proc)


# One image for the questions of a scene, which tend to be asked for together.
make_questions = functools.lru_cache(8)(GranuScenes.question_rows)
COLUMNS = ("id", "scene", "image", "question", "answer", "type", "level", "phrasing", "choices")


class SceneSource(Source):
    """The questions of [`GranuScenes`] as rows, seven for each scene; nothing is made before it is asked for."""

    def __init__(self, scenes: GranuScenes):
        self.scenes, self.location, self.parts, self.roots = scenes, scenes.location, ["scenes"], []
        self.split = scenes.split

    def columns(self, part: str) -> list[str]:
        return list(COLUMNS)

    def count(self, part: str) -> int:
        return len(self.scenes) * QUESTIONS

    def rows(self, part, wanted, columns):
        for row in map(int, wanted):
            index, number = divmod(row, QUESTIONS)
            if set(columns) <= {"id", "scene"}:
                scene = f"{self.scenes.split}-{self.scenes.seed}-{index}"
                yield row, {"id": f"{scene}-{number}", "scene": scene}
            else:
                yield row, make_questions(self.scenes, index)[number]

    def fingerprint(self, part: str) -> str | None:
        return f"{VERSION}-{self.scenes.pictures.digest}"


def open_scenes(source: Any, split: str) -> SceneSource:
    """Open what a user calls a source of granuscenes; of the split "holdout" the scenes are those of train.

    A source is a [`GranuScenes`], or a folder with `objects/` and `backgrounds/`, "drawn" or `None`, with settings if others
    than the defaults are wanted: `"pictures?scenes=500&seed=7&side=224"`.
    """
    split = "train" if split == "holdout" else split
    if isinstance(source, GranuScenes):
        if source.split != split:
            raise GranulonError(f"These scenes are of split {source.split!r}, not {split!r}.")
        return SceneSource(source)
    place, _, query = str(source or "").partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    folders = {name: given.pop(name) for name in ("objects", "backgrounds") if name in given}
    if place and folders:
        raise GranulonError(f"{str(source)!r}: give a folder, or objects= and backgrounds=.")
    settings = {"scenes": SCENES, "seed": 0, "side": SIDE, "version": VERSION}
    for name, value in given.items():
        if name not in settings or not value.isdecimal():
            raise GranulonError(
                f"{str(source)!r}: {name}={value} is no setting; there are {', '.join(settings)} (whole numbers)."
            )
        settings[name] = int(value)
    if (version := settings.pop("version")) != VERSION:
        raise GranulonError(f"These scenes were made by version {version} of granuscenes; this is version {VERSION}.")
    apart = {name: None if folder == DRAWN else folder for name, folder in folders.items()}
    return SceneSource(GranuScenes(split, pictures=Pictures(**apart) if apart else place, **settings))


ADAPTER = Adapter(
    name="granuscenes",
    title="generated scenes with questions at three levels",
    to_sample=to_sample,
    columns=COLUMNS,
    group=("scene", by_group),
    eval_split="test",
    opener=open_scenes,
)


def shared(one: GranuScenes, other: GranuScenes) -> dict[str, list[str]]:
    """Return what two splits share: groups and files of cut-outs and of backgrounds, and phrasings (ids and texts)."""

    def parts(scenes: GranuScenes) -> dict[str, set[str]]:
        pool = scenes.pictures.pools[scenes.heldout]
        found = {
            "objects": [picture for names in pool.values() for pictures in names.values() for picture in pictures],
            "backgrounds": scenes.pictures.scenery[scenes.heldout],
        }
        names = {what: {name for p in every for name in (p.group, p.path, p.digest)} for what, every in found.items()}
        asked = [(kind, number) for kind in PHRASINGS for number in numbers_of(kind, scenes.heldout)]
        return names | {"phrasings": {words for kind, i in asked for words in (f"{kind}/{i}", PHRASINGS[kind][i])}}

    first, second = parts(one), parts(other)
    return {what: sorted((first[what] & second[what]) - {DRAWN}) for what in first}


def baselines(train: Iterable[Scene], test: Iterable[Scene]) -> dict[str, dict[str, float]]:
    """Measure what can be scored without looking, by type of question: classifiers are fitted to `train`, and scored on `test`.

    No pixels are needed, but scikit-learn is.

    Returns:
        `dict`: for each type `questions`, and the accuracies `chance` (one over the number of answers), `majority` (the most
        frequent answer in training), `blind` (a logistic regression on the words and pairs of words of the question) and
        `shuffled` (the right answer to the next scene's question of that type: what perfect sight of a wrong image gives).

    Raises:
        GranulonError: there is a type without questions.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    seen, asked = by_type(train), by_type(test)
    result = {}
    for kind in PHRASINGS:
        if not seen.get(kind) or len(asked.get(kind, ())) < 2:
            raise GranulonError(f"There are no questions of type {kind!r}: take more scenes.")
        texts, answers = [q.text for q in asked[kind]], np.array([q.answer for q in asked[kind]])
        known = [q.answer for q in seen[kind]]
        blind = make_pipeline(CountVectorizer(ngram_range=(1, 2), token_pattern=r"[\w-]+"), LogisticRegression(max_iter=200))
        guessed = blind.fit([q.text for q in seen[kind]], known).predict(texts) if len(set(known)) > 1 else known[0]
        result[kind] = {
            "questions": len(answers),
            "chance": asked[kind][0].chance,
            "majority": float(np.mean(answers == Counter(known).most_common(1)[0][0])),
            "blind": float(np.mean(answers == guessed)),
            "shuffled": float(np.mean(answers == np.roll(answers, 1))),
        }
    return result


def by_type(scenes: Iterable[Scene]) -> Mapping[str, list[Question]]:
    """Collect the questions of scenes by type."""
    questions: dict[str, list[Question]] = defaultdict(list)
    for question in itertools.chain.from_iterable(scene.questions for scene in scenes):
        questions[question.type].append(question)
    return questions
