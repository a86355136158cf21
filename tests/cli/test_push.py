"""`granulon push`: what it shows without uploading, and what it refuses before anything is read."""

import json

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from granulon_hf import hub
from granulon_hf.cli import app
from tests.hub_server import HubServer


def push(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


@pytest.fixture
def model(build, tmp_path, monkeypatch):
    """A folder with a toy model; that its export says the same is tested elsewhere (tests/test_hub.py)."""
    model, processor = build()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(hub, "compare", lambda folder, expected: 0.0)
    return tmp_path / "model"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub that this process asks, with a token."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server


def read_plan(result):
    """Read what becomes of every file from the table."""
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    return {row[0]: row[-1] for row in rows if len(row) in (2, 4) and row[-1] in ("new", "changed", "same", "removed", "left")}


def wrote(server):
    """Requests that change something."""
    return [line for line in server.log if line.startswith("POST") and line != "POST /api/validate-yaml"]


def test_a_dry_run_without_a_login_shows_what_would_go_and_keeps_it_where_asked(model, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    monkeypatch.setattr(hub, "HfApi", None)  # no Hub is asked
    result = push(model, "org/x", "--dry-run", "--out", tmp_path / "out", "--public")
    assert result.exit_code == 0, result.output
    for path in (tmp_path / "out").iterdir():
        assert path.name in result.stdout
    assert "model.safetensors" in result.stdout and "Nothing was uploaded" in result.stdout
    assert "org/x (public)" in " ".join(result.stdout.split())
    assert "hf auth login" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("offline", [True, False])
def test_a_dry_run_without_a_network_says_so(model, server, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    result = push(model, "org/x", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "cannot be reached" in result.stderr and "hf auth login" not in result.stderr
    assert "model.safetensors" in result.stdout
    result = push(model, "org/x")
    assert result.exit_code == 2 and "cannot be reached" in result.stderr and result.stderr.count("\n") == 1


def test_a_dry_run_for_a_new_repository(model, server, tmp_path):
    result = push(model, "org/x", "--dry-run", "--out", tmp_path / "out")
    assert read_plan(result) == {path.name: "new" for path in (tmp_path / "out").iterdir()}
    assert "does not exist yet" in result.stdout
    assert not server.commits and not wrote(server)
    assert "POST /api/validate-yaml" in server.log
    # A name alone is one of the user's own.
    assert "tester/x (private)" in push(model, "x", "--dry-run").stdout


@pytest.mark.parametrize("revision", [None, "v2", "v3"])
def test_a_dry_run_compares_every_file_by_its_hash(model, server, revision):
    """On main, on a branch that differs from it, and for a branch that will begin as main is."""
    repo = f"org/{revision}"  # revisions are looked up once for a name
    assert push(model, repo).exit_code == 0
    name = ("model", repo)
    uploaded = server.files(*name)
    other = {"config.json": uploaded["config.json"], "on_v2.txt": b""}
    server.commits[(*name, "v2")] = [("2" * 40, other, "a branch")]
    there = {
        **uploaded,
        "README.md": uploaded["README.md"] + b"mine",
        "model.safetensors": uploaded["model.safetensors"][:-1] + b"x",  # as large as before
        "tokenizer.json": uploaded["tokenizer.json"],
        "model-00002-of-00002.safetensors": b"old",
        "extra_granulon.py": b"",
        "checkpoints/old.safetensors": b"",
        "notes.txt": b"",
    }
    del there["LICENSE"]
    server.large |= {"model.safetensors", "tokenizer.json"}
    server.commit(name, there, "changed by hand")
    server.log.clear()
    before = {key: list(history) for key, history in server.commits.items()}
    result = push(model, repo, "--dry-run", *(["--revision", revision] if revision else []))
    if revision == "v2":
        expected = {**dict.fromkeys(uploaded, "new"), "config.json": "same", "on_v2.txt": "left"}
    else:
        expected = dict.fromkeys(uploaded, "same") | {"README.md": "changed", "model.safetensors": "changed", "LICENSE": "new"}
        expected |= {"model-00002-of-00002.safetensors": "removed", "extra_granulon.py": "removed"}
        expected |= {"checkpoints/old.safetensors": "left", "notes.txt": "left"}
    assert read_plan(result) == expected
    assert server.commits == before and not wrote(server)
    # And that is what an upload does.
    assert push(model, repo, *(["--revision", revision] if revision else [])).exit_code == 0
    after = server.files(*name, *([revision] if revision else []))
    assert set(after) == {file for file, change in expected.items() if change != "removed"}
    assert {file: after[file] for file in uploaded} == uploaded


@pytest.mark.parametrize("dry", [True, False])
def test_a_repository_that_may_not_be_written(model, server, monkeypatch, dry):
    monkeypatch.setattr(hub, "export", lambda *args, **options: pytest.fail("too early"))
    server.private["model", "org/x"] = True
    server.commit(("model", "org/x"), {}, "initial commit")
    server.readonly.add(("model", "org/x"))
    for user, word in (({}, "may not write"), ({"auth": {"accessToken": {"role": "read"}}}, "may only read")):
        server.user = {"name": "tester", "orgs": [], **user}
        result = push(model, "org/x", *(["--dry-run"] if dry else []))
        assert result.exit_code == 2 and word in result.stderr and result.stderr.count("\n") == 1, result.output
    assert not wrote(server)


@pytest.mark.parametrize(
    ("name", "orgs", "refused"),
    [
        ("tester/x", [], False),
        ("org/x", [{"name": "org", "roleInOrg": "contributor"}], False),
        ("org/x", [{"name": "org", "roleInOrg": "read"}], True),
        ("org/x", [{"name": "other", "roleInOrg": "admin"}], True),
    ],
)
def test_a_dry_run_says_whether_the_repository_can_be_made(model, server, name, orgs, refused):
    server.user = {"name": "tester", "orgs": orgs}
    result = push(model, name, "--dry-run")
    assert result.exit_code == 0 and ("will refuse" in result.stderr) == refused


@pytest.mark.parametrize("dry", [True, False])
def test_metadata_that_the_hub_does_not_accept_stop_an_upload(model, server, dry):
    server.card_error = '"license" must be one of apache-2.0, mit'
    result = push(model, "org/x", *(["--dry-run"] if dry else []))
    assert result.exit_code == 2 and "must be one of apache-2.0, mit" in result.stderr and result.stderr.count("\n") == 1
    assert not server.commits and not wrote(server)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "org/x", "--dry-run"], "Cannot find the model 'nothing'"),
        (["tiny:granulon-qwen2.5", "org/x", "--dry-run"], "random weights"),
        (["nothing", "org/x/y", "--dry-run"], "'org/x/y' is not a name of a repository"),
        (["nothing", "org/x", "--dry-run", "--form", "pickle"], "Unknown form 'pickle'"),
        (["nothing", "org/x", "--dry-run", "--variant", "blip"], "Unknown variant 'blip'"),
        (["nothing", "org/x", "--results", "scores.json"], "is not the scores.json of granulon eval run"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.json").write_text(json.dumps({"rows": []}))
    result = push(*arguments)
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and message in " ".join(result.stderr.split())
    assert result.stderr.count("\n") == 1
