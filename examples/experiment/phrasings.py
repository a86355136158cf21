"""Does a controller read phrasings that it was not trained with, and do paraphrases help?

    python -m examples.experiment.phrasings OUT --pictures pictures

trains the controller of levels of a study again, without paraphrases and with those that the controllers of budgets learn from
(`paraphrase.py`), and prints which share of held-out questions, in other phrasings, get the level that they were written for.
"""

import argparse
import random
import sys
from functools import partial
from pathlib import Path

from granulon_hf.cli.common import quiet
from granulon_hf.errors import GranulonError
from granulon_hf.training.controller import ControllerArguments, train_controller

from .paraphrase import paraphrase
from .report import differing
from .training import PARAPHRASES, Settings, Study, read_json


def agreement(study: Study, seed: int, paraphrases: int) -> float:
    """Train a controller with so many paraphrases of each question; return its accuracy on held-out phrasings."""
    model, processor = study.model("pixel+adaptive", 0)
    say = partial(paraphrase, rng=random.Random(seed), known=processor.tokenizer.get_vocab())
    questions = study.level_questions(lambda text: [say(text) for _ in range(paraphrases)])
    arguments = ControllerArguments(steps=study.settings.controller_steps, seed=seed, as_typed=False)
    return train_controller(model, processor, questions, arguments, show=False)["accuracy"]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the study")
    parser.add_argument("--pictures", help="its pictures; default: drawn")
    parser.add_argument("--seeds", type=int, default=5, help="so many controllers of each kind")
    args = parser.parse_args(given)
    if args.seeds < 1:
        raise GranulonError(f"--seeds {args.seeds}: it takes one or more controllers.")
    quiet()
    made = read_json(args.out / "settings.json", "settings", "pictures", "granuscenes")
    study = Study(args.out, Settings(**made["settings"]), args.pictures)
    if what := differing({name: made[name] for name in study.source()}, study.source()):
        raise GranulonError(f"{str(args.out)!r} was made with others: {what} differ; name its pictures with --pictures.")
    for paraphrases in (0, PARAPHRASES):
        shares = [agreement(study, seed, paraphrases) for seed in range(args.seeds)]
        each = ", ".join(f"{share:.3f}" for share in shares)
        print(f"{paraphrases} paraphrases of each question: mean {sum(shares) / args.seeds:.3f} ({each})")


if __name__ == "__main__":
    try:
        main()
    except (GranulonError, ValueError) as error:
        sys.exit(f"Error: {error}")
