"""Judges that reason, retire or are not known; answers that reach their limit; panels and repeats."""

import collections
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from granulon_hf.evaluation import judge_table
from granulon_hf.judge import judge as module
from granulon_hf.judge import models
from granulon_hf.judge.models import JudgeModel, choices, find_model, is_own
from granulon_hf.judge.options import Options
from tests.judge.server import GOOD, Reply, Server, prediction_of, text_of

RETIRED = {"old": {"prompt": 1, "completion": 1, "retires": "2000-01-01", "successor": "new"}}
REASONS = {"thinker": {"prompt": 1, "completion": 4, "reasons": True, "context": 50_000, "output": 20_000}}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "AZURE_OPENAI_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(models, "today", lambda: datetime.date(2026, 11, 28))  # while gpt-4o is served
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def metric(tmp_path):
    return module.Judge(cache_dir=str(tmp_path / "cache"))


def score(metric, server, predictions, **kwargs):
    images = [Image.new("RGB", (24, 16), (i, 90, 30)) for i in range(len(predictions))]
    kwargs = {"api_key": "sk-test", "store": "scores.jsonl", "n_resamples": 50, "base_url": server.url, **kwargs}
    return metric.compute(predictions=predictions, images=images, **kwargs)


def stored():
    return [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_entry_of_the_table_is_a_judge():
    for name in models.MODELS:
        model = find_model(name)
        assert model.prompt > 0 and model.completion > model.prompt and model.context > 8_000 and model.output > 1_000
    assert find_model("gpt-4o") == find_model("gpt-4o-2024-11-20") != find_model("gpt-4o-2024-05-13")
    assert find_model("gpt-4o").prompt == 2.5 and not find_model("gpt-4o").reasons
    assert find_model("o3").reasons and find_model("unheard-of") is None
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", module.PRICES_DATE)


def test_the_table_is_made_of_litellms_prices(tmp_path):
    row = {"litellm_provider": "openai", "mode": "chat", "supports_vision": True, "max_input_tokens": 9, "max_output_tokens": 5}
    row |= {"input_cost_per_token": 2.5e-6, "output_cost_per_token": 1e-5}
    listed = {
        "gpt-4o": {**row, "deprecation_date": "2027-01-14", "successor_model": "gpt-6-luna"},
        "gpt-4o-2024-11-20": {**row, "deprecation_date": "2027-01-14", "successor_model": "gpt-6-luna"},
        "gpt-4o-2024-05-13": row,
        "gpt-5-mini": {**row, "supports_reasoning": True, "supported_endpoints": ["/v1/chat/completions"]},
        "gpt-5-pro": {**row, "supported_endpoints": ["/v1/responses"]},
        "gpt-4o-search-preview": row,
        "gpt-image-2": {**row, "mode": "image_generation"},
        "azure/gpt-4o": {**row, "litellm_provider": "azure"},
        "gpt-3.5-turbo": {**row, "supports_vision": False},
        "sample_spec": {"mode": "one of: chat"},
    }
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(listed))
    found = judge_table.read_litellm(path)
    assert set(found) == {"gpt-4o", "gpt-4o-2024-05-13", "gpt-5-mini"}
    assert found["gpt-4o"]["prompt"] == 2.5 and found["gpt-4o"]["retires"] == "2027-01-14"
    assert found["gpt-5-mini"]["reasons"] and found["gpt-5-mini"]["image"] == {"patch": 1.62}
    assert all(JudgeModel.model_validate(fields) for fields in found.values())
    odd = {"gpt-8": {**row, "deprecation_date": "soon"}, "gpt-8.1": {**row, "max_input_tokens": -1}, "gpt-8.2": 5}
    odd |= {"gpt-8.3": {**row, "input_cost_per_token": None}, "gpt-8.4": {**row, "supported_endpoints": None}}
    odd["gpt-8.5"] = {name: value for name, value in row.items() if name != "max_output_tokens"}
    path.write_text(json.dumps({**odd, **listed, "note": "no judge"}))
    skipped: dict[str, str] = {}
    assert judge_table.read_litellm(path, skipped) == found and set(skipped) == set(odd)
    for text in ("[]", "5", "{", "{}", json.dumps(odd)):
        path.write_text(text)
        with pytest.raises(judge_table.GranulonError, match=r"prices\.json"):
            judge_table.read_litellm(path)


def test_given_fields_replace_those_of_the_table():
    given = {"gpt-4o": {"prompt": 9, "completion": 9}, "own": None}
    assert find_model("gpt-4o", given).prompt == 9 and find_model("gpt-4o", given).context == 128_000
    assert find_model("own", given) == JudgeModel()
    assert choices(given)[:2] == ["own", "gpt-4o"] and "old" not in choices(RETIRED)
    for wrong in ({"prise": 1}, {"prompt": -1, "completion": 1}, {"prompt": 1}, {"retires": "soon"}, {"image": {"x": 1}}, [1]):
        with pytest.raises(ValueError, match="judge_models"):
            Options(model="x", judge_models={"x": wrong})


def test_what_is_given_of_a_family_is_of_its_snapshots_too():
    given = {"gpt-9": {"prompt": 1, "completion": 2, "reasons": True}, "gpt-4o": {"prompt": 9, "completion": 9}}
    snapshot = Options(model="gpt-9-2030-01-01", judge_models=given)
    assert snapshot.refusal() is None and snapshot.known == find_model("gpt-9", given) and snapshot.known.reasons
    assert find_model("gpt-4o-2024-11-20", given).prompt == 9 and find_model("gpt-4o-2024-05-13", given).prompt == 5
    both = {**given, "gpt-9-2030-01-01": {"prompt": 3, "completion": 4}}
    assert find_model("gpt-9-2030-01-01", both) == JudgeModel(prompt=3, completion=4, reasons=True)
    assert find_model("gpt-9-2030-01-01", {"gpt-8": None}) is None


def test_an_estimate_says_whose_prices_it_counts_with(metric):
    arguments = {"predictions": ["x"], "images": [Image.new("RGB", (8, 8))], "store": None}
    given = {"gpt-9": {"prompt": 1, "completion": 2}, "gpt-4o": {"retires": None}}
    for names, sources in (
        ("gpt-4o", ["table"]),
        (["gpt-9-2030-01-01", "gpt-9"], ["judge_models"]),
        (["gpt-9", "gpt-4o", "own"], ["judge_models", "prices", "table"]),
    ):
        found = metric.estimate(**arguments, model=names, judge_models=given, prices={"own": (1, 1)})
        assert found["priced_by"] == sources
        assert found["prices_date"] == (module.PRICES_DATE if "table" in sources else None)
    with Server() as server:
        assert score(metric, server, ["x"], model="gpt-9", judge_models=given)["prices_date"] is None
        assert score(metric, server, ["x"])["prices_date"] == module.PRICES_DATE


@pytest.mark.parametrize(
    "image", ["http://127.0.0.1:9/a.png", "S3://b/a.png", "data:image/png;base64,iVBO", {"path": "https://a/b"}]
)
def test_an_address_is_no_image(metric, image):
    with Server() as server:
        with pytest.raises(ValueError, match="path"):
            metric.compute(predictions=["a"], images=[image], base_url=server.url, store=None)
        assert not server.requests


def test_prices_of_ones_own_server():
    assert Options(model="own", base_url="http://localhost:8000/v1").price() == (0, 0)
    assert Options(model="own", base_url="https://openrouter.ai/api/v1").price() is None
    assert Options(model="gpt-4o", base_url="http://127.0.0.1:1/v1").price() == pytest.approx((2.5e-6, 1e-5))
    with pytest.raises(ValueError, match="max_cost"):
        Options(model="own", base_url="http://localhost:8000/v1", max_cost=1)
    assert [is_own(f"http://{host}/v1") for host in ("127.0.0.1:8", "[::1]:8", "10.1.2.3", "gpu.local", "a.b", "8.8.8.8")] == [
        *(True, True, True, True, False, False)
    ]


# --- who cannot judge -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "gpt-7-imaginary"}, ("gpt-7-imaginary", "gpt-4o")),
        ({"model": "gpt-4-turbo"}, ("gpt-4-turbo", "2026-10-23", "gpt-4o")),
        ({"model": "old", "judge_models": RETIRED}, ("2000-01-01", "new")),
        ({"model": ["gpt-4o", "gpt-7-imaginary"]}, ("gpt-7-imaginary",)),
    ],
)
@pytest.mark.parametrize("backend", ["chat", "batch"])
def test_a_judge_that_openai_does_not_serve_is_told_before_anything_is_sent(metric, monkeypatch, options, words, backend):
    sent = []
    monkeypatch.setattr(module.Panel, "run", lambda panel: sent.append(panel))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        metric.compute(predictions=["a"], images=[Image.new("RGB", (8, 8))], store="s.jsonl", backend=backend, **options)
    assert not sent and all(word in str(error.value) for word in words) and str(error.value).count("\n") == 0
    assert "gpt-4-turbo," not in str(error.value)  # no choice


def test_stored_answers_of_a_retired_judge_are_still_reported(metric):
    with Server() as server:
        score(metric, server, ["a"], model="old", judge_models=RETIRED)
    images = [Image.new("RGB", (24, 16), (0, 90, 30))]
    again = metric.compute(predictions=["a"], images=images, store="scores.jsonl", model="old", judge_models=RETIRED)
    assert again["accuracy"] == 70 and again["n_requests"] == 0


@pytest.mark.parametrize("lists", [True, False])
def test_a_model_that_the_server_does_not_know_is_told_with_those_that_it_serves(metric, lists):
    with Server(lambda server, body: Reply(status=404, error=("model_not_found", "no such model"))) as server:
        if lists:
            server.batches = {name: {"id": name, "object": "model"} for name in ("llava", "qwen-vl")}  # what a GET lists
        with pytest.raises(module.JudgeError) as error:
            score(metric, server, ["a", "b"], model="lava")
        assert len(server.requests) == 1
    assert ("llava, qwen-vl" in str(error.value)) == lists and "no such model" in str(error.value)


def test_a_judge_that_retires_soon_still_judges(metric, monkeypatch):
    assert Options().refusal() is None
    monkeypatch.setattr(models, "today", lambda: datetime.date(2027, 1, 14))
    assert "gpt-6-luna" in Options().refusal() and Options(judge_models={"gpt-4o": {"retires": None}}).refusal() is None
    assert Options(base_url="http://gpu.local/v1").refusal() is None and Options(prices={"gpt-4o": (1, 1)}).refusal() is None


def test_a_server_that_is_pinned_to_another_model_is_told_too(metric):
    """`transformers serve` answers 400 then, with a "detail" as FastAPI makes it."""

    def behave(server, body):
        return Reply(
            status=400, raw=json.dumps({"detail": f"Server is pinned to 'llava'; requested {body['model']!r}."}).encode()
        )

    with Server(behave) as server:
        server.batches = {"llava": {"id": "llava", "object": "model"}}
        with pytest.raises(module.JudgeError, match="choose one of llava; .*pinned to 'llava'"):
            score(metric, server, ["a", "b"], model="lava")
        refused = score(metric, server, ["a"], model="llava")  # is listed: the error is about something else
    assert not server.paid and "pinned" in refused["reasons"][0]


def test_stores_of_before_are_still_read():
    """The key of the paper's request, as it was before there were panels, samples and judges that reason."""
    shown = module.encode_image(Image.new("RGB", (8, 6), (1, 2, 3)))
    key, *_ = Options().prepare(module.Unit(0, None, "a cat", shown, "", ""))
    assert key == "3623cb0c4d4f022a5cb8d8b0588dabc03adb05850d44a3ff"


# --- judges that reason, and limits -----------------------------------------------------------------------------------


def test_a_judge_that_reasons_gets_a_budget_and_no_temperature(metric):
    with Server() as server:
        result = score(metric, server, ["a"], model="thinker", judge_models=REASONS, temperature=0.5)
        score(metric, server, ["a"], model="thinker", judge_models=REASONS, reasoning_effort="high", max_tokens=900)
        score(metric, server, ["a"])
    first, second, paper = server.requests
    assert first["max_completion_tokens"] == 4_000 and first["reasoning_effort"] == "low"
    assert not {"temperature", "max_tokens"} & first.keys()
    assert second["max_completion_tokens"] == 900 and second["reasoning_effort"] == "high"
    assert paper["max_tokens"] == 100 and paper["temperature"] == 0 and "reasoning_effort" not in paper
    assert result["parameters"]["reasoning_effort"] == "low" and text_of(first).startswith("You are an objective evaluator")


@pytest.mark.parametrize("backend", ["chat", "batch"])
@pytest.mark.parametrize("hardened", [True, False])
def test_an_answer_that_reached_its_limit_is_asked_for_once_more_with_a_higher_one(metric, backend, hardened):
    def behave(server, body):
        limit = body.get("max_completion_tokens") or body["max_tokens"]
        return Reply("<think>Hm", finish="length") if limit < 2_000 or prediction_of(body) == "never" else Reply()

    options = {"backend": backend, "poll_seconds": 0.01, "hardened": hardened}
    with Server(behave, polls=0) as server:
        result = score(metric, server, ["a", "never"], **options)
        assert len(server.requests) == 4
        again = score(metric, server, ["a", "never"], **options)
        assert len(server.requests) == 4
    first, larger = (body for body in server.requests if prediction_of(body) == "a")
    assert (first["max_tokens"], larger["max_tokens"]) == (100, 4_096)
    marks = re.compile(r"<<<(BEGIN|END) \w{32}>>>")
    assert marks.sub("", text_of(first)) == marks.sub("", text_of(larger)) and len(first["messages"]) == len(larger["messages"])
    assert result["accuracy_scores"] == again["accuracy_scores"] == [70, None]
    assert "truncated" in result["reasons"][1] and result["n_lengthened"] == 2 and result["n_repaired"] == 0
    assert result["tokens"]["prompt_tokens"] == 4_000


def test_the_higher_limit_is_what_the_model_can_write(metric):
    with Server(lambda server, body: Reply("", finish="length")) as server:
        score(metric, server, ["a"], model="thinker", judge_models=REASONS, max_tokens=8_000)
        score(metric, server, ["b"], model="thinker", judge_models=REASONS, max_tokens=1_500)
    assert [body["max_completion_tokens"] for body in server.requests] == [8_000, 20_000, 1_500, 6_000]


def test_long_answers_are_waited_for_longer(metric):
    assert Options(timeout=5).patience([]) == 5 < Options(timeout=5, max_tokens=1_100).patience([])

    def behave(server, body):
        return Reply(delay=0.5) if body["max_tokens"] > 100 else Reply("", finish="length")

    with Server(behave) as server:
        assert score(metric, server, ["a"], timeout=0.3, max_retries=0)["accuracy_scores"] == [70]


@pytest.mark.parametrize("order", [("length", "unread"), ("unread", "length")])
def test_a_higher_limit_and_a_repair_may_both_be_needed(metric, order):
    kinds = {"length": Reply("<think>", finish="length"), "unread": Reply("Good!")}
    replies = iter([*(kinds[kind] for kind in order), Reply()])
    with Server(lambda server, body: next(replies)) as server:
        result = score(metric, server, ["a"])
        assert score(metric, server, ["a"])["n_requests"] == 0
    assert result["accuracy_scores"] == [70] and len(server.requests) == 3
    last = server.requests[2]
    assert last["max_tokens"] == 4_096 and last["messages"][2]["content"] == "Good!"
    assert len({body["seed"] for body in server.requests}) == 3


def test_kill_between_a_cut_answer_and_the_longer_one_pays_for_the_longer_one_only(metric):
    with Server(lambda server, body: Reply("", finish="length")) as server:
        score(metric, server, ["a"])
        lines = Path("scores.jsonl").read_text().splitlines()
        Path("scores.jsonl").write_text(lines[0] + "\n" + lines[1][:40])  # the second was being written
        server.behave = lambda server, body: Reply()
        assert score(metric, server, ["a"])["accuracy"] == 70
    assert [body["max_tokens"] for body in server.requests] == [100, 4_096, 4_096]


def test_the_higher_limit_counts_in_the_budget(metric):
    """100 tokens are foreseen to cost 0.0035 USD at most with the prompt, 4,096 cost 0.04."""
    with Server(lambda server, body: Reply("", finish="length")) as server:
        result = score(metric, server, ["a"], max_cost=0.01)
    assert len(server.requests) == 1 and "max_cost" in result["reasons"][0]


# --- panels and repeats -----------------------------------------------------------------------------------------------


def by_judge(server, body):
    """Accuracy is 60 of judge "a" and 80 of judge "b", and one more with every seed."""
    value = {"a": 60, "b": 80}[body["model"]] + body["seed"] // 100
    return Reply(json.dumps({"accuracy_score": value, "hallucination_score": 10}))


def name_of(body):
    return f"{body['model']} {prediction_of(body)} {body['seed']}"


def test_a_panel_is_one_run_with_a_column_for_each_judge(metric):
    seen = []
    with Server(by_judge) as server:
        result = score(metric, server, ["x", "y", ""], model=["a", "b"], on_result=seen.append)
        again = score(metric, server, ["x", "y", ""], model=["a", "b"])
        assert len(server.requests) == 4
        alone = score(metric, server, ["x", "y", ""], model="a")  # the panel has asked already
        assert len(server.requests) == 4
    assert result["accuracy_scores"] == again["accuracy_scores"] == [70, 70, 0] and result["model"] == ["a", "b"]
    assert result["judges"]["a"]["accuracy_scores"] == alone["accuracy_scores"] == [60, 60, 0]
    assert result["judges"]["b"]["accuracy"] == pytest.approx(160 / 3)
    assert result["accuracy_spread"] == pytest.approx([200**0.5, 200**0.5, 0]) and result["n_empty"] == 1
    assert result["judge_models"] == ["a-2024-11-20", "b-2024-11-20"] and result["tokens"]["prompt_tokens"] == 4_000
    assert "judges" not in alone and seen[-1]["done"] == seen[-1]["total"] == 4


def test_samples_are_averaged_and_the_first_is_the_one_of_before(metric):
    with Server(by_judge) as server:
        one = score(metric, server, ["x"], model="a")
        three = score(metric, server, ["x"], model="a", samples=3)
        assert len(server.requests) == 3
        both = score(metric, server, ["x"], model=["a", "b"], samples=3)
        assert len(server.requests) == 6
    assert one["accuracy_scores"] == [60] and three["accuracy_scores"] == [61] and three["accuracy_spread"] == [1]
    assert three["judges"]["a"]["accuracy_samples"] == [[60, 61, 62]]
    assert both["accuracy_scores"] == [71] and both["judges"]["b"]["accuracy_spread"] == [1]
    assert both["accuracy_spread"] == pytest.approx([200**0.5])


def test_what_one_judge_did_not_score_the_panel_has_not_scored(metric):
    def behave(server, body):
        bad = body["model"] == "b" and prediction_of(body) == "y"
        return Reply(None, refusal="no") if bad else by_judge(server, body)

    with Server(behave) as server:
        result = score(metric, server, ["x", "y"], model=["a", "b"])
    assert result["accuracy_scores"] == [70, None] and "refused" in result["reasons"][1]
    assert (result["n_scored"], result["n_unscored"]) == (1, 1) and result["judges"]["a"]["n_scored"] == 2


def test_a_sample_that_failed_is_left_out_of_the_mean(metric):
    def behave(server, body):
        return Reply(None, refusal="no") if body["seed"] == 100 else by_judge(server, body)

    with Server(behave) as server:
        result = score(metric, server, ["x"], model="a", samples=3)
    assert result["accuracy_scores"] == [61] and result["judges"]["a"]["accuracy_samples"] == [[60, None, 62]]


def test_a_panel_has_one_budget(metric):
    prices = {"a": (2.5, 10), "b": (2.5, 10)}
    texts = [f"{i}" for i in range(10)]
    with Server(by_judge) as server:
        first = score(metric, server, texts, model=["a", "b"], prices=prices, max_cost=0.03, concurrency=1)
        n = len(server.requests)
        rest = score(metric, server, texts, model=["a", "b"], prices=prices, concurrency=1)
    assert 0.025 < first["spent_usd"] <= 0.03 and n == 10 and first["n_scored"] == 5  # of ten answers whole panels
    assert first["spent_usd"] == pytest.approx(sum(one["spent_usd"] for one in first["judges"].values()))
    assert rest["n_requests"] == 20 - n and len(server.requests) == 20
    assert rest["cost_usd"] == pytest.approx(20 * (1_000 * 2.5e-6 + 20 * 1e-5))


@pytest.mark.parametrize("backend", ["chat", "batch"])
@pytest.mark.parametrize("concurrency", [1, 64])
def test_a_budget_buys_whole_panels(metric, backend, concurrency):
    options = {"model": ["a", "b"], "samples": 2, "prices": {"a": (2.5, 10), "b": (2.5, 10)}, "backend": backend}
    options |= {"concurrency": concurrency, "poll_seconds": 0.01}
    texts = [f"{i}" for i in range(12)]
    with Server(by_judge, polls=0, name_of=name_of) as server:
        # A batch costs half, and is submitted before the server has said how many tokens a prompt is.
        first = score(metric, server, texts, **options, max_cost=0.05 if backend == "chat" else 0.028)
        n = len(server.requests)
        rest = score(metric, server, texts, **options)
    assert n == 4 * first["n_scored"] and 3 <= first["n_scored"] < 12 and first["spent_usd"] <= 0.05
    assert first["n_unscored"] == 12 - first["n_scored"] and "max_cost" in first["reasons"][-1]
    assert rest["n_scored"] == 12 and set(server.paid.values()) == {1} and len(server.paid) == 48


def test_a_repair_beyond_the_budget_keeps_nobody_elses_panel_from_its_answers(metric):
    def behave(server, body):
        return Reply("<think>", finish="length") if prediction_of(body) == "0" else by_judge(server, body)

    options = {"model": ["a", "b"], "prices": {"a": (2.5, 10), "b": (2.5, 10)}, "max_cost": 0.04}
    with Server(behave) as server:
        result = score(metric, server, [f"{i}" for i in range(5)], **options)
    assert [value is None for value in result["accuracy_scores"]] == [True, False, False, False, False]


@pytest.mark.parametrize("backend", ["chat", "batch"])
@pytest.mark.parametrize("error", [(404, "model_not_found", "no such model"), (401, "invalid_api_key", "Incorrect API key")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_judge_that_the_server_refuses_is_known_before_any_is_paid(metric, backend, error, place):
    names = ["a", "b", "c"]
    with Server() as server:
        server.models = {**dict.fromkeys(names), names[place]: error}
        with pytest.raises(module.JudgeError, match=error[2]):
            score(metric, server, ["x", "y"], model=names, backend=backend, poll_seconds=0.01)
        assert not server.requests and not server.files


def test_stored_answers_of_a_judge_that_is_gone_are_used_in_a_panel(metric):
    with Server(by_judge) as server:
        score(metric, server, ["x", "y"], model="a")
        server.models = {"a": (404, "model_not_found", "no such model"), "b": None}
        result = score(metric, server, ["x", "y"], model=["a", "b"])
    assert result["accuracy_scores"] == [70, 70] and len(server.requests) == 4


@pytest.mark.parametrize("listed", [None, {}, {"a": (403, "", "Missing scopes: x"), "b": (401, "", "Missing scopes: x")}])
@pytest.mark.parametrize("status", [401, 404])
def test_where_no_server_tells_for_nothing_the_first_answer_goes_to_every_judge(metric, listed, status):
    """A 404 of a server that has no such address is no proof; nor is a key that may not look at models."""

    def behave(server, body):
        return Reply(status=status) if body["model"] == "b" else by_judge(server, body)

    with Server(behave) as server:
        server.models = listed
        with pytest.raises(module.JudgeError):
            score(metric, server, [f"{i}" for i in range(20)], model=["a", "b"], samples=2)
        assert [body["model"] for body in server.requests] == ["a", "b"] and sum(server.paid.values()) == 1
        server.behave = by_judge
        assert score(metric, server, ["0", "1"], model=["a", "b"])["n_scored"] == 2


@pytest.mark.parametrize("url", [True, False])
def test_a_key_that_is_not_set_is_told_before_anything_is_sent(metric, monkeypatch, url):
    with Server() as server:
        given = {"b": {"api_key_env": "OTHER_KEY", **({"base_url": server.url} if url else {})}}
        with pytest.raises(ValueError, match="OTHER_KEY"):
            score(metric, server, ["x"], model=["a", "b"], judge_models=given)
        assert not server.requests
        monkeypatch.setenv("OTHER_KEY", "sk-other")
        score(metric, server, ["x"], model=["a", "b"], judge_models=given)
        assert [headers["authorization"] for headers in server.headers] == ["Bearer sk-test", "Bearer sk-other"]


def test_a_panel_by_batch_submits_one_batch_for_each_judge(metric):
    with Server(by_judge, polls=0) as server:
        options = {"model": ["a", "b"], "samples": 2, "backend": "batch", "poll_seconds": 0.01}
        result = score(metric, server, ["x", "y"], **options)
        score(metric, server, ["x", "y"], **options)
        assert server.batch_creations == 2
    assert result["accuracy_scores"] == [70.5, 70.5]


def test_estimate_of_a_panel(metric):
    arguments = {"predictions": ["x", "y", ""], "images": [Image.new("RGB", (8, 8))] * 3, "store": None}
    one, panel = metric.estimate(**arguments), metric.estimate(**arguments, model=["gpt-4o", "gpt-4o-mini"], samples=3)
    assert (one["n_requests"], panel["n_requests"], panel["n"], panel["n_empty"]) == (2, 12, 3, 1)
    assert panel["cost_usd"] > 3 * one["cost_usd"]
    assert metric.estimate(**arguments, model=["gpt-4o", "own"])["cost_usd"] is None
    for wrong in ([], ["gpt-4o", "gpt-4o"]):
        with pytest.raises(ValueError, match="model"):
            metric.estimate(**arguments, model=wrong)


PANEL = """
import sys
from PIL import Image
from granulon_hf.judge.judge import Judge
Judge(cache_dir=sys.argv[2]).compute(
    predictions=[f"text {i}" for i in range(12)], images=[Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(12)],
    model=["a", "b"], samples=2, base_url=sys.argv[1], api_key="sk", store="scores.jsonl", concurrency=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rows", [5, 30])
def test_kill_9_in_a_panel_pays_for_nothing_twice(tmp_path, rows):
    def behave(server, body):
        reply = by_judge(server, body)
        reply.delay = 0.05
        return reply

    with Server(behave, name_of=name_of) as server:
        command = [sys.executable, "-c", PANEL, server.url, str(tmp_path / "cache")]
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (Path("scores.jsonl").exists() and len(stored()) >= rows):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = len(stored())
        assert rows <= before < 48
        sent = len(server.requests)
        assert subprocess.run(command).returncode == 0
        assert len(server.requests) - sent == 48 - before
    rows = collections.Counter((row["key"], row["attempt"]) for row in stored())
    assert len(rows) == 48 and set(rows.values()) == {1}


def test_judges_of_a_panel_may_have_servers_of_their_own(metric, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    with Server() as first, Server(lambda server, body: Reply(GOOD.replace("70", "50"))) as second:
        given = {"b": {"base_url": second.url, "api_key_env": "OTHER_KEY"}, "c": {"base_url": second.url}}
        result = score(metric, first, ["x"], model=["a", "b", "c"], judge_models=given)
        assert [body["model"] for body in second.requests] == ["b", "c"] and len(first.requests) == 1
        sent = [headers["authorization"] for headers in (*first.headers, *second.headers)]
    assert sent == ["Bearer sk-test", "Bearer sk-other", "Bearer none"]  # nobody's key goes to another server
    assert result["accuracy_scores"] == [pytest.approx(170 / 3)]
