"""Real launches of examples/train.py: kills, resumes, DeepSpeed on two CPU processes. See test_run.py for one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from granulon_hf.errors import GranulonError
from granulon_hf.loading import load_model
from granulon_hf.modeling.adapter_granulon import find_adapter
from granulon_hf.training import parse
from granulon_hf.training.run import train
from tests.test_demo_model import needs_backbones
from tests.training.test_run import read_left_out, write_chat

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
TINY = ["--variant", "granulon-qwen2.5", "--tiny", "true", "--use_cpu", "true", "--limit", "64", "--report_to", "none"]
SHORT = ["--max_steps", "8", "--logging_steps", "1", "--save_steps", "2", "--learning_rate", "1e-2"]
BATCH = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]


# accelerate starts several processes on CPUs by MPI only.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def start(*arguments, config: str | None = "accelerate_cpu.yaml", processes=1, script="examples/train.py", more=()):
    launch = [*LAUNCH, "--config_file", f"examples/{config}", "--num_processes"] if config else TORCHRUN
    head = [*launch, str(processes), script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **dict(more)}
    return subprocess.Popen(
        [*head, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=420):
    output, _ = process.communicate(timeout=timeout)
    return output


def losses(folder, step=8):
    history = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def wait_for(path, process, timeout=300):
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.02)


def train_here(*line):
    """Train in this process what a launch is compared with: starting another takes longer than all its steps."""
    train(*parse([str(part) for part in line]))


def kill(process, folder):
    """`kill -9` of the launcher and of every worker, which torch puts into sessions of their own."""
    for other in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        other.kill()
    process.communicate()
    assert not (folder / "checkpoint-8").exists()


def test_killed_and_resumed_it_is_the_same_run(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    line = [*TINY, *SHORT, *BATCH, "--output_dir"]
    train_here(*line, whole)
    assert len(losses(whole)) == 8

    process = start(*line, cut)
    wait_for(cut / "checkpoint-4", process)
    kill(process, cut)
    resume = ["--resume_from_checkpoint", "last"]
    for more, word in (([], "--resume_from_checkpoint last"), ([*resume, "--seed", "3"], "seed .*42.* 3")):
        with pytest.raises(GranulonError, match=word):
            train_here(*line, cut, *more)
    output = finish(start(*line, cut, *resume))
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-5), output[-3000:]
    assert "multi_modal_projector  2,112" in output and "frozen" in output
    for file in ("README.md", "loss.png", "run.json", "adapter.safetensors"):
        assert (cut / file).stat().st_size > 500, file
    command = "accelerate launch --config_file examples/accelerate_cpu.yaml --num_processes 1 examples/train.py --variant"
    assert command in (cut / "README.md").read_text()


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on(tmp_path):
    long = ["--max_steps", "400", "--save_steps", "300", "--logging_steps", "1", *BATCH]
    process = start(*TINY, *long, "--output_dir", tmp_path)
    seen = ""
    for line in process.stdout:
        seen += line
        if "'loss'" in line:
            break
    workers = subprocess.run(
        ["pgrep", "-f", f"train.py.*{tmp_path}"], capture_output=True, text=True, check=False
    ).stdout.split()
    for worker in workers:
        if int(worker) != process.pid:
            os.kill(int(worker), signal.SIGTERM)
    output = seen + finish(process)
    assert "Stopped by SIGTERM after step" in output, output[-3000:]
    assert process.returncode != 0 and not (tmp_path / "adapter.safetensors").exists()  # it is not finished
    (written,) = tmp_path.glob("checkpoint-*")
    assert 1 <= int(written.name.split("-")[1]) < 300


def test_packed_over_two_processes_killed_and_resumed_is_padded_on_one(tmp_path):
    """The weights after eight steps are the same; twice as many batches of one process are those of two."""
    padded, packed = tmp_path / "padded", tmp_path / "packed"
    short = [*TINY, *SHORT, "--learning_rate", "1e-3", "--per_device_train_batch_size", "2"]
    train_here(*short, "--gradient_accumulation_steps", "4", "--batching", "padded", "--output_dir", padded)
    assert len(losses(padded)) == 8
    line = [*short, "--gradient_accumulation_steps", "2", "--batching", "packed", "--max_tokens_per_batch", "150"]
    line += ["--output_dir", packed]
    two_processes = {"config": None, "processes": 2}
    process = start(*line, **two_processes)
    wait_for(packed / "checkpoint-4", process)
    kill(process, packed)
    output = finish(start(*line, "--resume_from_checkpoint", "last", **two_processes))
    assert losses(packed) == pytest.approx(losses(padded), abs=1e-5), output[-3000:]
    weights, expected = (load_file(folder / "adapter.safetensors") for folder in (packed, padded))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("stage", "rate", "epsilon"),
    [
        ("projector", "1e-3", "1e-8"),
        ("full", "1e-1", "1"),  # AdamW's first steps are signs otherwise, and some gradients are as good as zero
    ],
)
def test_packed_over_two_sharded_processes_is_padded_on_one(tmp_path, stage, rate, epsilon):
    """As examples/accelerate_fsdp2.yaml has it, in float32 and on CPUs; it goes on from a checkpoint, too."""
    padded, packed = tmp_path / "padded", tmp_path / "packed"
    short = [*TINY, *SHORT, "--learning_rate", rate, "--adam_epsilon", epsilon, "--stage", stage]
    short += ["--per_device_train_batch_size", "2"]
    train_here(*short, "--gradient_accumulation_steps", "4", "--batching", "padded", "--output_dir", padded)
    assert len(losses(padded)) == 8
    plugin = yaml.safe_load((ROOT / "examples" / "accelerate_fsdp2.yaml").read_text())["fsdp_config"]
    sharded = {name.upper(): str(value) for name, value in plugin.items()}
    sharded |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}
    launch = {"config": None, "processes": 2, "script": "tests/training/fsdp_on_cpu.py", "more": sharded}
    line = [*short, "--gradient_accumulation_steps", "2", "--batching", "packed", "--max_tokens_per_batch", "150"]
    output = finish(start(*line, "--output_dir", packed, **launch))
    assert "{'DTensor'}" in output, output[-3000:]
    file = "model.safetensors" if stage == "full" else "adapter.safetensors"
    expected = load_file(padded / file)
    for turn in range(2):
        assert losses(packed) == pytest.approx(losses(padded), abs=1e-5), turn
        weights = load_file(packed / file)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0, msg=name)
        shutil.rmtree(packed / "checkpoint-8", ignore_errors=True)
        if turn == 0:
            output = finish(start(*line, "--output_dir", packed, "--resume_from_checkpoint", "last", **launch))
            assert (packed / "checkpoint-8").exists(), output[-3000:]


def test_what_any_worker_of_any_process_leaves_out_is_listed(tmp_path):
    data = write_chat(tmp_path / "chat", broken=[3], long=[0, 5, 6, 9, 10])
    line = [
        *TINY[:-4],
        "--report_to",
        "none",
        "--data",
        data,
        "--max_length",
        "200",
        "--batching",
        "padded",
        "--max_steps",
        "6",
    ]
    line += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--dataloader_num_workers", "2"]
    output = finish(start(*line, "--output_dir", tmp_path / "run", config=None, processes=2))
    assert (tmp_path / "run" / "left_out.jsonl").exists(), output[-3000:]
    assert sorted(row.get("id", "-") for row in read_left_out(tmp_path / "run")) == ["-", "0", "10", "5", "6", "9"]
    assert output.count("is left out") <= 2  # once for each process


@needs_backbones
def test_the_demo_with_an_option_is_the_demos_recipe_and_leaves_a_model(tmp_path):
    output = finish(start("--max_steps", "1", "--use_cpu", "true", "--report_to", "none", "--output_dir", tmp_path))
    assert "Recipe: examples/demo.yaml; the command line changes: max_steps 1 (in the file 60)" in output, output[-3000:]
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert (settings["learning_rate"], settings["gradient_accumulation_steps"], settings["limit"]) == (1e-3, 1, 1200)
    model, processor, _ = load_model(str(tmp_path), "cpu")  # as granulon ask and granulon eval run do
    assert find_adapter(tmp_path) is None  # granulon push takes it for a whole model
    assert processor.image_token_id == model.config.image_token_id


@pytest.mark.skipif(not find_spec("deepspeed"), reason="needs deepspeed")
def test_zero2_with_two_processes_killed_and_resumed(tmp_path):
    """Killed and resumed, DeepSpeed on two ranks has the losses of one process without it. It first compiles, for minutes."""
    options = {"config": "accelerate_zero2.yaml", "processes": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    line = [*TINY, *SHORT, *BATCH, "--output_dir"]
    train_here(*line, whole, "--gradient_accumulation_steps", "4")
    process = start(*line, cut, **options)
    wait_for(cut / "checkpoint-4", process, timeout=600)
    kill(process, cut)
    output = finish(start(*line, cut, "--resume_from_checkpoint", "last", **options))
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-5), output[-3000:]
    assert json.loads((cut / "run.json").read_text())["settings"]["world_size"] == 2
    engine = list((cut / "checkpoint-8" / "global_step8").glob("zero_pp_rank_*_optim_states.pt"))
    assert len(engine) == 2  # each rank has its part of the optimizer
    assert sum(file.stat().st_size for file in (cut / "checkpoint-8").rglob("*")) < 2_000_000


def test_an_error_is_one_sentence_on_stderr(tmp_path):
    command = [sys.executable, "examples/train.py", *TINY, "--output_dir", str(tmp_path / "out"), "--adapter", "nowhere"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("Error: "), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
