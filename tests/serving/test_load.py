"""The load test at its smallest size: nothing is lost, and bad company is told what is wrong."""

import importlib.util
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_serve_available

if not is_serve_available():
    pytest.skip("The serving requirements are not installed: pip install -e '.[serve]'", allow_module_level=True)

PATH = Path(__file__).parents[2] / "examples/benchmarks/serve_load.py"


@pytest.mark.slow
def test_nothing_is_lost_under_load_and_beside_bad_company():
    spec = importlib.util.spec_from_file_location("serve_load", PATH)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.main(["--places", "4", "--batch", "4", "--requests", "16"])
    rows = found["rows"]
    assert list(rows) == ["alone", "1 x", "4 x", "bad company", "after"]
    assert [row["lost"] for row in rows.values()] == [0] * 5 and not any(row["errors"] for row in rows.values())
    assert rows["4 x"]["refused"] > 0 and rows["4 x"]["answered"] == 16
    assert rows["bad company"]["wrong"] == 0 and len(rows["bad company"]["told"]) >= 10
    assert max(row["health"] for row in rows.values()) < 10
    metrics = found["metrics"]
    assert metrics["granulon_requests_in_flight"] == metrics["granulon_requests_queued"] == "0"
    assert int(metrics["granulon_batches_total"]) < int(metrics["granulon_request_seconds_count"])
