"""Agreement against the libraries that define it."""

import io
import json
from decimal import Decimal

import krippendorff
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.agreement import (
    agreement,
    alpha,
    alpha_of_many,
    interval,
    panel_agreement,
    read_answers,
    read_scores,
    weighted_kappa,
)
from granulon_hf.stats import clusters_of


def scores(values):
    return {str(i): {"accuracy": value, "hallucination": None} for i, value in enumerate(values)}


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_that_of_the_krippendorff_package(seed):
    random = np.random.default_rng(seed)
    a = random.integers(0, 101, 40).astype(float)
    b = np.clip(a + random.normal(0, 5 + 20 * seed, 40), 0, 100).round()
    oracle = krippendorff.alpha(reliability_data=np.stack([a, b]), level_of_measurement="interval")
    assert alpha(a, b) == pytest.approx(oracle, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_kappa_is_that_of_scikit_learn(seed):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    a = random.integers(0, 101, 40)
    b = np.clip(a + random.normal(seed, 5 + 10 * seed, 40), 0, 100).astype(int)
    oracle = sklearn_metrics.cohen_kappa_score(a, b, weights="quadratic", labels=range(101))
    assert weighted_kappa(a, b) == pytest.approx(oracle, abs=1e-12)


def test_coefficients_over_the_ids_that_both_scored():
    random = np.random.default_rng(0)
    a = random.integers(0, 101, 60).tolist()
    b = [int(np.clip(x + random.normal(0, 15), 0, 100)) for x in a]
    (found,) = agreement(scores([*a, 5, None]), scores([*b, None, 50]))
    assert (found.score, found.n) == ("accuracy", 60)
    assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found.mean_difference == pytest.approx(np.mean(a) - np.mean(b))
    assert found.limits == pytest.approx(found.mean_difference + np.array([-1.96, 1.96]) * np.std(np.subtract(a, b), ddof=1))
    for value, (low, high) in (
        (found.spearman, found.spearman_ci),
        (found.alpha, found.alpha_ci),
        (found.kappa, found.kappa_ci),
    ):
        assert low < value < high
        assert 0.02 < high - low < 0.4


def test_what_is_undefined_is_none():
    (found,) = agreement(scores([50, 50, 50]), scores([50, 50, 50]), n_resamples=20)
    assert found.spearman is None and found.alpha is None and found.mean_difference == 0


def test_perfect_and_opposite():
    values = list(range(0, 101, 5))
    (same,) = agreement(scores(values), scores(values), n_resamples=50)
    (opposite,) = agreement(scores(values), scores(values[::-1]), n_resamples=50)
    assert same.spearman == pytest.approx(1) and same.alpha == 1
    assert opposite.spearman == pytest.approx(-1) and opposite.alpha < -0.9


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"accuracy": 5}], "lacks an id"),
        ([{"id": 1}], "any score"),
        ([{"id": 1, "accuracy": 5}, {"id": "1", "accuracy": 5}], "a second time"),
        ([{"id": 1, "accuracy": 101}], "not 0 to 100"),
        ([{"id": 1, "accuracy": True}], "not 0 to 100"),
        *(
            ([{"id": 1, "accuracy": text}], "not 0 to 100")
            for text in ("101", "-1", "90%", "9_0", "nan", "1e1", "85,5", "high")
        ),
        ([{"id": None, "accuracy": 5}], "lacks an id"),
    ],
)
def test_bad_files_are_named(tmp_path, rows, message):
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(GranulonError, match=message) as error:
        read_scores(path)
    assert "labels.jsonl" in str(error.value)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_labels_as_tables_write_them(tmp_path, ending):
    """Ids that became floats, scores that are texts, and answers without a label."""
    path = tmp_path / f"labels.{ending}"
    rows = [{"id": "1.0", "accuracy": "85"}, {"id": "007", "accuracy": " 85.5 "}, {"id": "x,1.5", "accuracy": None}]
    if ending == "jsonl":
        rows[0]["id"] = 1.0
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        table = pd.DataFrame(rows)
        table.to_csv(path, index=False, encoding="utf-8-sig") if ending == "csv" else table.to_parquet(path)
    found = read_scores(path)
    assert {key: row["accuracy"] for key, row in found.items()} == {"1": 85, "007": 85.5, "x,1.5": None}
    path.write_text("id,accuracy\n1,2,3,4\n5,6,7,8,9\n")
    with pytest.raises(GranulonError, match="labels"):
        read_scores(path)


def test_columns_that_are_not_there_are_refused(tmp_path):
    """What is misspelt would else be no score at all, or another one."""
    path = tmp_path / "labels.jsonl"
    path.write_text('{"id": 1, "accuracy": 5, "accuracy.a": 6}\n{"id": 2, "accuracy.a": null}\n')
    assert read_scores(path, {"accuracy": "accuracy.a"})["1"]["accuracy"] == 6
    for columns in ({"accuracy": "accuracy.nobody"}, {"acc": "accuracy"}, {"id": "key"}):
        with pytest.raises(GranulonError):
            read_scores(path, columns)


def test_numbers_of_parquet_are_read(tmp_path):
    rows = [{"id": 1.0, "accuracy": Decimal("85.5")}, {"id": 2.0, "accuracy": None}]
    pd.DataFrame(rows).to_parquet(tmp_path / "labels.parquet")
    assert read_scores(tmp_path / "labels.parquet") == {
        "1": {"accuracy": 85.5, "hallucination": None},
        "2": {"accuracy": None, "hallucination": None},
    }


def two_judges(rng, count=12, per_image=10):
    """Scores of two judges by id, and the images; answers about an image are scored alike."""
    images = np.repeat(np.arange(count), per_image)
    a = rng.normal(50, 12, count)[images] + rng.normal(0, 2, len(images))
    b = a + rng.normal(0, 12, count)[images] + rng.normal(0, 2, len(images))
    return scores(np.clip(a, 0, 100)), scores(np.clip(b, 0, 100)), {str(i): [f"image {name}"] for i, name in enumerate(images)}


@pytest.mark.parametrize("name", ["spearman", "alpha", "kappa"])
def test_coefficients_are_over_images(name):
    a, b, images = two_judges(np.random.default_rng(0))
    (own,), (by_image,) = agreement(a, b, n_resamples=500), agreement(a, b, images, n_resamples=500)
    assert (own.n_images, by_image.n_images) == (120, 12) and getattr(own, name) == getattr(by_image, name)
    narrow, wide = (float(np.ptp(getattr(found, f"{name}_ci"))) for found in (own, by_image))
    assert wide > 2 * narrow


def test_intervals_of_agreement_cover_where_answers_share_images():
    rng, hits = np.random.default_rng(0), {"by image": 0, "as if independent": 0}
    truth = 1 - (12**2 + 2**2) / (12**2 + 2**2 + 2 * 12**2 + 2 * 2**2)  # α of what `two_judges` draws
    for _ in range(200):
        *sides, images = two_judges(rng, count=40, per_image=5)
        x, y = (np.array([row["accuracy"] for row in side.values()]) for side in sides)
        for clusters, name in ((clusters_of(images.values()), "by image"), (range(len(x)), "as if independent")):
            low, high = interval(alpha, x, y, clusters, n_resamples=200)
            hits[name] += low <= truth <= high
    assert hits["by image"] >= 0.9 * 200 and hits["as if independent"] < 0.8 * 200


def test_one_image_has_no_interval():
    (found,) = agreement(scores([10, 50, 90]), scores([20, 40, 95]), {str(i): ["cat"] for i in range(3)}, n_resamples=20)
    assert found.spearman == 1 and found.spearman_ci is found.alpha_ci is found.kappa_ci is None and found.n_images == 1


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["kept", "paths", "beside", "bytes", "placeholder", "list", "gone"])
def test_which_image_an_answer_is_about(tmp_path, form):
    """By bytes, where there are any: under whatever name, in folders of before too."""
    rows = []
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i // 2))
        path = str(tmp_path / f"{i}.png")
        image = {
            "kept": {"image": "image.png", "image_id": f"digest {i // 2}"},
            "paths": {"image": path},
            "beside": {"image": f"{i}.png"},
            "bytes": {"image": {"bytes": png(i // 2), "path": None}},
            "placeholder": {"image": {"bytes": png(i // 2), "path": "image.png"}},
            "list": {"images": [f"{i}.png"]},
            "gone": {"image": f"gone/{i // 2}.png"},
        }
        rows.append({"id": i, "prediction": f"{i} cats", "accuracy": 10 * i} | image[form])
    file = tmp_path / ("rows.parquet" if form in ("bytes", "placeholder") else "rows.jsonl")
    if file.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    texts, images = read_answers(file)
    assert texts["3"] == "3 cats" and [len(images[str(i)]) for i in range(6)] == [1] * 6
    assert [images[str(i)] == images[str(i + 1)] for i in range(5)] == [True, False, True, False, True]
    (found,) = agreement(read_scores(file), read_scores(file), images, n_resamples=20)
    assert found.n_images == 3


def test_nothing_in_common():
    with pytest.raises(GranulonError, match="0 in common"):
        agreement(scores([1, 2]), {"x": {"accuracy": 1}, "y": {"accuracy": 2}})


def test_agreement_of_a_panel_leaves_out_what_nobody_was_asked():
    judges = {
        "a": {"accuracy_scores": [10, 50, 90, 0], "accuracy_samples": [[10, 12], [50, 40], [90, None], [0, 0]]},
        "b": {"accuracy_scores": [20, 50, None, 0], "accuracy_samples": [[20, 20], [50, 50], [None, None], [0, 0]]},
    }
    for one in judges.values():
        one |= {name.replace("accuracy", "hallucination"): values for name, values in list(one.items())}
    found = panel_agreement({"empty": [False, False, False, True], "samples": 2, "judges": judges})
    gaps = [[10, 50, 90], [20, 50, np.nan]]
    oracle = krippendorff.alpha(reliability_data=gaps, level_of_measurement="interval")
    assert found["accuracy"]["judges"] == pytest.approx(oracle)
    assert found["hallucination"]["samples"]["a"] == pytest.approx(alpha(np.array([10, 50]), np.array([12, 40])))
    assert found["accuracy"]["samples"]["b"] == 1
    assert alpha_of_many([[5, 5], [5, 5]]) is None and alpha_of_many([[1, None], [None, 2]]) is None
