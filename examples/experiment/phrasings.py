"""Does a controller read phrasings that it was not trained with, and do paraphrases help?

    python -m examples.experiment.phrasings OUT --pictures pictures

trains the controller of levels of a study again, without paraphrases and with those that the controllers of budgets learn from
(`paraphrase.py`), and prints which share of held-out questions, in other phrasings, get the level that they were written for.
"""

import random
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from granulon_hf.cli.common import quiet, reports_bad_input
from granulon_hf.training.controller import ControllerArguments, train_controller

from .paraphrase import paraphrase
from .training import PARAPHRASES, Settings, Study, read_json


def agreement(study: Study, seed: int, paraphrases: int) -> float:
    """Share of held-out questions whose level a controller tells that learns from so many paraphrases of each question."""
    model, processor = study.model("pixel+adaptive", 0)
    say = partial(paraphrase, rng=random.Random(seed), known=processor.tokenizer.get_vocab())
    questions = study.level_questions(lambda text: [say(text) for _ in range(paraphrases)])
    arguments = ControllerArguments(steps=study.settings.controller_steps, seed=seed, as_typed=False)
    return train_controller(model, processor, questions, arguments, show=False)["accuracy"]


@reports_bad_input
def main(
    out: Annotated[Path, typer.Argument(help="Folder of the experiment.")],
    pictures: Annotated[str | None, typer.Option(help="Its pictures; default: drawn.")] = None,
    seeds: Annotated[int, typer.Option(help="So many controllers of each kind.", min=1)] = 5,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Print the share of held-out phrasings that get their level, without and with paraphrases in training."""
    quiet(debug)
    study = Study(out, Settings(**read_json(out / "settings.json", "settings")["settings"]), pictures)
    for paraphrases in (0, PARAPHRASES):
        shares = [agreement(study, seed, paraphrases) for seed in range(seeds)]
        each = ", ".join(f"{share:.3f}" for share in shares)
        typer.echo(f"{paraphrases} paraphrases of each question: mean {sum(shares) / seeds:.3f} ({each})")


if __name__ == "__main__":
    typer.run(main)
