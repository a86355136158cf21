"""The gallery: joining, scores, marks, bounded pictures, and a page on which nothing of a model or data set is markup."""

import base64
import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from granulon_hf.cli.gallery import gallery
from granulon_hf.errors import GranulonError
from granulon_hf.evaluation import gallery as work
from tests.conftest import make_picture

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(gallery)

EVIL = """</script><script>window.hit=1</script><img src=x onerror="window.hit=1">'"\u2028<!--{{ 7*7 }}]]>&amp;"""


def write_run(folder, predictions, *, model="org/model", **columns):
    """A folder as PredictionRun writes it; `columns` are values, or functions of the index."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i, (key, prediction) in enumerate(predictions.items()):
        make_picture(i).save(folder / "images" / f"{i}.png")
        row = {"id": key, "question": f"Question {key}?", "reference": "a red cup", "task": "vqa", "choices": None, "meta": {}}
        row |= {"images": [f"images/{i}.png"], "prediction": prediction, "granularity": "coarse"}
        row |= {"granularity_probs": {"coarse": 0.7, "middle": 0.2, "fine": 0.1}, "prompt_tokens": 9, "new_tokens": 3}
        rows.append(row | {name: value(i) if callable(value) else value for name, value in columns.items()})
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"description": {"model": {"source": model}}}))
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    """The one sentence of a refusal."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert re.fullmatch(r"Error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr


class Page(HTMLParser):
    """Elements of a page as a browser's parser sees them, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.inside = [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.last = tag

    def handle_data(self, data):
        if self.cdata_elem:
            self.inside.setdefault(self.cdata_elem, []).append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture
def runs(tmp_path):
    a = write_run(tmp_path / "a", {"1": "a red cup", "2": "a dog", "3": "red"}, model="org/first")
    b = write_run(tmp_path / "b", {"3": "a red cup", "2": "a red cup", "4": "x", "1": "A red cup."}, model="org/second")
    return a, b


def cases_of(*folders, **scores):
    found = work.read_runs(folders)
    return work.join(found, scores)


def test_samples_are_joined_by_id(runs):
    cases = cases_of(*runs)
    assert [case.id for case in cases] == ["1", "2", "3"]
    assert [[answer.model for answer in case.answers] for case in cases] == [["first", "second"]] * 3
    assert [case.answers[1].prediction for case in cases] == ["A red cup.", "a red cup", "a red cup"]
    assert cases[1].answers[0].recall == pytest.approx(1 / 3)  # the released code's: {a} of {a, red, cup}
    assert [[answer.right for answer in case.answers] for case in cases] == [[True, True], [False, True], [True, True]]


def test_orders(runs):
    cases = cases_of(*runs)
    assert [case.id for case in work.ordered(cases, "recall")] == ["2", "3", "1"]
    assert [case.id for case in work.ordered(cases, "difference")] == ["2", "3", "1"]
    cases[2].answers[0].accuracy, cases[2].answers[0].hallucination = 10, 90
    cases[0].answers[0].accuracy, cases[0].answers[0].hallucination = 90, 10
    assert [case.id for case in work.ordered(cases, "judge")] == ["3", "1", "2"]  # the unscored last
    assert [case.id for case in work.ordered(cases, "data")] == ["1", "2", "3"]


def test_an_option_is_right_by_its_letter(tmp_path):
    folder = write_run(tmp_path / "a", {"1": "B", "2": "A"}, choices=["a dog", "a red cup"])
    assert [case.answers[0].right for case in cases_of(folder)] == [True, False]


def test_an_empty_answer_is_never_right(tmp_path):
    folder = write_run(tmp_path / "a", {"1": "", "2": "?"}, reference="")
    assert [case.answers[0].right for case in cases_of(folder)] == [False, True]


def test_the_page(runs, tmp_path):
    out = tmp_path / "page.html"
    result = run(*runs, "--out", out, "--title", "A <title>", "--limit", 2, "--sort", "difference")
    assert result.exit_code == 0, result.output
    assert "2 of 3 samples, 2 models, 0." in result.stdout
    assert "Left out of second, since not every folder has them: 1 of 4." in result.stdout
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert [json.loads(a["data-facts"])["keys"]["data"] for a in page.all("article")] == [1, 2]
    assert len(page.all("img")) == 2
    for picture in page.all("img"):
        image = Image.open(io.BytesIO(base64.b64decode(picture["src"].removeprefix("data:image/jpeg;base64,"))))
        assert image.format == "JPEG"
        assert picture["alt"]
        assert (str(image.width), str(image.height)) == (picture["width"], picture["height"])
    assert "A &lt;title&gt;" in text
    assert "http" not in re.sub(r"http-equiv", "", text), "the page names something outside of itself"


def test_the_policy_allows_its_own_script_and_style_alone(runs, tmp_path):
    out = tmp_path / "page.html"
    assert run(*runs, "--out", out).exit_code == 0
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert rules[f"{tag}-src"] == f"'{work.digest(content)}'"
    assert not [a for _, a in page.elements if "style" in a or any(name.startswith("on") for name in a)]


def test_what_comes_from_data_is_text(tmp_path):
    levels = {"granularity": EVIL, "granularity_probs": {EVIL: 1.0}}
    odd = {EVIL: EVIL, "\ud800half": "half \udc00 a character \x00 \u202e"}
    folder = write_run(
        tmp_path / "a", odd, model=EVIL.replace("/", ""), question=EVIL, reference=EVIL, task=EVIL, choices=[EVIL], **levels
    )
    other = write_run(tmp_path / "b", odd, question=EVIL, reference=EVIL, task="other", choices=[EVIL], error=EVIL, **levels)
    scores = tmp_path / "samples.jsonl"
    scores.write_text(json.dumps({"id": EVIL, "accuracy": None, "hallucination": None, "reason": EVIL, "hallucinated": [EVIL]}))
    plain = write_run(tmp_path / "plain" / "a", {"1": "x"})
    options = ("--title", EVIL, "--mark-unsupported", "--scores", f"{folder}={scores}")
    assert run(folder, other, *options, "--out", tmp_path / "evil.html").exit_code == 0
    assert run(plain, "--out", tmp_path / "plain.html").exit_code == 0
    evil, harmless = (Page((tmp_path / f"{name}.html").read_text(encoding="utf-8")) for name in ("evil", "plain"))
    assert len(evil.all("script")) == len(evil.all("style")) == 1
    assert evil.inside["script"] == harmless.inside["script"], "data reached the script"
    assert evil.inside["style"] == harmless.inside["style"]
    assert {tag for tag, _ in evil.elements} - {tag for tag, _ in harmless.elements} <= {
        "mark",
        "select",
        "option",
        "label",
        "input",
    }
    assert all(picture["src"].startswith("data:image/jpeg") for picture in evil.all("img"))
    assert not [a for _, a in evil.elements if any(name.startswith("on") for name in a)]
    assert "49" not in re.findall(r"<title>(.*?)</title>", (tmp_path / "evil.html").read_text())[0]
    assert json.loads(evil.all("article")[0]["data-facts"])["task"] == EVIL


def test_scores_of_the_judge(runs, tmp_path):
    rows = [
        {
            "id": "1",
            "prediction": "a red cup",
            "accuracy": 20,
            "hallucination": 70,
            "reason": None,
            "hallucinated": ["Red CUP", "re"],
        },
        {"id": "2", "prediction": "a dog", "accuracy": None, "hallucination": None, "reason": "no numbers"},
    ]
    (runs[0] / "predictions.judged").mkdir()
    (runs[0] / "predictions.judged" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "page.html"
    assert run(*runs, "--out", out).exit_code == 0  # found where `granulon judge run` puts them
    text = out.read_text(encoding="utf-8")
    assert '<mark class="hallucinated">red cup</mark>' in text
    assert text.count('<mark class="hallucinated">') == 2, "one phrase and the legend: 're' is part of a word"
    assert "no numbers" in text
    assert text.index("Question 1?") < text.index("Question 2?"), "the only scored sample is the worst"
    assert "<td>20.0</td>" in re.sub(r"\s+", "", text)


def test_marks_without_a_judge_are_asked_for_and_named_a_hint(runs, tmp_path):
    out = tmp_path / "page.html"
    run(*runs, "--out", out)
    assert "<mark" not in out.read_text()
    run(*runs, "--out", out, "--mark-unsupported")
    assert '<mark class="unsupported">dog</mark>' in out.read_text()
    assert "not a verdict" in html.unescape(out.read_text())


def test_unsupported_words():
    spans = work.unsupported_spans("The dogs near a Red cup are barking.", "Where are the dogs?", "a red cup")
    assert work.mark("The dogs near a Red cup are barking.", spans) == [
        ("", "The dogs "), ("unsupported", "near"), ("", " a Red cup are "), ("unsupported", "barking"), ("", "."),
    ]  # fmt: skip


def test_marks_overlap_and_lose_nothing():
    assert work.mark("abcdef", [(1, 4, "x"), (3, 6, "y")]) == [("", "a"), ("x", "bcd"), ("y", "ef")]
    assert work.mark("", []) == []


def test_pictures_are_bounded():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1400, 3), dtype=np.uint8))
    made = work.picture(noise)
    assert len(base64.b64decode(made.url.partition(",")[2])) <= work.PICTURE_BYTES
    assert made.width / made.height == pytest.approx(14 / 9, rel=0.02)
    assert 200 * 2 * work.PICTURE_BYTES * 4 / 3 < 18e6, "200 samples with overlays, and two megabytes of text, in 20"


def test_an_image_that_cannot_be_read_is_said_and_another_folder_is_asked(runs, tmp_path):
    out = tmp_path / "page.html"
    (runs[0] / "images" / "0.png").unlink()
    assert run(*runs, "--out", out).exit_code == 0
    assert "cannot be read" not in out.read_text()
    (runs[1] / "images" / "3.png").write_bytes(b"no image")
    assert run(*runs, "--out", out).exit_code == 0
    assert out.read_text().count("This image cannot be read.") == 1


def test_overlays(runs, tmp_path, build):
    model, processor = build()
    cases = cases_of(*runs)
    levels = {"1": model.config.level_names[-1]}
    work.write_gallery(
        tmp_path / "page.html", cases, draw=work.cluster_drawer(model.eval(), processor, levels), overlay_model="toy"
    )
    assert cases[0].overlay_level == levels["1"]
    assert all(case.overlay_level in model.config.level_names for case in cases)
    page = Page((tmp_path / "page.html").read_text())
    assert len([a for a in page.all("img") if a["class"] == "overlay"]) == 3
    assert len([a for a in page.all("button") if a.get("aria-pressed") == "false"]) == 3


def test_a_model_without_clusters_is_refused(runs, build):
    model, processor = build("dinov3-qwen2.5")
    with pytest.raises(GranulonError, match="clusters"):
        work.cluster_drawer(model, processor)


def test_names(runs, tmp_path):
    twin = write_run(tmp_path / "twin", {"1": "x"}, model="org/first")
    assert [run.name for run in work.read_runs([runs[0], twin])] == ["first (a)", "first (twin)"]
    out = tmp_path / "page.html"
    assert run(*runs, "--out", out, "--name", f"{runs[0]}=ours = best").exit_code == 0
    assert '<th scope="row">ours = best</th>' in out.read_text()


def change(folder, **values):
    path = folder / "predictions.jsonl"
    rows = [json.loads(line) | values for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b"3", b"{}", b'{"description": 3}', b"\xff", b'{"description": null}']
)
def test_a_folder_without_a_run_is_told_without_python(runs, tmp_path, content):
    path = runs[1] / "run.json"
    path.unlink() if content is None else path.write_bytes(content)
    sentence = refused(*runs)
    assert str(runs[1]) in sentence and "run.json" in sentence
    assert not re.search(r"\w+(?:Error|Exception)\b|Errno|None|\(\d", sentence.removeprefix("Error"))


def test_bad_input_is_one_sentence(runs, tmp_path):
    a, b = runs
    assert "no folder of predictions" in refused(a, tmp_path)
    assert "no folder of predictions" in refused(a, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert "given twice" in refused(a, a)
    assert "Unknown --sort" in refused(a, b, "--sort", "best")
    assert "cannot be written" in refused(a, b, "--out", tmp_path)
    assert "cannot be written" in refused(a, b, "--out", tmp_path / "no" / "page.html")
    assert "one of the prediction folders" in refused(a, b, "--scores", "elsewhere=x")
    assert "no file" in refused(a, b, "--scores", f"{a}={tmp_path / 'none.jsonl'}")
    assert "nor" in refused(a, b, "--overlay", tmp_path / "no-model", "--out", tmp_path / "page.html")
    scores = tmp_path / "scores.jsonl"
    for row, message in (
        ({"id": "1", "accuracy": 200}, "not 0 to 100"),
        ({"id": "1", "accuracy": True}, "accuracy is true"),
        ({"id": "1", "hallucinated": "cup"}, "not a list of phrases"),
        ({"id": "1", "prediction": "another"}, "scores another answer"),
        ({"id": "9", "accuracy": 1}, "no id in common"),
    ):
        scores.write_text(json.dumps(row))
        assert message in refused(a, b, "--scores", f"{a}={scores}")
    change(b, question="Another?")
    assert "another question or reference" in refused(a, b)
    change(a, images=["../b/images/0.png"])
    assert "outside of the folder" in refused(a)
    change(a, images=[], granularity_probs={"coarse": "much"})
    assert "no probabilities" in refused(a)
    change(a, prediction=7)
    assert "prediction is 7" in refused(a)
    lonely = write_run(tmp_path / "lonely", {"77": "x"})
    assert "nothing in common" in refused(b, lonely)
    (lonely / "predictions.jsonl").write_text("")
    assert "no predictions yet" in refused(lonely)
