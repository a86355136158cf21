"""The judge as a scorer of inspect_ai: its prompt, its fence around what a model wrote, and its reading of replies.

    pip install "granulon-hf[inspect]"

```
Task(dataset=…, solver=generate(), scorer=granulon_judge("openai/gpt-4o", task="caption"))
```

The image is the one of the sample's input, the question its text, the reference its target. Scores are from 0 to 100, and 0 for
an empty answer; a sample without a reading, such as one that the judge refused, is unscored and in no mean. Replies are read,
and asked for once more, by the judge's own rules. Requests are inspect_ai's own: its retries, limits, cache and logs.
"""

import secrets
from typing import Any, Literal

from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    Model,
    get_model,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState

from granulon_hf.judge.options import Options
from granulon_hf.judge.prompts import REPAIR, render

NAMES = ("accuracy", "hallucination")
FINISHES = {"max_tokens": "length", "model_length": "length"}  # what OpenAI calls them


@scorer(metrics={name: [mean(), stderr()] for name in NAMES})
def granulon_judge(
    model: str | Model = "openai/gpt-4o",
    task: Literal["reasoning", "vqa", "caption"] = "reasoning",
    hardened: bool = True,
    config: GenerateConfig | None = None,
) -> Scorer:
    """Score answers about an image for accuracy and hallucination.

    Args:
        model (`str` or `Model`): the judge.
        task (`str`): the judge's prompt: of the paper ("reasoning"), or ours for questions and captions.
        hardened (`bool`): fence what the model wrote, so that it cannot instruct the judge; without, the prompt is as printed.
        config (`GenerateConfig`, *optional*): of the judge; by default that of the judge itself, by what is known of the model.
    """
    judge = get_model(model)
    given = config or GenerateConfig()
    # Behind a router the provider is a part of the name. Whoever is told how hard to reason, reasons.
    name, told = judge.name.rpartition("/")[2], given.reasoning_effort or given.reasoning_tokens
    reasons = {name: {"reasons": True}} if told else None
    options = Options(task=task, model=name, hardened=hardened, store=None, max_tokens=given.max_tokens, judge_models=reasons)
    effort: Any = options.reasoning_effort
    config = GenerateConfig(temperature=options.temperature, reasoning_effort=effort) if config is None else config

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        if not answer.strip():
            return Score(value=dict.fromkeys(NAMES, 0), answer=answer, explanation="the answer is empty")
        images = [part for message in state.messages if isinstance(message, ChatMessageUser) for part in parts_of(message)]
        if len(images) != 1:
            return unscored(f"the judge looks at one image; the input has {len(images)}")
        system, text = render(task, answer, state.input_text, target.text, secrets.token_hex(16) if hardened else None)
        asked: list[ChatMessage] = [ChatMessageUser(content=[ContentText(text=text), *images])]
        if system is not None:
            asked.insert(0, ChatMessageSystem(content=system))
        rows: list[dict] = []
        while not options.is_final(rows):
            output = await judge.generate(asked, config=config.merge(GenerateConfig(max_tokens=options.limit(rows))))
            rows.append({"content": output.completion, "finish_reason": FINISHES.get(output.stop_reason, output.stop_reason)})
            # Of the printed prompt there is no form to ask once more but itself.
            if hardened and options.outcome(rows[-1])[1] == "repair":
                asked += [ChatMessageAssistant(content=output.completion or "(nothing)"), ChatMessageUser(content=REPAIR)]
        found, _ = options.outcome(rows[-1])
        if found["reason"] is not None:
            return unscored(found["reason"], output.completion)
        return Score(value={name: found[name] for name in NAMES}, answer=answer, explanation=output.completion)

    return score


def parts_of(message: ChatMessageUser) -> list[ContentImage]:
    return [] if isinstance(message.content, str) else [part for part in message.content if isinstance(part, ContentImage)]


def unscored(reason: str, reply: str = "") -> Score:
    """Make a score that no mean counts."""
    return Score(value=dict.fromkeys(NAMES, float("nan")), explanation=f"unscored: {reason}", metadata={"reply": reply})
