"""AdaTA against NumPy and scikit-learn, and its promises: deterministic, batched, compiled, without host synchronisation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cluster import KMeans
from torch._subclasses.fake_tensor import FakeTensorMode

from granulon_hf.modeling.aggregation_granulon import aggregate, cosine_relation, kernel_kmeans, pooling_cells

OPTIONS = dict(num_slots=20, max_clusters=20)


def blobs(images, height, width, dim=16, centres=6, seed=0, noise=0.3):
    """Smooth regions on a grid, as real patch features are."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    points = torch.rand(images, centres, 2, generator=random)
    grid = torch.stack([rows, columns], -1).view(1, -1, 1, 2)
    nearest = (grid - points[:, None]).square().sum(-1).argmin(-1)
    means = torch.randn(images, centres, dim, generator=random)
    features = means.gather(1, nearest[..., None].expand(-1, -1, dim))
    return features + noise * torch.randn(features.shape, generator=random)


def levels(*pairs):
    return torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])


def numpy_pool(height, width, side):
    rows, columns = -(-height // side), -(-width // side)
    pool = np.zeros((rows * columns, height * width))
    for r in range(height):
        for c in range(width):
            pool[(r // side) * columns + c // side, r * width + c] = 1
    return pool / pool.sum(1, keepdims=True)


@pytest.mark.parametrize(("height", "width", "side"), [(14, 14, 4), (14, 14, 1), (5, 7, 2), (3, 9, 4), (1, 1, 4), (2, 3, 8)])
def test_pooling_is_a_plain_average_over_what_a_cell_really_holds(height, width, side):
    features = blobs(1, height, width)
    expected = numpy_pool(height, width, side) @ features[0].double().numpy()
    cells, shape = pooling_cells(torch.tensor([side]), height, width)
    assert shape[0].prod() == len(expected)
    actual = np.stack([features[0].double().numpy()[cells[0].numpy() == cell].mean(0) for cell in range(len(expected))])
    np.testing.assert_allclose(actual, expected, atol=1e-9)
    # With as many clusters as cells, or more, every semantic token is one cell.
    count = len(expected)
    out = aggregate(features, (height, width), *levels((side, count + 4)), num_slots=count, max_clusters=count + 4)
    got = out.tokens[0].double().numpy()
    order = np.argsort(got[:, 0])
    np.testing.assert_allclose(got[order], expected[np.argsort(expected[:, 0])], atol=1e-5)


@pytest.mark.parametrize("clustering", ["joint", "relation"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_pooling_is_pooling_of_single_patches(clustering, given, dtype):
    features = blobs(3, 5, 7).to(dtype)
    relation = torch.rand(3, 35, 35, generator=torch.Generator().manual_seed(1)) if given else None
    alpha, beta = levels((1, 9), (1, 4), (1, 40))
    options = OPTIONS | dict(relation=relation, clustering=clustering)
    pooled, not_pooled = (aggregate(features, (5, 7), choice, beta, **options) for choice in (alpha, None))
    for name, expected in pooled.items():
        torch.testing.assert_close(not_pooled[name], expected, rtol=0, atol=0)


def test_the_paper_example_14_by_4_gives_16_cells():
    cells, shape = pooling_cells(torch.tensor([4, 1, 2]), 14, 14)
    assert shape.tolist() == [[4, 4], [14, 14], [7, 7]]
    assert cells.max(1).values.tolist() == [15, 195, 48]


def numpy_adata(features, height, width, side, labels, eta=(1, 1, 1)):
    """Scores and tokens from the labels of the cells, in plain NumPy loops."""
    pool = numpy_pool(height, width, side)
    pooled = pool @ features
    rows, columns = -(-height // side), -(-width // side)
    position = np.array([[c // columns / max(rows - 1, 1), c % columns / max(columns - 1, 1)] for c in range(len(pooled))])
    largest = 0.25 * max((rows > 1) + (columns > 1), 1)
    scores, tokens = {}, {}
    for cluster in np.unique(labels):
        members = labels == cluster
        mean = pooled[members].mean(0)
        cosines = [f @ mean / np.linalg.norm(f) / np.linalg.norm(mean) for f in pooled[members]]
        dispersion = ((position[members] - position[members].mean(0)) ** 2).sum(1).mean() / largest
        scores[cluster] = eta[0] * members.mean() + eta[1] * np.clip(np.mean(cosines), 0, 1) - eta[2] * dispersion
        tokens[cluster] = mean
        assert 0 <= dispersion <= 1 + 1e-9
    return scores, tokens


@pytest.mark.parametrize(("height", "width", "side", "beta"), [(14, 14, 4, 5), (6, 9, 2, 7), (1, 12, 1, 3), (5, 5, 1, 20)])
def test_filter_and_tokens_against_numpy(height, width, side, beta):
    features = blobs(1, height, width)
    eta = [0.5, 2.0, 1.5]
    out = aggregate(features, (height, width), *levels((side, beta)), num_slots=6, max_clusters=20, filter_weights=eta)
    cells, _ = pooling_cells(torch.tensor([side]), height, width)
    labels = np.zeros(cells.max() + 1, dtype=int)
    labels[cells[0].numpy()] = out.assignment[0].flatten().numpy()
    scores, tokens = numpy_adata(features[0].double().numpy(), height, width, side, labels, eta)
    for cluster, score in scores.items():
        assert out.scores[0, cluster].item() == pytest.approx(score, abs=1e-5)
    best = sorted(scores, key=lambda c: (-round(scores[c], 9), c))[:6]
    assert out.kept_clusters[0, : len(best)].tolist() == best
    for slot, cluster in enumerate(best):
        np.testing.assert_allclose(out.tokens[0, slot].numpy(), tokens[cluster], atol=1e-5)
    assert (out.tokens[0, len(best) :] == 0).all()
    axes = [np.linspace(-1, 1, side) for side in (height, width)]
    for slot, cluster in enumerate(best):
        members = np.argwhere(out.assignment[0].numpy() == cluster)
        position = [axis[members[:, i]].mean() for i, axis in enumerate(axes)]
        np.testing.assert_allclose(out.positions[0, slot].numpy(), position, atol=1e-6)
    assert (out.positions[0, len(best) :] == 0).all()


def inertia(kernel, labels):
    total = np.trace(kernel)
    for cluster in np.unique(labels):
        members = labels == cluster
        total -= kernel[np.ix_(members, members)].sum() / members.sum()
    return total


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_inertia_is_close_to_scikit_learns_best_of_ten(weight):
    features = blobs(12, 14, 14, dim=32, centres=12, noise=0.8)
    relation = cosine_relation(features)
    kernel = relation * (1 + weight / 2)
    points = []
    for one in kernel.numpy():
        values, vectors = np.linalg.eigh(one)
        points.append((vectors * np.sqrt(values.clip(0)))[:, -32:])  # its rank; of the others the values are 0
    ratios = []
    for beta in (5, 10, 20):
        labels = kernel_kmeans(kernel, torch.ones(12, 196, dtype=torch.bool), torch.full((12,), beta), beta, 10)
        for image in range(12):
            best = KMeans(beta, n_init=10, random_state=0).fit(points[image]).inertia_
            ratios.append(inertia(kernel[image].numpy(), labels[image].numpy()) / best)
    assert np.mean(ratios) <= 1.05, np.mean(ratios)


def test_inertia_on_features_of_photographs():
    demo = pytest.importorskip("granulon_hf.demo_model")
    try:
        tower, processor = demo.load_vision_tower(torch.float32), demo.load_image_processor()
    except demo.MissingBackbones as error:
        pytest.skip(str(error))
    photographs = [Image.open(path) for path in sorted((Path(__file__).parents[2] / "examples" / "images").glob("*.jpg"))]
    with torch.no_grad():
        features = (
            tower(processor(photographs, return_tensors="pt")["pixel_values"]).last_hidden_state.flatten(2).transpose(1, 2)
        )
    kernel, ratios = cosine_relation(features), []
    for beta in (5, 10, 20, 50):
        labels = kernel_kmeans(
            kernel, torch.ones(kernel.shape[:2], dtype=torch.bool), torch.full((len(kernel),), beta), beta, 10
        )
        for image, points in enumerate(torch.nn.functional.normalize(features.double(), dim=-1)):
            best = KMeans(beta, n_init=10, random_state=0).fit(points.numpy()).inertia_
            ratios.append(inertia(kernel[image].numpy(), labels[image].numpy()) / best)
    assert np.mean(ratios) <= 1.05, ratios


def test_an_image_gets_the_same_alone_in_a_batch_and_again():
    features = blobs(9, 14, 14)
    alpha, beta = levels(*[(4, 5), (2, 10), (1, 20)] * 3)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    together = aggregate(features, (14, 14), alpha, beta, **OPTIONS)
    again = aggregate(features, (14, 14), alpha, beta, **OPTIONS)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(together.assignment, again.assignment)
    for image in range(9):
        one = slice(image, image + 1)
        alone = aggregate(features[one], (14, 14), alpha[one], beta[one], **OPTIONS)
        assert torch.equal(alone.assignment[0], together.assignment[image])
        assert torch.equal(alone.kept_clusters[0], together.kept_clusters[image])
        torch.testing.assert_close(alone.tokens[0], together.tokens[image])


@pytest.mark.parametrize(
    ("height", "width", "pair", "filled"),
    [(14, 14, (4, 5), 5), (14, 14, (1, 20), 20), (1, 1, (4, 5), 1), (2, 3, (1, 20), 6), (3, 5, (2, 50), 6), (1, 8, (2, 3), 3)],
)
@pytest.mark.parametrize("kind", ["blobs", "constant", "two values", "zeros"])
def test_every_level_fills_as_many_slots_as_it_can(height, width, pair, filled, kind):
    features = blobs(2, height, width)
    if kind == "constant":
        features = features[:, :1].expand_as(features).clone()
    elif kind == "two values":
        features = torch.where(torch.arange(height * width)[None, :, None] % 2 == 0, 1.0, -1.0).expand_as(features).clone()
    elif kind == "zeros":
        features = torch.zeros_like(features)
    out = aggregate(features, (height, width), *levels(pair, pair), num_slots=20, max_clusters=50)
    assert out.keep.sum(1).tolist() == [filled] * 2
    assert out.tokens.isfinite().all()
    for image in range(2):
        used = out.assignment[image].unique()
        assert used.tolist() == sorted(out.kept_clusters[image, :filled].tolist()) == list(range(filled))


def test_more_clusters_than_slots_keeps_the_best():
    out = aggregate(blobs(1, 14, 14), (14, 14), *levels((1, 50)), num_slots=8, max_clusters=50)
    kept = out.scores[0][out.kept_clusters[0]]
    assert (kept.diff() <= 0).all()
    assert kept.min() >= torch.sort(out.scores[0], descending=True).values[8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_differentiable_and_keep_the_dtype(dtype):
    features = blobs(1, 6, 6).to(dtype).requires_grad_()
    out = aggregate(features, (6, 6), *levels((2, 3)), num_slots=3, max_clusters=3)
    assert out.tokens.dtype == dtype
    out.tokens.float().sum().backward()
    # Every patch belongs to one of the three kept clusters: each cluster's mean hands a total weight of one to its patches.
    torch.testing.assert_close(features.grad[0, :, 0].float().sum(), torch.tensor(3.0), atol=2e-2, rtol=0)


def test_autocast_does_not_touch_the_clusters():
    features = blobs(3, 14, 14)
    expected = aggregate(features, (14, 14), *levels((4, 5), (2, 10), (1, 20)), **OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = aggregate(features, (14, 14), *levels((4, 5), (2, 10), (1, 20)), **OPTIONS)
    assert torch.equal(out.assignment, expected.assignment)
    assert torch.equal(out.kept_clusters, expected.kept_clusters)


def test_relation_and_its_rows():
    features = blobs(2, 6, 6)
    relation = torch.rand(2, 36, 36, generator=torch.Generator().manual_seed(0)).softmax(-1)
    common = dict(num_slots=4, max_clusters=4)
    pair = levels((1, 4), (1, 4))
    by_default = aggregate(features, (6, 6), *pair, **common)
    explicit = aggregate(features, (6, 6), *pair, relation=cosine_relation(features), **common)
    assert torch.equal(by_default.assignment, explicit.assignment)
    ignored = aggregate(features, (6, 6), *pair, relation=relation, relation_weight=0.0, **common)
    assert torch.equal(ignored.assignment, by_default.assignment)  # F̂F̂ᵀ and 1.5·F̂F̂ᵀ give the same clusters
    rows = aggregate(features, (6, 6), *pair, relation=relation, clustering="relation", **common)
    assert not torch.equal(rows.assignment, by_default.assignment)
    # The rows of A, by scikit-learn: no better by more than a tenth.
    for image in range(2):
        best = KMeans(4, n_init=10, random_state=0).fit(relation[image].numpy()).inertia_
        kernel = (relation[image] @ relation[image].T).double().numpy()
        assert inertia(kernel, rows.assignment[image].flatten().numpy()) <= 1.1 * best


def test_wrong_grid_is_refused():
    with pytest.raises(ValueError, match="35 .* 6 x 6"):
        aggregate(torch.zeros(1, 35, 4), (6, 6), *levels((1, 2)), **OPTIONS)


def test_no_host_synchronisation():
    """Under fake tensors any look at a value (`item`, a boolean index, `nonzero`) raises."""
    with FakeTensorMode():
        alpha, beta = torch.ones(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
        out = aggregate(torch.empty(3, 196, 8), (14, 14), alpha, beta, **OPTIONS)
    assert out.tokens.shape == (3, 20, 8)


def test_compiles_whole_and_once_for_all_levels():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda features, alpha, beta: aggregate(features, (6, 6), alpha, beta, num_slots=5, max_clusters=8).assignment,
        fullgraph=True,
        backend=backend,
    )
    features = blobs(2, 6, 6)
    for pair in ([(4, 5), (1, 8)], [(1, 3), (2, 2)], [(2, 8), (6, 8)]):
        alpha, beta = levels(*pair)
        expected = aggregate(features, (6, 6), alpha, beta, num_slots=5, max_clusters=8).assignment
        assert torch.equal(compiled(features, alpha, beta), expected)
    assert len(graphs) == 1


@pytest.mark.gpu
def test_the_gpu_finds_the_same_clusters_without_synchronising():
    features = blobs(4, 14, 14)
    alpha, beta = levels((4, 5), (2, 10), (1, 20), (1, 20))
    expected = aggregate(features, (14, 14), alpha, beta, **OPTIONS)
    inputs = [tensor.cuda() for tensor in (features, alpha, beta)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = aggregate(inputs[0], (14, 14), *inputs[1:], **OPTIONS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out.assignment.cpu(), expected.assignment)
