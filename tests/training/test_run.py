"""A whole run in this process: what it prints, what it leaves, and that every command reads it."""

import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from granulon_hf import GranulonForConditionalGeneration, hub
from granulon_hf.cli import app
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.errors import GranulonError
from granulon_hf.training import parse
from granulon_hf.training import run as run_module
from granulon_hf.training.checkpoints import ADAPTER
from granulon_hf.training.run import train
from granulon_hf.training.trainer import choose_workers

SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"
LINE = """--variant granulon-qwen2.5 --tiny true --use_cpu true --limit 16 --report_to none --max_steps 1 --disable_tqdm true
    --per_device_train_batch_size 2 --gradient_accumulation_steps 1""".split()


def run(folder, *more, line=LINE):
    return train(*parse([*line, "--output_dir", str(folder), *more]))


def ask(folder, photo):
    return CliRunner().invoke(app, ["ask", str(photo), "What is this?", "--model", str(folder), "--max-new-tokens", "2"])


@pytest.fixture
def photo(picture, tmp_path):
    picture.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_run_of_one_step_is_read_by_every_command(tmp_path, photo, capfd):
    folder = tmp_path / "run"
    run(folder, "--resume_from_checkpoint", "last")  # as a batch script has it
    printed = capfd.readouterr()
    assert "Recipe: the supplement's defaults" in printed.err and "Nothing to resume" in printed.err
    assert "will hold all weights" in printed.out
    card = (folder / "README.md").read_text()
    assert card.count("at step 1") == 1 and "holds all weights" in card
    assert json.loads((folder / "run.json").read_text())["recipe"].startswith("the supplement's defaults")
    assert (done := ask(folder, photo)).exit_code == 0, done.output
    elsewhere = shutil.copytree(folder, tmp_path / "another machine")
    command = ["eval", "run", "--model", str(elsewhere), "--data", "shapes", "--limit", "2", "--out", str(tmp_path / "scores")]
    assert (done := CliRunner().invoke(app, command)).exit_code == 0, done.output


@pytest.mark.slow
@pytest.mark.parametrize("loggers", [["trackio"], ["tensorboard", "trackio"]])
def test_losses_are_logged_by_trackio_beside_tensorboard(tmp_path, monkeypatch, loggers):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported, hence another process
    options = ["--max_steps", "3", "--logging_steps", "1", "--run_name", "first", "--project", "mine"]
    command = [sys.executable, SCRIPT, *LINE, "--report_to", *loggers, *options, "--output_dir", tmp_path / "run"]
    subprocess.run([str(part) for part in command], check=True)
    api = [sys.executable, "-m", "trackio.cli", "get", "metric", "--project", "mine", "--run", "first"]
    done = subprocess.run([*api, "--metric", "train/loss", "--json"], check=True, capture_output=True, text=True)
    values = json.loads(done.stdout)["values"]
    assert len(values) == 3 and all(math.isfinite(value["value"]) for value in values)
    assert bool(list((tmp_path / "run").rglob("events.out.tfevents.*"))) == ("tensorboard" in loggers)


@pytest.mark.slow
def test_a_run_of_one_step_can_be_published(tmp_path, monkeypatch):
    """The command loads the copy in a process where the package is not installed, and compares."""
    run(tmp_path / "run")
    monkeypatch.setattr(hub, "HfApi", None)
    elsewhere = shutil.copytree(tmp_path / "run", tmp_path / "another machine")
    done = CliRunner().invoke(app, ["push", str(elsewhere), "org/x", "--dry-run"])
    assert done.exit_code == 0, done.output


def test_a_finished_run_goes_on_with_and_without_all_weights(tmp_path, photo, capfd):
    folder = tmp_path / "run"
    run(folder)
    for full in ("true", "false"):
        run(folder, "--resume_from_checkpoint", "last", "--save_full", full)
        assert ask(folder, photo).exit_code == 0
    assert "Nothing to resume" not in capfd.readouterr().err
    with pytest.raises(GranulonError, match="learning_rate"):
        run(folder, "--resume_from_checkpoint", "last", "--learning_rate", "1")


COMPACT = ["--variant", "clip-qwen2.5", *LINE[2:], "--visual_tokens", "semantic", "--levels", "2,4,8"]


@pytest.mark.parametrize("batching", ["grouped", "packed"])
@pytest.mark.parametrize("budgets", ["random", "all", "3"])
def test_a_compact_run_with_budgets_is_read_again_and_goes_on_as_it_was(tmp_path, photo, budgets, batching):
    folder, line = tmp_path / "run", [*COMPACT, "--batching", batching, "--reducer", "queries"]
    cache = ("--feature_cache", str(tmp_path / "features"))
    _, processor = run(folder, "--budgets", budgets, *cache, line=line)
    assert processor.num_semantic_tokens == 8  # also where training needs fewer slots
    settings = json.loads((folder / "run.json").read_text())["settings"]
    asked = {"visual_tokens": "semantic", "reducer": "queries", "levels": "2,4,8", "budgets": budgets}
    assert {name: settings[name] for name in asked} == asked
    assert ask(folder, photo).exit_code == 0
    for changed in (("--budgets", "controller"), ("--budgets", budgets, "--levels", "2,4,6"), ("--budgets", "5")):
        with pytest.raises(GranulonError, match=changed[-2].strip("-")):
            run(folder, *changed, *cache, "--resume_from_checkpoint", "last", line=line)
    run(folder, "--budgets", budgets, *cache, "--resume_from_checkpoint", "last", line=line)


def losses(folder):
    return [row["loss"] for row in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in row]


@pytest.mark.parametrize("form", [["--budgets", "random"], ["--budgets", "all"], ["--budgets", "7"], []])
def test_a_run_with_clusters_kept_is_the_run_without(tmp_path, monkeypatch, form):
    line = [*LINE, *form, "--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-2"]
    line += ["--feature_cache", str(tmp_path / "features")]
    files = [run(tmp_path / "plain", line=line) and len([*(tmp_path / "features").glob("clusters-*")])]
    monkeypatch.setattr(run_module, "clusters_pay", lambda cache, *rest: bool(cache.choices))
    files += [run(tmp_path / "kept", line=line) and len([*(tmp_path / "features").glob("clusters-*")])]
    # Six samples do not pay for the clusters of sixteen images.
    assert files == [0, 1]
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
    assert len(losses(tmp_path / "kept")) == 3


@pytest.mark.parametrize(
    ("options", "pays"),
    [
        ([], False),  # two epochs of three levels
        (["--num_train_epochs", "4"], True),
        (["--budgets", "7"], True),
        (["--budgets", "all"], True),
        (["--max_steps", "1"], False),
        (["--max_steps", "2"], True),
    ],
)
def test_clusters_are_kept_where_they_are_needed_again(tmp_path, options, pays):
    _, _, args = parse(["--use_cpu", "true", "--output_dir", str(tmp_path), *options])
    cache = SimpleNamespace(rows=range(16), choices=[0] * (1 if "7" in options else 3), count_clusters=lambda: 0)
    assert run_module.clusters_pay(cache, args, args.budgets, 16) is pays
    cache.count_clusters = lambda: 16
    assert run_module.clusters_pay(cache, args, args.budgets, 16)
    cache.choices = []
    assert not run_module.clusters_pay(cache, args, args.budgets, 16)


def test_a_packed_run_says_its_budget_and_keeps_it(tmp_path, monkeypatch, capfd):
    folder, packed = tmp_path / "run", ("--batching", "packed")
    run(folder, *packed)
    budget = json.loads((folder / "run.json").read_text())["settings"]["max_tokens_per_batch"]
    assert 50 < budget < 500 and f"{budget:,} tokens" in capfd.readouterr().err
    # On another machine more may fit: a run that goes on stays as it was.
    monkeypatch.setattr(run_module, "free_memory", lambda device: 2**40)
    run(folder, *packed, "--resume_from_checkpoint", "last")
    assert json.loads((folder / "run.json").read_text())["settings"]["max_tokens_per_batch"] == budget
    with pytest.raises(GranulonError, match="max_tokens_per_batch"):
        run(folder, *packed, "--resume_from_checkpoint", "last", "--max_tokens_per_batch", "7")


@pytest.mark.parametrize("more", [(), ("--pad_to_multiple_of", "8"), ("--attn_implementation", "eager")])
def test_batches_are_packed_where_attention_stays_within_samples(tmp_path, more):
    folder = tmp_path / "run"
    run(folder, *more)
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert settings["batching"] == ("grouped" if more else "packed")
    if more:  # a run that began before goes on as it was
        run(folder, *more, "--resume_from_checkpoint", "last")


def test_a_fixed_number_of_tokens_has_no_empty_slots(tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(run_module, "GranulonTrainer", lambda *args, data_collator, **rest: rows.append(data_collator) or 1 / 0)
    for budgets in ("3", "random"):
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / budgets, "--budgets", budgets, line=COMPACT)
    slots = [(collator([Shapes(1)[0]])["input_ids"] == collator.processor.image_token_id).sum() for collator in rows]
    assert slots == [3, 8]


def test_a_run_without_checkpoints_is_not_overwritten(tmp_path):
    run(tmp_path, "--save_strategy", "no")
    for more in ((), ("--resume_from_checkpoint", "last")):
        with pytest.raises(GranulonError, match=ADAPTER):
            run(tmp_path, *more)


def test_a_run_that_logs_nothing_has_a_card(tmp_path):
    run(tmp_path, "--logging_strategy", "no", "--logging_first_step", "false")
    card = (tmp_path / "README.md").read_text()
    assert "Loss was not logged" in card and "loss.png" not in card


@pytest.mark.parametrize("full", ["true", "false"])
def test_merged_factors_are_not_lost_when_another_run_begins_with_them(build, tmp_path, full):
    """A projector on top of a language model that was adapted before: the named backbone is not the one it was trained with."""
    model, processor = build()
    model.model.vision_tower.save_pretrained(tmp_path / "vision")
    text = AutoModelForCausalLM.from_config(model.config.text_config)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.save_pretrained(tmp_path / "text")
    model.config.backbones = {part: {"name": str(tmp_path / part)} for part in ("vision", "text")}
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    line = ["--variant", str(tmp_path / "start"), *LINE[4:]]
    run(
        tmp_path / "lora",
        "--stage",
        "projector+lora",
        "--learning_rate",
        "1e-1",
        "--warmup_steps",
        "0",
        "--save_full",
        full,
        line=line,
    )
    assert (tmp_path / "lora" / "model.safetensors").exists() == (full == "true")
    trained, _ = run(tmp_path / "after", line=["--variant", str(tmp_path / "lora"), *LINE[4:]])
    loaded = GranulonForConditionalGeneration.from_pretrained(tmp_path / "after")
    for (name, a), b in zip(trained.state_dict().items(), loaded.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def write_chat(folder, broken=(), long=()):
    """Drawn samples in the LLaVA form; images are read with the row, and lengths by the collator."""
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(12):
        sample = Shapes(12)[i]
        (folder / "images" / f"{i}.png").write_bytes(b"broken" if i in broken else sample.images[0]["bytes"])
        question = sample.question * (50 if i in long else 1)
        turns = [{"from": "human", "value": f"{question}\n<image>"}, {"from": "gpt", "value": sample.reference}]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))
    return str(folder / "chat.json")


def read_left_out(folder):
    return [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]


def test_a_folder_in_the_llava_form(tmp_path, capfd):
    data, out = write_chat(tmp_path / "chat", broken=[3]), tmp_path / "out"
    run(out, "--max_steps", "2", "--save_steps", "2", "--data", data)
    assert (out / "checkpoint-2").is_dir()
    assert "1 rows cannot be used" in capfd.readouterr().err
    (problem,) = read_left_out(out)
    assert problem["row"] == 3 and "image" in problem["reason"]


@pytest.mark.parametrize(("batching", "size"), [("padded", 1), ("grouped", 2), ("packed", 1)])
def test_workers_change_neither_losses_nor_what_is_reported(tmp_path, caplog, batching, size):
    """Whole batches are bad, and every worker meets some of them."""
    line = ["--data", write_chat(tmp_path / "chat", broken=[3], long=[0, 5, 6, 9, 10]), "--batching", batching]
    line += ["--per_device_train_batch_size", str(size), "--max_steps", str(24 // size), "--logging_steps", "1"]
    line += ["--max_length", "200", "--save_steps", str(15 // size), "--learning_rate", "1e-2"]
    folders = [tmp_path / str(workers) for workers in (0, 2)]
    for folder in folders:
        run(folder, *line, "--dataloader_num_workers", folder.name)
        assert len([record for record in caplog.records if "is left out" in record.message]) == 1
        caplog.clear()
    assert len(losses(folders[0])) == 24 // size
    assert losses(folders[1]) == pytest.approx(losses(folders[0]), abs=1e-6)
    for folder in folders:
        found = read_left_out(folder)
        assert sorted(row.get("id", "-") for row in found) == ["-", "0", "10", "5", "6", "9"]
        assert [row["row"] for row in found if "row" in row] == [3]
    (tmp_path / "2" / "adapter.safetensors").unlink()
    shutil.rmtree(tmp_path / "2" / f"checkpoint-{24 // size}")
    run(tmp_path / "2", *line, "--dataloader_num_workers", "1", "--resume_from_checkpoint", "last")
    assert losses(tmp_path / "2") == pytest.approx(losses(folders[0]), abs=1e-6)


@pytest.mark.parametrize(
    ("device", "cores", "processes", "options", "workers"),
    [
        ("cuda", 16, 1, {}, 4),
        ("cuda", 16, 8, {}, 1),
        ("cuda", 2, 2, {}, 0),
        ("cuda", 16, 1, {"image_features": len}, 0),
        ("cpu", 16, 1, {}, 0),
        ("mps", 16, 1, {}, 0),
        ("cpu", 16, 1, {"dataloader_prefetch_factor": 4}, 1),
    ],
)
def test_the_number_of_workers_where_nobody_says_it(monkeypatch, device, cores, processes, options, workers):
    monkeypatch.setattr("psutil.Process.cpu_affinity", lambda self: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    args = {"device": torch.device(device), "dataloader_persistent_workers": False, "dataloader_prefetch_factor": None}
    assert choose_workers(SimpleNamespace(**args | options), SimpleNamespace(**options)) == workers


def test_a_run_says_how_many_workers_it_has(tmp_path, capfd):
    run(tmp_path)
    assert "--dataloader_num_workers" in capfd.readouterr().err
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["dataloader_num_workers"] == 0
    with pytest.raises(GranulonError, match="dataloader_num_workers"):
        parse([*LINE, "--dataloader_num_workers", "-2"])


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("--variant granulon-gpt5", "clip-qwen2.5"),
        ("--stage everything", "projector"),
        ("--budgets some", "--budgets"),
        ("--budgets 21", "--budgets"),
        ("--variant clip-qwen2.5 --budgets all", "--budgets"),
        ("--reducer mean", "--reducer"),
        ("--levels 4,x", "--levels"),
        ("--visual_tokens few", "--visual_tokens"),
        ("--visual_tokens semantic --reducer downsample --feature_cache features", "downsample"),
        ("--stage controller", "examples/train_controller.py"),
        ("--data no-such-set", "--data 'no-such-set'"),
        ("--max_length 10", "None of the first"),
        ("--adapter nowhere", "'nowhere'"),
        ("--learning_rat 1", "--learning_rat"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor"),
        ("--eval_strategy steps", "--eval_strategy"),
        ("--split train", "--split"),
        ("--batching packed --pad_to_multiple_of 8", "--pad_to_multiple_of"),
        ("--use_liger_kernel true", "--use_liger_kernel"),
        (f"--output_dir {SCRIPT}", str(SCRIPT)),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, monkeypatch, line, word):
    """By the script, which says one sentence and ends with exit code 1 (that of a `SystemExit` with words)."""
    monkeypatch.setattr(sys, "argv", ["train.py", *LINE, "--output_dir", str(tmp_path / "out"), *line.split()])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    sentence = refused.value.code
    assert sentence.startswith("Error: ") and word in sentence and "\n" not in sentence
    assert not list(tmp_path.glob("out/checkpoint-*"))
