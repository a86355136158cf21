"""The judge as a scorer of inspect_ai: its prompt, its fence around what a model wrote, and its reading of replies.

    pip install "granulon-hf[inspect]"

```
Task(dataset=…, solver=generate(), scorer=granulon_judge("openai/gpt-4o", task="caption"))
```

The image is the one of the sample's input, the question its text, the reference its target. Scores are from 0 to 100; a sample
without a reading, such as one that the judge refused twice, is unscored and in no mean. Requests are inspect_ai's own: its
retries, limits, cache and logs.
"""

import secrets
from typing import Literal

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

from granulon_hf.judge.prompts import REPAIR, render
from granulon_hf.judge.replies import parse

NAMES = ("accuracy", "hallucination")


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
        config (`GenerateConfig`, *optional*): of the judge; by default its temperature is 0, which reasoning models refuse.
    """
    config = GenerateConfig(temperature=0) if config is None else config

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        if not answer.strip():
            return unscored("the answer is empty")
        images = [part for message in state.messages if isinstance(message, ChatMessageUser) for part in parts_of(message)]
        if len(images) != 1:
            return unscored(f"the judge looks at one image; the input has {len(images)}")
        system, text = render(task, answer, state.input_text, target.text, secrets.token_hex(16) if hardened else None)
        asked: list[ChatMessage] = [ChatMessageUser(content=[ContentText(text=text), *images])]
        if system is not None:
            asked.insert(0, ChatMessageSystem(content=system))
        judge = get_model(model)
        for last in (False, True):
            output = await judge.generate(asked, config=config)
            try:
                found = dict(zip(NAMES, parse(output.completion), strict=True))
                return Score(value=found, answer=answer, explanation=output.completion)
            except ValueError as error:
                if last:
                    return unscored(str(error), output.completion)
            # As the judge itself does, ask once more: of the printed prompt there is no form for it but itself.
            if hardened:
                asked += [ChatMessageAssistant(content=output.completion or "(nothing)"), ChatMessageUser(content=REPAIR)]
        raise AssertionError  # the loop returns

    return score


def parts_of(message: ChatMessageUser) -> list[ContentImage]:
    return [] if isinstance(message.content, str) else [part for part in message.content if isinstance(part, ContentImage)]


def unscored(reason: str, reply: str = "") -> Score:
    """Make a score that no mean counts."""
    return Score(value=dict.fromkeys(NAMES, float("nan")), explanation=f"unscored: {reason}", metadata={"reply": reply})
