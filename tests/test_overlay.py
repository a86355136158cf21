"""The overlay: every kept cluster in its colour with its rank, the rest grey, in the proportions of the photograph."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from granulon_hf.modeling.aggregation_granulon import GranulonAggregation
from granulon_hf.overlay import draw_clusters, model_view, rank_color, ranks, side_by_side
from tests.conftest import make_picture


def aggregation(assignment, kept):
    assignment = torch.tensor([assignment])
    scores = torch.zeros(1, int(assignment.max()) + 1)
    return GranulonAggregation(assignment=assignment, kept_clusters=torch.tensor([kept]), scores=scores)


GREY = Image.new("RGB", (300, 200), (128, 128, 128))


def saturation(pixel):
    return int(max(pixel)) - int(min(pixel))


def test_ranks():
    out = ranks(aggregation([[0, 1, 2], [2, 1, 3]], [2, 0, -1]))
    assert out.tolist() == [[1, -1, 0], [0, -1, -1]]


def test_kept_clusters_have_their_colour_and_the_rest_is_grey():
    picture = np.asarray(draw_clusters(GREY, aggregation([[0, 1, 2], [2, 1, 3]], [2, 0, -1]), size=600))
    assert picture.shape == (400, 600, 3)
    for row, column, rank in ((0, 2, 0), (1, 0, 0), (0, 0, 1)):
        pixel = picture[row * 200 + 40, column * 200 + 40].astype(int)
        expected = np.array(rank_color(rank)) * 0.5 + 128 * 0.5
        assert np.abs(pixel - expected).max() < 3
    for row, column in ((0, 1), (1, 1), (1, 2)):
        pixel = picture[row * 200 + 100, column * 200 + 100]
        assert saturation(pixel) < 3
        assert pixel.max() < 110


def test_labels_stand_inside_their_cluster():
    with_label = np.asarray(draw_clusters(GREY, aggregation([[0, 0, 1], [0, 0, 1]], [0, 1]), size=600)).astype(int)
    centre = with_label[80:320, 80:320]  # of the first cluster
    assert (centre.sum(-1) < 120).any(), "no ink in the middle of the first cluster"
    assert (centre.sum(-1) > 700).any() or saturation(with_label[200, 200]) > 0


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 3), (14, 14), (24, 24)])
@pytest.mark.parametrize("clusters", [1, 30])
def test_any_grid_and_number_of_clusters(grid, clusters):
    cells = np.arange(grid[0] * grid[1]).reshape(grid) % clusters
    out = draw_clusters(make_picture(0), aggregation(cells.tolist(), sorted(set(cells.flatten().tolist()))), title="x" * 300)
    assert max(out.size) == pytest.approx(896, abs=60)
    assert len({rank_color(rank) for rank in range(60)}) == 60


def test_nothing_kept():
    picture = np.asarray(draw_clusters(GREY, aggregation([[0, 1]], [-1, -1]), size=200))
    assert picture.max() < 110


def test_a_squeezed_image_keeps_its_proportions():
    processor = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    view = model_view(processor, GREY, torch.zeros(3, 64, 64))
    assert view.size == GREY.size
    assert draw_clusters(view, aggregation([[0, 1], [1, 0]], [0, 1]), size=600).size == (600, 400)


def test_a_cropped_image_shows_the_crop():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))  # the middle third is what a square crop keeps
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    view = model_view(processor, image, processor(image, return_tensors="pt")["pixel_values"][0])
    assert view.size[0] == view.size[1] >= 896
    inner = np.asarray(view)[:, 40:-40].reshape(-1, 3).mean(0)
    assert inner[2] > 240
    assert inner[0] < 15


def test_side_by_side():
    row = side_by_side([Image.new("RGB", (30, 20), "red"), Image.new("RGB", (50, 40), "blue")])
    assert row.size == (96, 40)
    assert row.getpixel((5, 5)) == (255, 0, 0)
    assert row.getpixel((90, 35)) == (0, 0, 255)
