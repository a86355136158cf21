"""Requests that come together share batches, and none of them notices: its answer is that of `generate` for it alone."""

import asyncio
import copy
import re
import threading

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

if not is_serve_available():
    pytest.skip("The serving requirements are not installed: pip install -e '.[serve]'", allow_module_level=True)

from granulon_hf.serving import abandoned
from granulon_hf.serving_batches import BatchManager
from granulon_hf.serving_metrics import Metrics
from tests.conftest import make_conversation, make_inputs, make_picture, make_talkative

QUESTIONS = (
    "What is this?",
    "How many rectangles are there, and of what colour is the largest?",
    "Which is the brightest corner?",
)


@pytest.fixture(autouse=True)
def client_waits():
    nobody = threading.Event()
    abandoned.set(nobody)
    yield
    nobody.set()


@pytest.fixture(params=["granulon-qwen2.5", "granulon-compact-qwen2.5"])
def talker(build, request):
    model, processor = make_talkative(*build(request.param))
    return model.eval(), processor


def ask(talker, index, pictures=1, **options):
    """Return the inputs and the config of a request, as transformers' handlers make them."""
    model, processor = talker
    images = [make_picture(index + i) for i in range(pictures)]
    config = copy.deepcopy(model.generation_config)
    config.update(**{"max_new_tokens": 8, **options})
    return make_inputs(processor, [make_conversation(QUESTIONS[index % 3], images)]), config


def answer_alone(talker, inputs, config):
    found = talker[0].generate(**inputs, generation_config=config, tokenizer=talker[1])
    return talker[1].decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


async def drain(queue) -> str:
    text = ""
    while isinstance(piece := await queue.get(), str):
        text += piece
    assert piece is None, piece.msg
    return text


def answer_together(talker, requests, max_batch=8, streamed=()):
    """Answer requests that all wait before the first of them is begun."""
    metrics = Metrics()

    async def run():
        manager, begin = BatchManager(max_batch, metrics), threading.Event()
        manager.submit(begin.wait)

        async def one(index, inputs, config):
            if index in streamed:
                return await drain(manager.generate_streaming(*talker, inputs, config, str(index))[0])
            return (await manager.generate_non_streaming(*talker, inputs, config, str(index)))[0]

        tasks = [asyncio.create_task(one(index, *request)) for index, request in enumerate(requests)]
        await asyncio.sleep(0)
        assert metrics.queued == len(requests)
        begin.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(run())
    assert metrics.queued == 0
    return answers, metrics


def test_every_row_has_its_own_answer(talker):
    """Lengths, pictures and limits differ, and some answers are streamed."""
    requests = [ask(talker, i, pictures=1 + i % 2, max_new_tokens=(3, 8, 5)[i % 3]) for i in range(6)]
    want = [answer_alone(talker, *request) for request in requests]
    assert len(set(want)) > 3
    answers, metrics = answer_together(talker, requests, streamed=(1, 4))
    assert answers == want and metrics.batches == 1
    answers, metrics = answer_together(talker, requests, max_batch=4)
    assert answers == want and metrics.batches == 2
    answers, metrics = answer_together(talker, requests, max_batch=1)
    assert answers == want and metrics.batches == 6


def test_only_what_fits_shares_a_batch(talker):
    forced = ask(talker, 1)
    forced[0]["granularity"] = talker[0].config.level_names[0]
    requests = [
        ask(talker, 0),
        forced,
        ask(talker, 0, pictures=0),
        ask(talker, 2),
        ask(talker, 0, repetition_penalty=1.5),
        ask(talker, 1, repetition_penalty=1.5),
        ask(talker, 0, no_repeat_ngram_size=2),
        ask(talker, 1, no_repeat_ngram_size=2),
    ]
    want = [answer_alone(talker, *request) for request in requests]
    answers, metrics = answer_together(talker, requests)
    # 0 and 3, 1, 2, 4 and 5, 6, 7
    assert answers == want and metrics.batches == 6
    beams = ask(talker, 0, num_beams=2)
    assert answer_together(talker, [ask(talker, 0)])[0] == want[:1]
    assert asyncio.run(BatchManager(8, Metrics()).generate_non_streaming(*talker, *beams, ""))[0] == answer_alone(
        talker, *beams
    )


def test_stop_strings_end_a_row(talker):
    plain = [answer_alone(talker, *ask(talker, i)) for i in range(3)]
    options = {"stop_strings": re.findall("[a-z]{2}", plain[0])[:1]}
    requests = [ask(talker, i, **options) for i in range(3)]
    want = [answer_alone(talker, *request) for request in requests]
    assert want[0] != plain[0]
    answers, metrics = answer_together(talker, requests, streamed=(0,))
    assert answers == want and metrics.batches == 1


def test_one_bad_request_is_one_error(talker, monkeypatch):
    model, requests = talker[0], [ask(talker, i) for i in range(3)]
    want = [answer_alone(talker, *request) for request in requests]
    requests[1][0]["pixel_values"][:] = torch.inf
    generate = model.generate

    def refuse(**kwargs):
        if kwargs["pixel_values"].isinf().any():
            raise ValueError("no picture")
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", refuse)
    answers, _ = answer_together(talker, requests)
    assert isinstance(answers[1], ValueError) and [answers[0], answers[2]] == [want[0], want[2]]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("cancelled", [True, False])
def test_a_client_that_goes_away_ends_its_generation(talker, streamed, cancelled):
    """In the middle of its answer, and before it."""
    model, metrics = talker[0], Metrics()
    model.generation_config.suppress_tokens = sorted(
        {*model.generation_config.suppress_tokens, model.generation_config.eos_token_id}
    )
    other, want = ask(talker, 1), answer_alone(talker, *ask(talker, 1))

    async def run():
        manager = BatchManager(8, metrics)

        async def leave(wait):
            inputs, config = ask(talker, 0, max_new_tokens=500)
            left = threading.Event()
            abandoned.set(left)
            if streamed:
                _, streamer = manager.generate_streaming(*talker, inputs, config, "")
            else:
                task = asyncio.create_task(manager.generate_non_streaming(*talker, inputs, config, ""))
            await asyncio.sleep(0)
            while wait and not metrics.tokens:
                await asyncio.sleep(0.001)
            left.set()
            if cancelled:
                (streamer if streamed else task).cancel()

        await asyncio.create_task(leave(wait=True))
        begin = threading.Event()
        manager.submit(begin.wait)
        await asyncio.create_task(leave(wait=False))
        after = asyncio.create_task(manager.generate_non_streaming(*talker, *other, ""))
        await asyncio.sleep(0)
        begin.set()
        return (await after)[0]

    assert asyncio.run(run()) == want
    assert metrics.batches == 2 and metrics.tokens < 500


def test_no_answer_is_longer_than_the_model(talker):
    room = talker[0].config.text_config.max_position_embeddings
    inputs, config = ask(talker, 0, max_new_tokens=10**9)
    metrics = Metrics()
    manager = BatchManager(8, metrics)

    async def start(inputs, config):
        abandoned.get().set()
        manager.generate_streaming(*talker, inputs, config, "")

    asyncio.run(start(inputs, config))
    assert config.max_new_tokens == room - inputs["input_ids"].shape[1]
    long = {**inputs, "input_ids": torch.ones(1, room, dtype=torch.long)}
    with pytest.raises(ValueError, match=str(room)):
        asyncio.run(start(long, config))
    with pytest.raises(ValueError, match=str(room)):
        asyncio.run(manager.generate_non_streaming(*talker, long, config, ""))
