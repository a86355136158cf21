"""The real `lmms-eval` on small local tasks: answers are those of `answer_batch`, likelihoods those of the training loss.

Skipped where lmms-eval is not installed: `pip install lmms-eval`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed: pip install lmms-eval", allow_module_level=True)

from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value
from lmms_eval.api.instance import Instance

from granulon_hf.data.sample import Sample
from granulon_hf.evaluation.answer import Generation, answer_batch
from granulon_hf.evaluation.lmms import Granulon, make_generation
from tests.conftest import make_conversation, make_inputs, make_picture

QUESTIONS = (
    "What is this?",
    "How many rectangles do the two pictures hold, and of what colour is the largest one of them?",
    "Yes or no: is there a cat?",
    "Describe it.",
    "Which is the brightest corner of this picture?",
)
CHOICES = ("red", "blue and a little green", "no idea")
TASK = """
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
task: {name}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
"""
GENERATE = """
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
CHOOSE = """
doc_to_target: 2
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
UTILS = """
def visual(doc):
    return [image.convert("RGB") for image in doc["images"]]

def text(doc):
    return doc["question"]
"""


def pictures(index):
    """One picture, or two, or none."""
    return [make_picture(10 * index + n) for n in range((1, 2, 1, 0, 1)[index])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lmms")


@pytest.fixture
def saved(folder, build):
    """A toy model that says something, and not always the same, its processor, and its folder."""
    model, processor = build()
    parts, table = (model.model.language_model.layers, model.model.multi_modal_projector), model.get_input_embeddings().weight
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (parameter for part in parts for parameter in part.parameters() if parameter.ndim == 2):
            parameter.normal_(std=0.4, generator=random)
        # Neither special tokens nor those without any text.
        table[[i for i in range(len(table)) if not processor.decode([i], skip_special_tokens=True).strip()]] = 0
    if not (folder / "model").exists():
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        write_tasks(folder)
    return model.eval(), processor, folder / "model"


def write_tasks(folder: Path) -> None:
    rows = [
        {"question": question, "images": pictures(i), "answer": "2", "choices": list(CHOICES)}
        for i, question in enumerate(QUESTIONS)
    ]
    features = Features(
        {
            "question": Value("string"),
            "images": Sequence(Image()),
            "answer": Value("string"),
            "choices": Sequence(Value("string")),
        }
    )
    DatasetDict({"test": Dataset.from_list(rows, features=features)}).save_to_disk(folder / "data")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "utils.py").write_text(UTILS)
    for name, kind, rest in (("toy_answers", "generate_until", GENERATE), ("toy_choices", "multiple_choice", CHOOSE)):
        text = TASK.format(data=folder / "data", name=name, kind=kind) + rest
        (folder / "tasks" / f"{name}.yaml").write_text(text)


def lmms_eval(folder: Path, tasks: str, *options: str) -> dict[str, list[dict]]:
    """Run the command; by task the samples that it logs, in the order of the documents."""
    output = folder / "output" / "-".join([tasks, *options]).replace(",", "+")
    command = [
        str(Path(sys.executable).parent / "lmms-eval"),
        *("--model", "granulon", "--model_args", f"pretrained={folder / 'model'}", "--device", "cpu"),
        *("--include_path", str(folder / "tasks"), "--tasks", tasks, "--log_samples", "--output_path", str(output), *options),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    files = {task: next(output.rglob(f"*samples_{task}.jsonl"), None) for task in tasks.split(",")}
    assert all(files.values()), done.stdout + done.stderr  # the exit status is 0 whatever happens
    return {
        task: sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        for task, file in files.items()
    }


def expected(model, processor, **options) -> list[str]:
    samples = [
        Sample(str(i), pictures(i), [strip_images(make_conversation(question, pictures(i)))], "", "vqa")
        for i, question in enumerate(QUESTIONS)
    ]
    answers = [answer_batch(model, processor, [sample], Generation(max_new_tokens=8, **options))[0] for sample in samples]
    return [answer["prediction"] for answer in answers]


def strip_images(conversation):
    (turn,) = conversation
    parts = [{"type": "image"} if part["type"] == "image" else part for part in turn["content"]]
    return {**turn, "content": parts}


@pytest.mark.slow
def test_chat_answers_are_those_of_answer_batch(saved):
    model, processor, path = saved
    rows = lmms_eval(path.parent, "toy_answers", "--batch_size", "3")["toy_answers"]
    want = expected(model, processor)
    assert [row["filtered_resps"] for row in rows] == want
    assert len(set(want)) > 2 and all(want)


@pytest.mark.slow
def test_simple_answers_and_choices(saved):
    """Choices against the model's own training loss on the whole conversation, one answer at a time."""
    model, processor, path = saved
    samples = lmms_eval(path.parent, "toy_answers,toy_choices", "--force_simple", "--batch_size", "4")
    assert [row["filtered_resps"] for row in samples["toy_answers"]] == expected(model, processor)
    for index, row in enumerate(samples["toy_choices"]):
        losses = [oracle(model, processor, index, choice) for choice in CHOICES]
        assert [float(loss) for loss, greedy in row["filtered_resps"]] == pytest.approx(losses, abs=1e-3)
        assert row["acc"] == float(losses.index(min(losses)) == 2)
    assert {row["acc"] for row in samples["toy_choices"]} == {0, 1}


def oracle(model, processor, index, choice):
    inputs = make_inputs(processor, [make_conversation(QUESTIONS[index], pictures(index))])
    prompt = inputs["input_ids"].shape[1]
    answer = torch.tensor([processor.tokenizer.encode(choice, add_special_tokens=False)])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["question_mask"] = torch.nn.functional.pad(inputs["question_mask"], (0, answer.shape[1]))
    inputs.pop("mm_token_type_ids", None)
    labels = inputs["input_ids"].clone()
    labels[:, :prompt] = -100
    with torch.inference_mode():
        return model(**inputs, labels=labels).loss.item()


def make_requests(lm, questions, see=lambda doc: None, **arguments):
    lm.task_dict = {"toy": {"test": list(range(len(questions)))}}
    return [
        Instance(
            "generate_until",
            (question, arguments, see, i, "toy", "test"),
            0,
            {"task": "toy", "doc_id": i, "repeats": 1},
        )
        for i, question in enumerate(questions)
    ]


def ask(lm, see=lambda doc: None, **arguments):
    return [result.text for result in lm.generate_until(make_requests(lm, QUESTIONS, see, **arguments))]


def test_a_level_is_forced(saved):
    model, processor, path = saved
    first, last = model.config.level_names[0], model.config.level_names[-1]
    lm = Granulon.create_from_arg_string(f"pretrained={path},granularity={first}", {"device": "cpu", "batch_size": "2"})
    want = expected(model, processor, granularity=first)
    assert ask(lm, pictures, max_new_tokens=8) == want
    assert want != expected(model, processor, granularity=last)


def test_what_is_not_supported_is_refused(saved):
    lm = Granulon(str(saved[2]), device="cpu")
    with pytest.raises(ValueError, match="video"):
        ask(lm, lambda doc: ["clip.mp4"])
    with pytest.raises(NotImplementedError, match="toy"):
        lm.generate_until_multi_round(make_requests(lm, QUESTIONS))
    with pytest.raises(ValueError, match="--batch_size auto"):
        Granulon(str(saved[2]), device="cpu", batch_size="auto")
    with pytest.raises(ValueError, match="huge"):
        Granulon(str(saved[2]), device="cpu", granularity="huge")


def test_stop_strings_end_an_answer_wherever_they_stand(saved):
    lm = Granulon(str(saved[2]), device="cpu", batch_size=3)
    whole = ask(lm, max_new_tokens=12)
    stop = next(text for text in whole if len(text) > 4)[2:4]
    assert ask(lm, max_new_tokens=12, until=[stop]) == [text.split(stop)[0].strip() for text in whole]
    assert ask(lm, max_new_tokens=12, until=stop, num_beams=1) == ask(lm, max_new_tokens=12, until=[stop])
    assert ask(lm, max_new_tokens=12, until=["\n\n"]) == whole  # the harness's own delimiter
    assert len(ask(lm, max_new_tokens=4, num_beams=2, until=[stop])) == len(QUESTIONS)


def test_generation_arguments():
    greedy, until = make_generation({"temperature": 0.0, "top_p": 1.0, "do_sample": True, "until": ["\n\n", "Q:"]}, "fine")
    assert greedy.extra == {"do_sample": False} and greedy.granularity == "fine" and until == ["Q:"]
    assert greedy.max_new_tokens == 1024
    sampled, _ = make_generation({"temperature": 0.7, "top_k": None, "num_beams": 1, "image_aspect_ratio": "pad"}, None)
    assert sampled.extra == {"do_sample": True, "temperature": 0.7, "num_beams": 1}
    assert make_generation({"do_sample": False, "temperature": 0.7}, None)[0].extra == {"do_sample": False}
