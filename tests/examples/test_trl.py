"""The TRL examples on the toy model: what is trained moves and nothing else, pairs come from the judge and are kept."""

import importlib.util
import json
import math
import sys
import zlib
from pathlib import Path

import pytest

pytest.importorskip("trl")

from granulon_hf import variants
from granulon_hf.data.shapes import Shapes
from granulon_hf.training import RecipeError
from granulon_hf.training.preferences import prefer, read_lines
from tests.judge.server import Reply, Server, prediction_of

ROOT = Path(__file__).parents[2]
TINY = ["--variant", "granulon-qwen2.5", "--tiny", "true", "--use_cpu", "true", "--logging_steps", "1"]
SHORT = ["--per_device_train_batch_size", "4", "--max_steps", "4", "--learning_rate", "1e-2"]


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its classes are pickled
    spec.loader.exec_module(module)
    return module


def losses(trainer):
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def moved(trainer):
    before, _ = variants.build("granulon-qwen2.5", tiny=True)
    after = dict(trainer.model.named_parameters())
    return {name for name, value in before.named_parameters() if not value.equal(after[name])}


def judge(server, body):
    """Any two answers differ in their scores, unless they are the same."""
    score = zlib.crc32(prediction_of(body).encode()) % 101
    return Reply(json.dumps({"accuracy_score": 50, "hallucination_score": score}))


@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_sft(tmp_path, batching):
    trainer = example("sft_trl").main([*TINY, *SHORT, "--limit", "8", "--batching", batching, "--output_dir", str(tmp_path)])
    found = losses(trainer)
    assert len(found) == 4 and found[-1] < found[0]
    names = moved(trainer)
    assert names and all("multi_modal_projector" in name for name in names)
    assert not trainer.model.model.vision_tower.training
    assert (tmp_path / "model.safetensors").exists()


def test_dpo(tmp_path):
    dpo = example("dpo_trl")
    with Server(judge) as server:
        arguments = [*TINY, *SHORT, "--limit", "4", "--max_new_tokens", "6", "--output_dir", str(tmp_path)]
        arguments += ["--base_url", server.url, "--model", "local", "--max_cost", "1", "--price", "1", "1"]
        assert dpo.main([*arguments, "--dry_run", "true"]) is None
        assert not server.requests and not (tmp_path / "pairs.jsonl").exists()
        trainer = dpo.main(arguments)
        asked = len(server.requests)
        pairs = read_lines(tmp_path / "pairs.jsonl")
        assert 0 < len(pairs) <= 4 and 0 < asked <= 8
        for pair in pairs:
            scores = [zlib.crc32(pair[name][0]["content"][0]["text"].encode()) % 101 for name in ("chosen", "rejected")]
            assert scores == [pair["chosen_hallucination"], pair["rejected_hallucination"]] and scores[0] < scores[1]
        (tmp_path / "pairs.jsonl").unlink()
        again = dpo.main([*arguments, "--max_steps", "1"])
        assert len(server.requests) == asked  # answers and scores were kept
    assert read_lines(tmp_path / "pairs.jsonl") == pairs
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)  # the reference is the model
    assert losses(trainer)[-1] < losses(trainer)[0] and math.isfinite(losses(again)[0])
    names = moved(trainer)
    assert names and all("multi_modal_projector" in name for name in names)


def test_bad_input_is_refused_before_anything_is_sampled(tmp_path):
    dpo = example("dpo_trl")
    arguments = [*TINY, "--limit", "2", "--output_dir", str(tmp_path)]
    with pytest.raises(RecipeError, match="max_cost needs prices"):
        dpo.main([*arguments, "--model", "local", "--max_cost", "1"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "pairs.jsonl").write_text('{"id": "elsewhere"}\n')
    with pytest.raises(RecipeError, match="of other samples"):
        dpo.main(arguments)


def test_what_is_no_pair_is_dropped_and_counted():
    samples = [Shapes(5)[i] for i in range(5)]
    answers = [["a", "b"], ["c", "d"], ["e", "e"], ["f", "g"], ["h", " "]]
    pairs, counts = prefer(samples, answers, [[40, 0], [0, 90], [5, 5], [None, 7], [30, 0]])
    assert [(pair["chosen"][0]["content"][0]["text"], pair["rejected_hallucination"]) for pair in pairs] == [
        ("b", 40),
        ("c", 90),
    ]
    assert counts == {"pairs": 2, "ties": 1, "unscored": 1, "empty": 1}
    assert pairs[0]["id"] == samples[0].id and pairs[0]["prompt"] == samples[0].prompt


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id": 2}\n{"id"')
    assert read_lines(tmp_path / "a.jsonl") == [{"id": 1}, {"id": 2}]
    assert read_lines(tmp_path / "b.jsonl") == []
