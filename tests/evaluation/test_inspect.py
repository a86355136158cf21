"""The judge in inspect_ai, with its mock model; skipped where inspect_ai is not installed: `pip install inspect-ai`."""

import base64
import math

import pytest

pytest.importorskip("inspect_ai")

from inspect_ai import Task
from inspect_ai import eval as evaluate
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, GenerateConfig, ModelOutput, ModelUsage, get_model

from granulon_hf.evaluation.inspect import granulon_judge
from granulon_hf.judge import models
from granulon_hf.judge.prompts import PROMPTS, REPLY
from tests.data import tables

URL = "data:image/jpeg;base64," + base64.b64encode(tables.jpeg()).decode()
GOOD = '{"accuracy_score": 80, "hallucination_score": 10}'


def ask(question="What is this?", images=1):
    content = [ContentText(text=question), *(ContentImage(image=URL) for _ in range(images))]
    return Sample(input=[ChatMessageUser(content=content)], target="A cat.")


def mock(name, replies, model="model"):
    asked = []

    def reply(messages, tools, tool_choice, config):
        asked.append((messages, config))
        said = replies[min(len(asked), len(replies)) - 1]
        output = said.model_copy() if isinstance(said, ModelOutput) else ModelOutput.from_content(name, said)
        # Without it inspect_ai counts tokens with a vocabulary that it would fetch.
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return output

    return get_model(f"mockllm/{model}", custom_outputs=reply, memoize=False), asked


def run(tmp_path, samples, replies, answer="A dog.", model="model", **options):
    judge, asked = mock("judge", replies, model)
    model, _ = mock("model", [answer])
    task = Task(dataset=MemoryDataset(samples), scorer=granulon_judge(judge, **options))
    (log,) = evaluate(task, model=model, log_dir=str(tmp_path), display="none", max_samples=1)
    assert log.status == "success", log.error
    means = {score.name: score.metrics["mean"].value for score in log.results.scores}
    return means, [sample.scores["granulon_judge"] for sample in log.samples], asked


def test_scores_are_read_as_the_judge_reads_them(tmp_path):
    replies = [GOOD, f"<think>Hm, {{}}</think>Here it is:\n```json\n{GOOD.replace('80', '60.0')}\n```"]
    means, _, asked = run(tmp_path, [ask(), ask()], replies)
    assert means == {"accuracy": 70, "hallucination": 10} and len(asked) == 2
    assert asked[0][1].temperature == 0
    system, user = asked[0][0]
    assert "<<<BEGIN" in user.text and "A dog." in user.text and system.role == "system"
    assert [part.image for part in user.content if part.type == "image"] == [URL]


@pytest.mark.parametrize("task", ["reasoning", "vqa", "caption"])
def test_the_printed_prompt_is_sent_to_the_letter(tmp_path, task):
    _, _, asked = run(tmp_path, [ask()], [GOOD], task=task, hardened=False)
    ((user,),) = (messages for messages, _ in asked)
    values = {"pred": "A dog.", "question": "What is this?", "reference": "A cat."}
    expected = f"{PROMPTS[task]}\n\n{REPLY}"
    for name, value in values.items():
        expected = expected.replace(f"{{{name}}}", value)
    assert user.text == expected


def test_a_reply_that_is_none_is_asked_again_once(tmp_path):
    means, _, asked = run(tmp_path, [ask()], ["Well, 80 and 10.", GOOD])
    assert means["accuracy"] == 80 and [len(messages) for messages, _ in asked] == [2, 4]


@pytest.mark.parametrize(
    ("samples", "replies", "answer", "sent"),
    [
        ([ask()], ['{"accuracy_score": true, "hallucination_score": 10}'], "A dog.", 2),
        ([ask(images=0)], [GOOD], "A dog.", 0),
        ([ask(images=2)], [GOOD], "A dog.", 0),
        ([ask()], [ModelOutput.from_content("judge", GOOD, stop_reason="content_filter")], "A dog.", 1),
        ([ask()], [ModelOutput.from_content("judge", GOOD, stop_reason="max_tokens")], "A dog.", 2),
    ],
)
def test_what_cannot_be_scored_is_in_no_mean(tmp_path, samples, replies, answer, sent):
    _, (score,), asked = run(tmp_path, samples, replies, answer)
    assert math.isnan(score.value["accuracy"]) and "unscored" in score.explanation and len(asked) == sent


def test_an_empty_answer_scores_nothing_without_a_request(tmp_path):
    means, _, asked = run(tmp_path, [ask()], [GOOD], " ")
    assert means == {"accuracy": 0, "hallucination": 0} and not asked


def test_a_reply_that_reached_its_limit_is_asked_for_with_a_larger_one(tmp_path):
    """As the judge does, with the same messages: what was cut off is nothing to be repaired."""
    means, _, asked = run(tmp_path, [ask()], [ModelOutput.from_content("judge", "", stop_reason="max_tokens"), GOOD])
    assert means["accuracy"] == 80 and [len(messages) for messages, _ in asked] == [2, 2]
    assert asked[0][1].max_tokens * 4 <= asked[1][1].max_tokens


def test_the_limit_that_is_given_is_raised_too(tmp_path):
    replies = [ModelOutput.from_content("judge", GOOD, stop_reason="max_tokens"), GOOD]
    means, _, asked = run(tmp_path, [ask()], replies, config=GenerateConfig(max_tokens=8_000))
    assert means["accuracy"] == 80 and [config.max_tokens for _, config in asked] == [8_000, 32_000]


@pytest.mark.parametrize("name", ["thinker", "maker/thinker"])
def test_a_judge_that_is_known_to_reason_is_asked_as_the_judge_asks_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(models.MODELS, "thinker", {"prompt": 1, "completion": 4, "reasons": True, "output": 20_000})
    replies = [ModelOutput.from_content("judge", "", stop_reason="max_tokens"), GOOD]
    means, _, asked = run(tmp_path, [ask()], replies, model=name)
    assert means["accuracy"] == 80 and [config.max_tokens for _, config in asked] == [4_000, 16_000]
    assert {(config.temperature, config.reasoning_effort) for _, config in asked} == {(None, "low")}


def test_one_sample_without_a_reading_does_not_lower_the_mean(tmp_path):
    means, _, _ = run(tmp_path, [ask(), ask(images=0)], [GOOD])
    assert means == {"accuracy": 80, "hallucination": 10}


def test_a_reasoning_judge_is_given_its_own_config(tmp_path):
    config = GenerateConfig(reasoning_effort="low")
    _, _, asked = run(tmp_path, [ask()], [GOOD], config=config)
    assert asked[0][1].temperature is None and asked[0][1].reasoning_effort == "low" and asked[0][1].max_tokens == 4_000
