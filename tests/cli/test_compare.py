"""`granulon eval compare`: rows trained alike, resumable, refused where they were not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from granulon_hf.cli import app
from granulon_hf.evaluation.comparison import arms_of, check, training_arguments
from granulon_hf.training.arguments import parse
from granulon_hf.variants import build

TRAIN = {
    **{"tiny": True, "data": "shapes", "limit": 16, "max_steps": 2, "save_steps": 1, "logging_steps": 1, "use_cpu": True},
    **{"report_to": "none", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "disable_tqdm": True},
}
EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = {
    "llm": "qwen2.5",
    "encoders": ["clip", "granulon"],
    "train": TRAIN,
    "eval": {"data": ["shapes"], "limit": 4, "generation": {"max_new_tokens": 2}},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def run(config, out="out"):
    Path("compare.yaml").write_text(yaml.safe_dump(config))
    return CliRunner().invoke(app, ["eval", "compare", "compare.yaml", "--out", str(out)])


def test_rows_are_trained_alike_and_kept():
    done = run(CONFIG)
    assert done.exit_code == 0, done.output
    manifest = json.loads(Path("out/manifest.json").read_text())["rows"]
    settings = [row["settings"] for row in manifest.values()]
    different = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert different <= {"variant", "max_tokens_per_batch"} and "variant" in different
    assert Path("out/losses.png").stat().st_size > 1000 and "shapes: recall" in Path("out/evaluation/table.md").read_text()
    stamps = [path.stat().st_mtime_ns for path in sorted(Path("out").rglob("adapter.safetensors"))]
    assert run(CONFIG).exit_code == 0
    assert stamps == [path.stat().st_mtime_ns for path in sorted(Path("out").rglob("adapter.safetensors"))]

    other = run({**CONFIG, "eval": {**CONFIG["eval"], "limit": 5}})
    assert other.exit_code == 2 and "remove that folder: what is trained stays" in other.output, other.output
    assert "'out/evaluation' holds answers" in other.output
    shutil.rmtree("out/evaluation")
    assert run({**CONFIG, "eval": {**CONFIG["eval"], "limit": 5}}).exit_code == 0
    assert stamps == [path.stat().st_mtime_ns for path in sorted(Path("out").rglob("adapter.safetensors"))]

    other = run({**CONFIG, "train": {**TRAIN, "max_steps": 3}})
    assert other.exit_code == 2 and "max_steps was 2 and is 3" in other.output

    run_json = Path("out/clip-qwen2.5/training/run.json")
    changed = json.loads(run_json.read_text())
    changed["settings"]["samples"] = 5
    run_json.write_text(json.dumps(changed))
    done = run(CONFIG)
    assert done.exit_code == 2 and "not trained alike: samples differ" in done.output


def test_reducers_at_budgets():
    """Every reducer is trained once, over all budgets, and evaluated at each; what it shows is what was asked for."""
    config = {**CONFIG, "encoders": ["dinov3"], "reducers": ["pixel", "adata", "random", "downsample"], "budgets": [4, 9]}
    config |= {"train": {**TRAIN, "cache_features": True}, "eval": {**CONFIG["eval"], "metrics": ["exact"]}}
    assert (done := run(config)).exit_code == 0, done.output
    rows = json.loads(Path("out/manifest.json").read_text())["rows"]
    assert list(rows) == config["reducers"]
    settings = [row["settings"] for row in rows.values()]
    different = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert different - {"max_tokens_per_batch"} == {"visual_tokens", "reducer", "levels", "slot_position", "budgets"}
    assert [one["feature_cache"] for one in settings] == 3 * ["dinov3-qwen2.5"] + [None]
    kept = json.loads(Path("out/tokens.json").read_text())
    arms = kept["curves"]["shapes"]["arms"]
    names = [f"{reducer}@{budget}" for reducer in config["reducers"][1:] for budget in config["budgets"]]
    assert list(arms) == list(kept["costs"]) == ["pixel", *names]
    assert [one["visual_tokens"] for one in arms.values()] == [36, 4, 9, 4, 9, 4, 9]
    flops = [one["prefill_flops"] for one in kept["costs"].values()]
    assert flops[0] > flops[2] > flops[1] and flops[3] > flops[5]  # fewer tokens, and a smaller image
    assert all(Path(f"out/{name}").stat().st_size > 500 for name in ("tokens.md", "tokens.png", "losses.png"))
    table = Path("out/evaluation/table.md").read_text()
    assert all(name in table for name in arms)
    stamps = [path.stat().st_mtime_ns for path in sorted(Path("out").rglob("adapter.safetensors"))]
    # Under another spelling of the folder it is the same comparison; in another dtype it costs something else.
    shutil.rmtree("out/evaluation")
    config["eval"]["dtype"] = "bfloat16"
    assert (done := run(config, Path("out").resolve())).exit_code == 0, done.output
    assert stamps == [path.stat().st_mtime_ns for path in sorted(Path("out").rglob("adapter.safetensors"))]
    again = json.loads(Path("out/costs.json").read_text())
    assert all(again[arm]["measured"] != kept["costs"][arm]["measured"] for arm in arms)


def test_budgets_that_a_controller_chooses_at_prices():
    """A price so high that only tokens count gives the smallest budget; the arm is held against the interpolated curve."""
    config = {
        **CONFIG,
        "encoders": ["dinov3"],
        "reducers": ["pixel", "pool"],
        "budgets": [4, 9],
        "prices": [0, 5],
        "scored": 10,
    }
    assert (done := run(config)).exit_code == 0, done.output
    kept = json.loads(Path("out/tokens.json").read_text())
    arms = kept["curves"]["shapes"]["arms"]
    assert list(arms) == ["pixel", "pool@4", "pool@9", "pool at price 0", "pool at price 5"]
    assert arms["pool at price 5"]["visual_tokens"] == 4
    assert [name for name, one in arms.items() if "interpolated" in one] == ["pool at price 0", "pool at price 5"]
    assert arms["pool at price 5"]["interpolated"]["difference"] == 0  # the same answers as at 4
    costs = kept["costs"]
    assert costs["pool at price 5"]["prefill_flops"] == pytest.approx(costs["pool@4"]["prefill_flops"], rel=0.05)
    weights = Path("out/pool/controller/adapter.safetensors")
    stamp, scores = weights.stat().st_mtime_ns, next(Path("out/pool/controller").glob("scores-*"))
    assert run(config).exit_code == 0 and weights.stat().st_mtime_ns == stamp
    found, lines = scores.stat().st_mtime_ns, Path("out/evaluation/pool-4/shapes/run.json").stat().st_mtime_ns
    # Another price is another controller, of the same scores; its answers and those of the same weights are made anew.
    assert (done := run({**config, "prices": [0, 6]})).exit_code == 0, done.output
    assert weights.stat().st_mtime_ns > stamp and scores.stat().st_mtime_ns == found
    assert Path("out/evaluation/pool-4/shapes/run.json").stat().st_mtime_ns > lines


@pytest.mark.parametrize("name", ["compare", "compare_reducers", "compare_demo"])
def test_the_examples_are_comparisons(name):
    config = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    rows = check(config)
    arms = arms_of(config, rows)
    prices, budgets = config.get("prices", []), config.get("budgets", [])
    reducers = [row for row in rows if row.reducer not in (None, "pixel")]
    assert len(arms) == len(rows) + len(reducers) * (len(budgets) + len(prices) - 1)
    for row in rows:
        model_args, _, args = parse(training_arguments(config, row, Path("out")))
        assert (model_args.variant, args.budgets) == (row.variant, "random" if row in reducers else "controller")


def test_a_trained_controller_is_for_the_rows_that_have_levels():
    model, _ = build("granulon-qwen2.5", tiny=True)
    state = {f"controller.{name}": torch.full_like(value, 0.5) for name, value in model.model.controller.state_dict().items()}
    save_file(state, "controller.safetensors")
    assert (done := run({**CONFIG, "controller": "controller.safetensors"})).exit_code == 0, done.output
    rows = json.loads(Path("out/manifest.json").read_text())["rows"]
    assert [row["settings"]["adapter"] for row in rows.values()] == [None, "controller.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm": "gpt5"}, "`llm` must be one of qwen2.5, llama3.2"),
        ({"llm": None}, "`llm` must be"),
        ({"encoders": "clip"}, "`encoders` must be"),
        ({"encoders": {"clip": 1}}, "`encoders` must be"),
        ({"train": [1]}, "`train` must be"),
        ({"eval": "shapes"}, "`eval` must be"),
        ({"controller": 3}, "`controller` must be"),
        ({"encoders": ["clip"]}, "at least two rows"),
        ({"encoders": ["clip", "vgg"]}, "Unknown encoder 'vgg'"),
        ({"train": {**TRAIN, "output_dir": "x"}}, "`output_dir` is set by the comparison"),
        ({"train": {**TRAIN, "learning_rat": 1}}, "learning_rat"),
        ({"controller": "gone"}, "`controller` names 'gone', which is not there"),
        ({"controller": ".", "encoders": ["clip", "siglip"]}, "`controller` is for encoders with levels"),
        ({"eval": {}}, "`eval` needs `data`"),
        ({"eval": {"data": ["shapes"], "metrik": ["recall"]}}, "`eval` has 'metrik'"),
        ({"evaluation": {}}, "unknown name 'evaluation'"),
        ({"reducers": ["pixel", "adatta"]}, "Unknown reducer 'adatta'"),
        ({"reducers": ["pixel", "adata"]}, "`reducers` and `budgets` go together"),
        ({"budgets": [4]}, "`reducers` and `budgets` go together"),
        ({"reducers": ["adata"], "budgets": [4, 4.5]}, "`budgets` must be different whole numbers"),
        ({"reducers": ["adata"], "budgets": ["few"]}, "`budgets` must be different whole numbers"),
        ({"reducers": ["adata"], "budgets": 4}, "`budgets` must be"),
        ({"reducers": ["adata", "adata"], "budgets": [4]}, "named twice"),
        ({"encoders": ["dinov3", "granulon"], "reducers": ["adata"], "budgets": [4]}, "dinov3 and granulon are the same"),
        ({"encoders": ["dinov3"], "reducers": ["adata"], "budgets": [4]}, "at least two rows"),
        ({"reducers": ["adata"], "budgets": [4], "train": {**TRAIN, "levels": "4,5"}}, "`levels` is set by the comparison"),
        ({"llm": "demo"}, "'demo' would have its own"),
        ({"llm": "nowhere", "encoders": [], "reducers": ["adata", "pool"], "budgets": [4]}, "nowhere"),
        ({"prices": [0.1]}, "`prices`"),
        ({"eval": {"data": ["shapes"], "dtype": "float8"}}, "`dtype` of `eval`"),
        ({"reducers": ["pixel", "adata"], "budgets": [4], "prices": [0.1]}, "at least two `budgets`"),
        ({"reducers": ["pixel", "adata"], "budgets": [4, 9], "prices": [-1]}, "`prices` must be"),
    ],
)
def test_bad_configurations(change, message):
    done = run({**CONFIG, **change})
    assert done.exit_code == 2 and message in done.output, done.output
    assert not Path("out").exists() or not list(Path("out").rglob("checkpoint-*"))
