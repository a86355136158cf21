"""Ask a demo model about photographs that nothing was trained on, beside a blind model and the tower's own classifier.

    python examples/demo_model/held_out.py fetch pictures
    python examples/demo_model/held_out.py score --pictures pictures --model demo --out answers.jsonl
    python examples/demo_model/held_out.py report answers.jsonl
    python examples/demo_model/held_out.py leaks --pictures pictures --training stamps wallpapers

`held_out.yaml` lists the pictures with what is asked. `score` keeps every raw answer; `report` judges them anew.
"""

import argparse
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageChops
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from torchvision.transforms.functional import to_tensor
from train import class_names, unit_names

from granulon_hf.data.sample import Sample
from granulon_hf.demo_model import SHIPPED, build_demo, load_classifier
from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.answer import Generation, answer_batch
from granulon_hf.loading import load_model, pick_device
from granulon_hf.modeling.adapter_granulon import ADAPTER_WEIGHTS
from granulon_hf.overrides import load_fitting
from granulon_hf.stats import bootstrap_mean, paired_difference

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_suffix(".yaml")
PACKAGE = "gcompris-qt-data"
INSIDE = "gcompris/src/activities/"

OPEN, THERE, COLOR, PLACE = "open", "yes/no", "color", "place"
QUESTIONS = {
    OPEN: "What is in the picture?",
    THERE: "Is there {} in the picture?",
    COLOR: "What color is the {}?",
    PLACE: "Where is the {}?",
}
COLORS = "red orange yellow green blue purple pink brown tan beige cream ginger black white gray grey silver gold".split()
PLACES = ["left", "right", "top", "bottom", "middle", "center", "top left", "top right", "bottom left", "bottom right"]
LONGEST = 20  # tokens of an answer
SIDES = (448, 224)  # what the tower sees in the model, and what its classifier was trained on
THROUGH = "tower through the projector"
NEAR = 36  # of a hash's 288 bits may differ between two copies of a picture


def read_list(path: Path = LIST) -> dict[str, list[dict[str, Any]]]:
    """Return the pictures of both groups, `held_out` and `shipped`."""
    groups = yaml.safe_load(path.read_text())
    return {name: groups[name] for name in ("held_out", "shipped")}


def read_resources(data: bytes) -> dict[str, bytes]:
    """Return the files of a Qt resource file (.rcc) by their paths."""
    magic, version, tree, payload, names = struct.unpack_from(">4sIIII", data)
    if magic != b"qres" or not 1 <= version <= 3:
        raise GranulonError(f"This must be a Qt resource file of version 1 to 3; it begins with {data[:8]!r}.")
    size, files = 22 if version > 1 else 14, {}

    def visit(node: int, parents: tuple[str, ...]) -> None:
        name, flags, first, second = struct.unpack_from(">IHII", data, tree + size * node)
        (length,) = struct.unpack_from(">H", data, names + name)
        start = names + name + 6  # behind length and hash
        path = (*parents, data[start : start + 2 * length].decode("utf-16-be")) if node else parents
        if flags & 2:  # a folder: number of children, index of the first
            for child in range(second, second + first):
                visit(child, path)
            return
        (length,) = struct.unpack_from(">I", data, payload + second)  # a file: language, offset
        content = data[payload + second + 4 : payload + second + 4 + length]
        if flags & 4:
            raise GranulonError(f"{'/'.join(path)} is compressed with zstd, which this cannot read.")
        files["/".join(path)] = zlib.decompress(content[4:]) if flags & 1 else content

    visit(0, ())
    return files


def fetch(folder: Path, package: str, pictures: Sequence[dict[str, Any]]) -> None:
    """Write the pictures of a Debian package into a folder, with the package's copyright file.

    Raises:
        GranulonError: apt-get or dpkg is missing, the package cannot be had, or a picture is another one than the list says.
    """
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise GranulonError(f"This needs {tool}: run it on Debian or Ubuntu, or in a container of one.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.absolute()) as name:
        work = Path(name)
        if subprocess.run(["apt-get", "download", package], cwd=work).returncode:
            raise GranulonError(
                f"{package} cannot be downloaded: is a Debian mirror configured, and has apt-get update been run?"
            )
        (archive,) = work.glob("*.deb")
        subprocess.run(["dpkg", "-x", archive, work / "unpacked"], check=True)
        share, resources = work / "unpacked/usr/share", dict[str, bytes]()
        for activity in sorted({picture["path"].split("/")[0] for picture in pictures}):
            for file in share.glob(f"*/rcc/{activity}.rcc"):
                resources |= read_resources(file.read_bytes())
        found = {picture["path"]: resources.get(INSIDE + picture["path"], b"") for picture in pictures}
        other = [one["path"] for one in pictures if hashlib.sha256(found[one["path"]]).hexdigest() != one["sha256"]]
        if other:
            raise GranulonError(
                f"{archive.name} has another picture, or none, for {len(other)} of {len(pictures)} in {LIST.name} "
                f"(first: {other[0]}); use version 3.1 of the package, from Debian 12."
            )
        for path, content in found.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        shutil.copy(share / "doc" / package / "copyright", folder / "copyright")


def find_picture(picture: dict[str, Any], folder: Path) -> Path:
    """Return where a picture lies: the shipped ones in this repository, all others in the folder that `fetch` filled."""
    path = (ROOT if picture["path"].startswith("examples/") else folder) / picture["path"]
    if not path.is_file():
        raise GranulonError(f"{path} is missing; run: python {Path(__file__).name} fetch {folder}")
    return path


def open_picture(path: Path) -> Image.Image:
    """Open a picture in RGB, on white where it is transparent."""
    with Image.open(path) as image:
        layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")


def ask_about(picture: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the questions about a picture: path, form, question, accept, kind, beside."""
    asked = [(OPEN, "", picture["names"])]
    asked += [(THERE, name, [answer]) for answer, key in (("yes", "there"), ("no", "absent")) for name in picture[key]]
    asked += [(form, picture["names"][0], picture[form]) for form in (COLOR, PLACE) if form in picture]
    context = {"kind": picture["kind"], "beside": picture.get("beside", [])}
    return [
        {"path": picture["path"], "form": form, "question": QUESTIONS[form].format(name), "accept": accept} | context
        for form, name, accept in asked
    ]


def singular(word: str) -> str:
    """Cut off the ending of a plural; what is left need not be English, only the same each time."""
    if len(word) < 4 or word.endswith("ss"):
        return word
    return re.sub(r"(?<=[cs]h)es$|(?<=ss)es$|s$", "", re.sub(r"ies$", "y", word))


def normalize(text: str) -> str:
    """Return the words in lower case and in the singular, with a space between them."""
    return " ".join(map(singular, re.findall(r"[a-z]+", text.lower())))


def find_said(answer: str, vocabulary: Collection[str]) -> list[str]:
    """Return which of some normalized names an answer says, from left to right: the longest that begins at a word."""
    words, found, start = normalize(answer).split(), [], 0
    longest = max(len(name.split()) for name in vocabulary)
    while start < len(words):
        spans = (" ".join(words[start : start + length]) for length in range(longest, 0, -1))
        name = next((span for span in spans if span in vocabulary), None)
        start += len(name.split()) if name else 1
        found += [name] if name else []
    return found


def make_vocabularies(groups: dict[str, list[dict[str, Any]]]) -> dict[str, set[str]]:
    """Return what answers to each form of question are searched for, normalized."""
    names = [name for pictures in groups.values() for picture in pictures for name in picture["names"]]
    known = {OPEN: [*names, *class_names()], THERE: ["yes", "no"], COLOR: COLORS, PLACE: PLACES}
    return {form: set(map(normalize, words)) for form, words in known.items()}


def is_right(row: dict[str, Any], vocabularies: dict[str, set[str]], kind: bool = False, anywhere: bool = False) -> bool:
    """Judge an answer: it says what is accepted, and nothing else that is known, such as a second animal that is not there.

    Args:
        row (`dict`): form, accept, kind, beside, arm, answer. The tower's answer is all names of one class.
        vocabularies (`dict`): by form, from [`make_vocabularies`].
        kind (`bool`): accept the kind of thing too.
        anywhere (`bool`): whatever else is said.
    """
    accept = {normalize(name) for name in [*row["accept"], *([row["kind"]] if kind else [])]}
    if row["arm"].startswith("tower"):
        return any(normalize(name) in accept for name in row["answer"].split(", "))
    said = set(find_said(row["answer"], vocabularies[row["form"]] | accept))
    # Naming what is beside the thing is neither right nor wrong; nor is its kind.
    other = said - accept - {normalize(name) for name in [*row["beside"], row["kind"]]}
    return bool(said & accept) and (anywhere or not other)


def best_constant(rows: Sequence[dict[str, Any]]) -> str:
    """Return the answer that is right most often when it is given to all questions of a form."""
    return Counter(word for row in rows for word in row["accept"]).most_common(1)[0][0]


def percent(mean: float, low: float, high: float) -> str:
    """Write a share with its interval."""
    known = not np.isnan(low)  # scores that are the same of every picture have no interval
    return f"{100 * mean:.0f} %" + (f" [{100 * low:.0f}, {100 * high:.0f}]" if known else "")


def report(rows: Sequence[dict[str, Any]], vocabularies: dict[str, set[str]]) -> str:
    """Return a Markdown table of one group: shares of right answers with 95 % intervals, pictures drawn as clusters.

    Args:
        rows (`list[dict]`): answers of all arms, as `score` writes them.
        vocabularies (`dict`): by form, from [`make_vocabularies`].
    """
    arms = ["model", "blind", "model − blind", "always the same", *(f"tower at {side}" for side in SIDES), THROUGH]
    lines = [f"| question | n | {' | '.join(arms)} |", "|---" * (2 + len(arms)) + "|"]
    measures: list[tuple[str, str, dict[str, bool]]] = [
        (OPEN, OPEN, {}),
        ("open, or its kind", OPEN, {"kind": True}),
        ("open, said anywhere", OPEN, {"anywhere": True}),
        *((form, form, {}) for form in (THERE, COLOR, PLACE)),
    ]
    for name, form, options in measures:
        of_form = [row for row in rows if row["form"] == form]
        model = [row for row in of_form if row["arm"] == "model"]
        if not model:
            continue
        clusters, values = [row["path"] for row in model], dict[str, list[bool]]()
        numbers = [sorted(set(clusters)).index(path) for path in clusters]
        constant = {"answer": best_constant(model), "arm": "always the same"}
        for row in of_form:
            values.setdefault(row["arm"], []).append(is_right(row, vocabularies, **options))
        values[constant["arm"]] = [is_right(row | constant, vocabularies, **options) for row in model]
        if options:  # the classifier says one class: there is nothing else in its answer, and it knows no kinds
            values = {arm: right for arm, right in values.items() if not arm.startswith("tower")}
        cells = {arm: percent(*bootstrap_mean(right, numbers)) for arm, right in values.items()}
        cells["model − blind"] = percent(*paired_difference(values["model"], values["blind"], numbers)[:3])
        lines.append(f"| {name} | {len(model)} | {' | '.join(cells.get(arm, '') for arm in arms)} |")
    return "\n".join(lines)


def report_all(rows: Sequence[dict[str, Any]]) -> str:
    """Return the tables of both groups, and each answer about the shipped pictures."""
    vocabularies, parts = make_vocabularies(read_list()), []
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        tokens = [row["visual_tokens"] for row in of_group if row["arm"] == "model"]
        pictures = len({row["path"] for row in of_group})
        parts.append(f"{group}: {pictures} pictures, {np.mean(tokens):.0f} visual tokens on average\n")
        parts.append(report(of_group, vocabularies) + "\n")
        if group == "shipped":
            for row in of_group:
                if row["arm"] == "model":
                    verdict = "right" if is_right(row, vocabularies) else "wrong"
                    parts.append(f"{verdict}: {Path(row['path']).name}: {row['question']} {row['answer']}")
    return "\n".join(parts)


def folder_of(source: str) -> Path:
    return SHIPPED if source == "demo" else Path(source)


def load(source: str, visual_tokens: str | None, device: str) -> tuple[Any, Any]:
    """Load "demo", a folder with an adapter of the demo's form (`train.py --out`), or any folder with a whole model."""
    place, folder = pick_device(device), folder_of(source)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        if visual_tokens is not None:
            raise GranulonError(f"--visual_tokens needs an adapter of the demo model; {source} has no {ADAPTER_WEIGHTS}.")
        return load_model(source, device)[:2]
    overrides = {} if visual_tokens is None else {"visual_tokens": visual_tokens}
    if (folder / "config.json").is_file():
        model, processor = build_demo(folder, **overrides)
    else:  # `train.py` writes the weights alone: the config is the shipped one
        model, processor = build_demo(None, **overrides)
        load_fitting(model, load_file(folder / ADAPTER_WEIGHTS))
    # On a CPU in float32, as everywhere: batches of another size would round differently, and now and then choose another word.
    return model.to(place, torch.float32 if place.type == "cpu" else None), processor


def answer_all(model, processor, asked: dict[Path | None, list[str]], generation: Generation, what: str) -> list[dict]:
    """Answer questions greedily by their pictures, a gray one where the path is None; in order."""
    steps = [
        (path, questions[start : start + generation.batch_size])
        for path, questions in asked.items()
        for start in range(0, len(questions), generation.batch_size)
    ]
    answers = list[dict[str, Any]]()
    for path, questions in track(steps, description=what, console=Console(stderr=True)):
        image = Image.new("RGB", (448, 448), "gray") if path is None else open_picture(path)
        parts = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
        samples = [Sample("", [image], [{"role": "user", "content": content}], "", "vqa") for content in parts]
        found = answer_batch(model, processor, samples, generation)
        answers += [{"answer": one["prediction"], "visual_tokens": one["visual_tokens"]} for one in found]
    return answers


@torch.inference_mode()
def classify(images: Sequence[Image.Image], side: int, names: Sequence[str]) -> list[str]:
    """Return the likeliest ImageNet class of pictures, squashed to a square, by the frozen tower: all names of the class."""
    classifier, info, answers = load_classifier(), ImageNetInfo(), []
    for image in images:
        pixels = to_tensor(image.resize((side, side), Image.Resampling.BICUBIC)) * 2 - 1
        index = int(classifier(pixels.unsqueeze(0)).argmax())
        answers.append(", ".join(dict.fromkeys([names[index], *info.index_to_description(index).split(", ")])))
    return answers


@torch.inference_mode()
def name_units(model: Any, processor: Any, images: Sequence[Image.Image]) -> list[str]:
    """Return the names whose hidden units of the projector are on most in pictures: the most that can be read of them."""
    projector, answers = model.model.multi_modal_projector, []
    names = unit_names(projector.linear_1.out_features)
    for image in images:
        pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"].to(model.device)
        features = model.model.reusable_features(pixels).to(projector.linear_1.weight.dtype)
        answers.append(names[int(projector.act(projector.linear_1(features)).sum((0, 1)).argmax())])
    return answers


def score(args: argparse.Namespace, groups: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Answer all questions as the model, the blind model and the tower, and return the rows."""
    rows, paths = [], dict[str, Path]()
    for group, pictures in groups.items():
        for picture in pictures:
            paths[picture["path"]] = find_picture(picture, args.pictures)
            rows += [{"group": group} | row for row in ask_about(picture)]
    generation = Generation(max_new_tokens=LONGEST, batch_size=args.batch_size, visual_tokens=args.budget)
    model, processor = load(args.model, args.visual_tokens, args.device)
    slots = model.config.num_semantic_slots
    if args.budget is not None and not 1 <= args.budget <= slots:
        raise GranulonError(f"--budget must lie between 1 and {slots} for this model; got {args.budget}.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    names, open_rows = class_names(), [row for row in rows if row["form"] == OPEN]
    images, result = [open_picture(paths[row["path"]]) for row in open_rows], []
    for side in SIDES:
        told = classify(images, side, names)
        result += [row | {"arm": f"tower at {side}", "answer": answer} for row, answer in zip(open_rows, told, strict=True)]
    if (folder_of(args.model) / ADAPTER_WEIGHTS).is_file():
        told = name_units(model, processor, images)
        result += [row | {"arm": THROUGH, "answer": answer} for row, answer in zip(open_rows, told, strict=True)]
    asked = dict[Path | None, list[str]]()
    for row in rows:
        asked.setdefault(paths[row["path"]], []).append(row["question"])
    answers = answer_all(model, processor, asked, generation, "model")
    result += [row | {"arm": "model"} | answer for row, answer in zip(rows, answers, strict=True)]
    questions = sorted({row["question"] for row in rows})
    blind = answer_all(model, processor, {None: questions}, generation, "blind")
    by_question = dict(zip(questions, blind, strict=True))
    return result + [row | {"arm": "blind"} | by_question[row["question"]] for row in rows]


def difference_hash(image: Image.Image, side: int = 12) -> np.ndarray:
    """Return whether each cell of a square grid is brighter than its left and upper neighbor: the same for nearly all cells of
    copies of a picture, whatever their size and brightness. Margins of one color are cut off first."""
    gray = image.convert("L")
    content = ImageChops.difference(gray, Image.new("L", gray.size, gray.getpixel((0, 0)))).point(
        lambda value: 255 * (value > 16)
    )
    cells = np.asarray(gray.crop(content.getbbox()).resize((side + 1, side + 1), Image.Resampling.BOX), dtype=int)
    return np.stack([cells[1:, 1:] > cells[1:, :-1], cells[1:, 1:] > cells[:-1, 1:]]).flatten()


def find_leaks(pictures: dict[str, Image.Image], training: Iterable[Path], near: int = NEAR) -> tuple[int, list[tuple]]:
    """Compare pictures with all training pictures, as they are and mirrored.

    Returns:
        `tuple`: how many training pictures were read, and (bits that differ, name of a picture, path of a training picture) of
            the pairs that are nearly the same, and of the nearest pair if none is.
    """
    hashes = {name: (difference_hash(image), difference_hash(mirror(image))) for name, image in pictures.items()}
    pairs, count = [], 0
    for path in training:
        count += 1
        found = difference_hash(open_picture(path))
        pairs += [(min(int((found != one).sum()) for one in both), name, path) for name, both in hashes.items()]
    pairs.sort(key=lambda pair: pair[0])
    return count, [pair for pair in pairs if pair[0] <= near] or pairs[:1]


def mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fetch", help="download the photographs with apt-get, and check them")
    one.add_argument("folder", type=Path)
    one = commands.add_parser("score", help="answer all questions, keep the answers, and print the tables")
    one.add_argument("--pictures", type=Path, required=True, help="the folder of `fetch`")
    one.add_argument("--model", default="demo", help="demo, a folder with its adapter, or a folder with a whole model")
    one.add_argument("--out", type=Path, required=True, help="raw answers, as JSON Lines")
    one.add_argument(
        "--visual_tokens",
        choices=["semantic", "pixel+semantic"],
        help="another form of the demo model: semantic is the compact one",
    )
    one.add_argument("--budget", type=int, help="semantic tokens of every picture, instead of a level")
    one.add_argument("--batch_size", type=int, default=8)
    one.add_argument("--device", default="auto")
    one = commands.add_parser("report", help="judge raw answers anew, and print the tables")
    one.add_argument("answers", type=Path)
    one = commands.add_parser("leaks", help="search training pictures for near copies of the photographs")
    one.add_argument("--pictures", type=Path, required=True, help="the folder of `fetch`")
    one.add_argument("--training", type=Path, nargs="+", required=True, help="folders of training pictures")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    groups = read_list()
    if args.command == "fetch":
        fetch(args.folder, PACKAGE, groups["held_out"])
        print(f"{len(groups['held_out'])} pictures in {args.folder}")
    elif args.command == "score":
        rows = score(args, groups)
        args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(report_all(rows))
    elif args.command == "report":
        print(report_all([json.loads(line) for line in args.answers.read_text().splitlines()]))
    else:
        pictures = {one["path"]: open_picture(find_picture(one, args.pictures)) for group in groups.values() for one in group}
        endings = Image.registered_extensions()
        training = [path for folder in args.training for path in sorted(folder.rglob("*")) if path.suffix.lower() in endings]
        count, pairs = find_leaks(pictures, track(training, description="leaks", console=Console(stderr=True)))
        print(f"{len(pictures)} pictures, {count} training pictures; pairs with up to {NEAR} of 288 bits, or the nearest:")
        for bits, name, path in pairs:
            print(f"{bits} bits differ: {name} and {path}")


if __name__ == "__main__":
    try:
        main()
    except GranulonError as error:
        sys.exit(str(error))
