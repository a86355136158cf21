"""The Hub's files of results say what a score is of."""

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from granulon_hf.evaluation.results import write_results


@pytest.fixture
def result():
    scores = {"exact": [1.0, 0.0, 1.0], "judge": [80.0, 60.0, None], "hallucination": [10.0, 20.0, None]}
    return {
        "models": ["mine"],
        "data": ["pope"],
        "sets": {"pope": {"samples": 3, "parts": {"pope": 3}}},
        "scores": {"mine": {"pope": scores}},
        "judge": "gpt-4o",
    }


def test_scores_of_a_judge_name_it(result, tmp_path):
    """A score of 70 of one judge is not one of another: whoever reads the file must see whose it is."""
    (path,), left = write_results(result, tmp_path)
    found = {entry.task_id: entry for entry in parse_eval_result_entries(yaml.safe_load(path.read_text()))}
    assert not left and found["judge"].value == 70 and "2 samples" in found["judge"].notes
    assert {name for name, entry in found.items() if "gpt-4o" in entry.notes} == {"judge", "hallucination"}
