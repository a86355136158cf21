"""Answers of the demo model about the sample photographs, with and without its semantic tokens, as material for a gallery.

python examples/case_studies.py runs
DEMO=$(python -c 'from granulon_hf.demo import demo_folder; print(demo_folder())')
granulon analyze gallery runs/both runs/pixel --name runs/both="both streams" --name runs/pixel="pixel stream alone" \
    --title "Granulon demo: both streams and the pixel stream alone" --overlay "$DEMO" --sort difference --mark-unsupported
"""

import sys
from pathlib import Path

from granulon_hf.data.sample import Sample
from granulon_hf.demo import demo_folder
from granulon_hf.evaluation.answer import Generation, PredictionRun, describe_model
from granulon_hf.loading import load_model

PHOTOS = Path(__file__).parent / "images"
# Ground truth by whoever looks at the photographs.
QUESTIONS = {
    "chelsea": [
        ("What animal is in the picture?", "a cat", "vqa"),
        ("What colour is the animal?", "ginger", "vqa"),
        ("Describe the picture.", "A ginger tabby cat with green eyes, seen from close up.", "caption"),
    ],
    "coffee": [
        ("What is in the cup?", "coffee", "vqa"),
        ("What lies on the saucer beside the cup?", "a spoon", "vqa"),
        ("Describe the picture.", "A red cup of coffee on a saucer with a spoon, on a wooden table.", "caption"),
    ],
    "rocket": [
        ("What is this?", "a rocket", "vqa"),
        ("Is it day or night?", "night", "vqa"),
        ("Describe the picture.", "A white rocket on its launch pad at night, between tall lightning towers.", "caption"),
    ],
}


def samples():
    for photo, questions in QUESTIONS.items():
        for number, (question, reference, task) in enumerate(questions, 1):
            text = [{"type": "text", "text": question}]
            messages = [
                {"role": "user", "content": [{"type": "image"}, *text]},
                {"role": "assistant", "content": [{"type": "text", "text": reference}]},
            ]
            image = {"bytes": None, "path": str(PHOTOS / f"{photo}.jpg")}
            yield Sample(f"{photo}-{number}", [image], messages, reference, task)


def main(out: Path) -> None:
    source = str(demo_folder())
    model, processor, _ = load_model(source)
    for name, stream in (("both", None), ("pixel", "pixel")):
        generation = Generation(max_new_tokens=40, visual_stream=stream)
        described = {"model": describe_model(source, model), "data": "examples/images", "generation": generation.settings()}
        rows = PredictionRun(out / name, described).run(model, processor, samples(), generation)
        print(f"{out / name}: {len(rows)} answers")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
