"""From the Hub, over the real client: what is fetched, and that the manifest pins the commit."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.data import tables
from tests.hub_server import HubServer

REPO = ("dataset", "LucasFang/FLUX-Reason-6M")
SCRIPT = """
import json, sys
from granulon_hf.errors import GranulonError
from granulon_hf.data import load
samples = load("flux-reason", limit=4, max_files=3, holdout=0)
found = list(samples)
manifest = samples.manifest
result = {"manifest": manifest, "ids": [sample.id for sample in found], "bytes": [len(s.images[0]["bytes"]) for s in found]}
result["again"] = [sample.id for sample in load(manifest=manifest)]
try:
    samples[0]
except GranulonError as error:
    result["index"] = str(error)
try:
    load("recap")
except GranulonError as error:
    result["missing"] = str(error)
json.dump(result, open(sys.argv[1], "w"))
"""


@pytest.mark.slow
def test_a_few_ranges_of_a_few_files_are_fetched(tmp_path):
    root = tables.flux_folder(tmp_path / "flux", [("Aesthetics-Part01", 6), ("Text", 6)], rows=12)
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.parquet")}
    with HubServer() as hub:
        hub.private[REPO] = False
        first = hub.commit(REPO, files, "data")
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "result.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        fetched = Counter(line.split("/resolve/")[1] for line in hub.log if line.startswith("GET") and "/resolve/" in line)
    result = json.loads((tmp_path / "result.json").read_text())
    manifest = result["manifest"]
    assert manifest["revision"] == first and manifest["source"] == REPO[1]
    assert {name for entry in manifest["files"].values() for name in entry["ids"]} == set(result["ids"]) == set(result["again"])
    assert len(result["ids"]) == 4 and min(result["bytes"]) > 500
    assert 3 <= len(fetched) <= 4 and set(fetched) <= {f"{first}/{part}" for part in files}  # one more for the columns
    assert "streamed and has no random access" in result["index"]
    assert "Cannot reach the data set 'gmongaras/" in result["missing"] and "give source=" in result["missing"]
    local = tables_ids(root)
    assert result["ids"] == local  # a copy of the repository gives the same subset


def tables_ids(root):
    from granulon_hf.data import load

    return [sample.id for sample in load("flux-reason", source=root, limit=4, max_files=3, holdout=0)]
