"""Reducers against plain NumPy, and their promises: batched, any grid, any budget, compiled, without host synchronisation."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from granulon_hf import GranulonConfig
from granulon_hf.modeling.reducers_granulon import REDUCERS, PatchFeatures, collect, in_row_major, order_of, register_reducer
from tests.modeling.test_aggregation import blobs

WITHOUT_WEIGHTS = ["adata", "pool", "attention-merge", "adaptive-prune", "question-dpp", "random"]
GRIDS = [(6, 6), (5, 7), (3, 8), (1, 4), (1, 1)]
BUDGETS = [1, 4, 9, 14, 20]  # also more than a small grid has patches
SLOTS = 20


def make(name, width=16):
    config = GranulonConfig(visual_tokens="semantic", reducer=name, num_semantic_tokens=SLOTS)
    torch.manual_seed(1)
    reducer = REDUCERS[name].build(config, width)
    if isinstance(reducer, torch.nn.Module):
        for parameter in reducer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        reducer.eval()
    return reducer


def patches_of(grid, images=5, seed=0):
    features = blobs(images, *grid, seed=seed)
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(images, grid[0] * grid[1], *shape, generator=random)  # noqa: E731
    attention = draw().pow(6)  # some stand out
    return PatchFeatures(features, grid, attention=attention, keys=draw(12) - 0.5, relevance=draw())


def one(patches, i):
    """The patches of one image as NumPy arrays."""
    names = ("features", "attention", "keys", "relevance")
    return {name: getattr(patches, name)[i].double().numpy() for name in names} | {"grid": patches.grid}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def places(grid):
    rows, columns = (np.linspace(-1, 1, size) if size > 1 else np.array([-1.0]) for size in grid)
    return np.array([(row, column) for row in rows for column in columns])


def nth(candidates, count):
    """Every n-th of a list, `count` of them."""
    return list(candidates[:: max(1, len(candidates) // count)][:count]) if count else []


def ranked(scores):
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


# --- oracles: tokens and places of one image at one budget ------------------------------------------------------------


def cells_of(grid, budget):
    height, width = grid
    rows, columns = (min(math.isqrt(budget), size) for size in grid)
    for r in range(rows):
        for c in range(columns):
            top, bottom = r * height // rows, -(-(r + 1) * height // rows)
            left, right = c * width // columns, -(-(c + 1) * width // columns)
            yield [y * width + x for y in range(top, bottom) for x in range(left, right)], (r, c, rows, columns)


def numpy_pool(image, budget):
    cells = [members for members, _ in cells_of(image["grid"], budget)]
    at = places(image["grid"])
    return [image["features"][cell].mean(0) for cell in cells], [at[cell].mean(0) for cell in cells]


def numpy_attention_merge(image, budget):
    features, number = image["features"], len(image["features"])
    merged = budget // 6
    dominant = sorted(ranked(image["attention"])[: budget - merged])
    rest = [i for i in range(number) if i not in dominant]
    targets = nth(rest, merged)
    cosine = unit(image["keys"]) @ unit(image["keys"]).T
    joined = {target: [] for target in targets}
    for i in rest:
        if targets and i not in targets:
            joined[max(targets, key=lambda target, i=i: (cosine[i, target], -target))].append(i)
    tokens = [features[i] for i in dominant]
    tokens += [features[t] + (features[joined[t]].mean(0) if joined[t] else 0) for t in targets]
    return tokens, places(image["grid"])[dominant + targets]


def numpy_adaptive_prune(image, budget):
    features, attention, number = image["features"], image["attention"], len(image["features"])
    first, third = np.quantile(attention, [0.25, 0.75])
    outliers = max(1, int((attention > third + 1.5 * (third - first)).sum()))
    main = ranked(attention)[: min(outliers, (budget + 1) // 2)]
    rest = [i for i in range(number) if i not in main]
    chosen = sorted(main + nth(rest, min(len(main), budget - len(main))))
    cosine = unit(image["keys"]) @ unit(image["keys"]).T
    tokens = []
    for i in chosen:
        near = [j for j in ranked(cosine[i]) if j != i][:32]
        tokens.append(features[i] + sum((attention[j] * features[j] for j in near), np.zeros(features.shape[1])))
    return tokens, places(image["grid"])[chosen]


def numpy_question_dpp(image, budget):
    relevance = image["relevance"]
    spread = relevance.max() - relevance.min()
    relevance = (relevance - relevance.min()) / spread if spread else np.ones_like(relevance)
    kernel = np.outer(relevance, relevance) * (unit(image["features"]) @ unit(image["features"]).T)
    chosen = []
    for _ in range(min(budget, len(relevance))):
        # The gain of a patch is a ratio of determinants.
        base = np.linalg.det(kernel[np.ix_(chosen, chosen)]) if chosen else 1.0
        gains = {
            i: np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])]) / base
            for i in range(len(relevance))
            if i not in chosen
        }
        chosen.append(max(gains, key=lambda i: (gains[i], -i)))
    chosen = sorted(chosen)
    return image["features"][chosen], places(image["grid"])[chosen]


ORACLES = {
    "pool": numpy_pool,
    "attention-merge": numpy_attention_merge,
    "adaptive-prune": numpy_adaptive_prune,
    "question-dpp": numpy_question_dpp,
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ORACLES)
def test_against_numpy(name, grid):
    patches = patches_of(grid)
    budgets = [min(budget, 6) if name == "question-dpp" else budget for budget in BUDGETS]  # determinants must not vanish
    out = make(name)(patches, torch.tensor(budgets), SLOTS)
    for i, budget in enumerate(budgets):
        tokens, at = ORACLES[name](one(patches, i), budget)
        count = len(tokens)
        assert out.keep[i].tolist() == [True] * count + [False] * (SLOTS - count)
        np.testing.assert_allclose(out.tokens[i, :count].numpy(), np.array(tokens), atol=1e-5)
        np.testing.assert_allclose(out.positions[i, :count].numpy(), np.array(at), atol=1e-6)
        assert not out.tokens[i, count:].any()
        assert not out.positions[i, count:].any()


@pytest.mark.parametrize("grid", GRIDS)
def test_queries_against_numpy(grid):
    reducer, patches = make("queries"), patches_of(grid)
    out = reducer(patches, torch.tensor(BUDGETS), SLOTS)
    weights = {name: value.double().numpy() for name, value in reducer.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    width = patches.features.shape[2]
    for i, budget in enumerate(BUDGETS):
        values = norm(one(patches, i)["features"], "norm")
        embed = []
        for row in range(grid[0]):
            for column in range(grid[1]):
                angles = [np.array([place]) * 10000.0 ** (-np.arange(width // 4) / (width // 4)) for place in (row, column)]
                embed.append(np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))]))
        parts = np.split(weights["attention.in_proj_weight"], 3), np.split(weights["attention.in_proj_bias"], 3)
        inputs = norm(weights["queries"], "query_norm"), values + np.array(embed), values
        query, key, value = (x @ matrix.T + bias for x, matrix, bias in zip(inputs, *parts, strict=True))
        scores = query @ key.T / math.sqrt(width)  # one head of 16 channels
        share = np.exp(scores - scores.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        found = share @ value @ weights["attention.out_proj.weight"].T + weights["attention.out_proj.bias"]
        np.testing.assert_allclose(out.tokens[i, :budget].detach(), norm(found, "out_norm")[:budget], atol=1e-4)
        np.testing.assert_allclose(out.positions[i, :budget].detach(), (share @ places(grid))[:budget], atol=1e-5)
        assert out.keep[i].sum() == budget


@pytest.mark.parametrize("grid", GRIDS)
def test_region_attention_against_numpy(grid):
    reducer, patches = make("region-attention"), patches_of(grid)
    out = reducer(patches, torch.tensor(BUDGETS), SLOTS)
    layers = dict(reducer.named_modules())
    run = lambda name, x: layers[name](torch.tensor(x).float()).detach().double().numpy()  # noqa: E731
    for i, budget in enumerate(BUDGETS):
        image = one(patches, i)
        cells = list(cells_of(grid, budget))
        rows, columns = cells[0][1][2:]
        map_ = patches.features[i].view(*grid, -1).permute(2, 0, 1)[None]
        coarse = torch.nn.functional.interpolate(map_, (rows, columns), mode="bilinear")[0].flatten(1).T.double().numpy()
        values = run("norm", image["features"])
        query, key, value = run("query_proj", run("query_norm", coarse)), run("key_proj", values), run("value_proj", values)
        for slot, (members, _) in enumerate(cells):
            scores = key[members] @ query[slot] / math.sqrt(len(query[slot]))
            share = np.exp(scores - scores.max())
            token = coarse[slot] + run("out_proj", (share / share.sum()) @ value[members])
            np.testing.assert_allclose(out.tokens[i, slot].detach(), token + run("mlp", token), atol=1e-4)
        assert out.keep[i].sum() == len(cells)


def test_downsample_takes_the_features_of_its_size():
    patches = patches_of((5, 7), images=3)
    sizes = {2: 4, 3: 9, 6: 30}  # six columns, but five rows
    patches.scales = {side: torch.randn(3, count, 16) for side, count in sizes.items()}
    out = make("downsample")(patches, torch.tensor([9, 5, 36]), 40)
    for i, side in enumerate((3, 2, 6)):
        count = sizes[side]
        assert out.keep[i].sum() == count
        assert torch.equal(out.tokens[i, :count], patches.scales[side][i])
        assert not out.tokens[i, count:].any()


def test_random_draws_patches_anew_in_training_only():
    patches, budget = patches_of((6, 6)), torch.full((len(BUDGETS),), 7)
    reducer = make("random")
    first, second = (reducer(patches, budget, SLOTS) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    patches.training = True
    drawn = [reducer(patches, budget, SLOTS) for _ in range(2)]
    assert not torch.equal(drawn[0].positions, drawn[1].positions)
    assert not torch.equal(drawn[0].positions[0], drawn[0].positions[1])
    for out in (first, *drawn):
        for i in range(len(budget)):
            rows = [patches.features[i].tolist().index(token) for token in out.tokens[i, :7].tolist()]
            assert rows == sorted(set(rows))


@pytest.mark.parametrize("name", [name for name in REDUCERS if name != "downsample"])
def test_ties_go_to_the_lower_index(name):
    """Where all patches are alike nothing is drawn, divided by zero or left out."""
    patches = PatchFeatures(torch.ones(2, 12, 16), (3, 4), attention=torch.ones(2, 12), relevance=torch.ones(2, 12))
    out = make(name)(patches, torch.tensor([4, 9]), SLOTS)
    assert out.tokens.isfinite().all()
    assert out.positions.isfinite().all()
    if name in ("attention-merge", "question-dpp"):
        kept = out.assignment[0].flatten()
        assert (kept[: 4 - 4 // 6] == torch.arange(4)).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", [name for name in REDUCERS if name != "downsample"])
def test_alone_as_in_a_batch(name, grid):
    reducer, patches = make(name), patches_of(grid)
    together = reducer(patches, torch.tensor(BUDGETS), SLOTS)
    for i, budget in enumerate(BUDGETS):
        fields = {name: getattr(patches, name)[i : i + 1] for name in ("features", "attention", "keys", "relevance")}
        alone = reducer(PatchFeatures(grid=grid, **fields), torch.tensor([budget]), SLOTS)
        assert torch.equal(alone.keep[0], together.keep[i])
        assert torch.equal(alone.assignment[0], together.assignment[i])
        torch.testing.assert_close(alone.tokens[0], together.tokens[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.positions[0], together.positions[i], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in REDUCERS if name != "downsample"])
def test_no_host_synchronisation(name):
    """Under fake tensors any look at a value (`item`, a boolean index, `nonzero`) raises."""
    with FakeTensorMode():
        reducer = make(name)
        out = reducer(PatchFeatures(torch.empty(3, 35, 16), (5, 7)), torch.ones(3, dtype=torch.long), SLOTS)
    assert out.tokens.shape == (3, SLOTS, 16)


@pytest.mark.parametrize("name", REDUCERS)
def test_compiles_whole_and_once_for_all_budgets(name):
    torch._dynamo.reset()
    graphs, reducer = [], make(name)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    patches = patches_of((6, 6))
    if name == "downsample":
        patches.scales = {side: torch.randn(len(BUDGETS), side**2, 16) for side in (1, 2, 3, 4)}

    def run(features, budget):
        patches.features = features
        return reducer(patches, budget, SLOTS).tokens

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for budgets in (BUDGETS, BUDGETS[::-1]):
        budget = torch.tensor(budgets)
        torch.testing.assert_close(compiled(patches.features, budget), run(patches.features, budget))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", [name for name in REDUCERS if name != "downsample"])
def test_tokens_are_differentiable_and_keep_the_dtype(name):
    patches = patches_of((4, 4))
    patches.features = patches.features.bfloat16().requires_grad_()
    out = make(name).bfloat16() if name in ("queries", "region-attention") else make(name)
    tokens = out(patches, torch.tensor(BUDGETS), SLOTS).tokens
    assert tokens.dtype == torch.bfloat16
    tokens.float().square().sum().backward()
    assert patches.features.grad.isfinite().all()
    assert patches.features.grad.any()


def test_one_draw_looks_drawn():
    """As a control it must be no grid: gaps between neighbors are spread as those of real draws are."""
    patches = patches_of((14, 14))
    kept = make("random")(patches, torch.full((5,), SLOTS), SLOTS).assignment[0].flatten() >= 0
    gaps = kept.nonzero().flatten().diff()
    drawn = [np.diff(np.sort(np.random.default_rng(i).permutation(196)[:SLOTS])).std() for i in range(200)]
    assert np.quantile(drawn, 0.02) < gaps.double().std().item() < np.quantile(drawn, 0.98)
    halves = kept.view(2, -1).sum(1).tolist()
    assert min(halves) >= 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_question_all_patches_are_as_relevant(dtype):
    features = torch.randn(8, 196, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = make("question-dpp")(PatchFeatures(features, (14, 14)), torch.ones(8, dtype=torch.long), 4)
    assert (out.assignment.flatten(1) >= 0).nonzero().tolist() == [[i, 0] for i in range(8)]


def test_a_registered_reducer_is_a_reducer_like_any_other():
    with pytest.raises(ValueError, match="brightest"):
        GranulonConfig(reducer="brightest")

    @register_reducer("brightest")
    def brightest(patches, budget, num_slots):
        rank = order_of(patches.features.float().norm(dim=-1))
        return collect(patches, patches.features, *in_row_major(rank < budget.unsqueeze(1)), num_slots)

    try:
        assert GranulonConfig(reducer="brightest").reducer == "brightest"
        patches = patches_of((3, 5))
        out = make("brightest")(patches, torch.tensor(BUDGETS), SLOTS)
        for i, budget in enumerate(BUDGETS):
            norms = patches.features[i].float().norm(dim=-1).numpy()
            kept = np.sort(np.argsort(-norms, kind="stable")[:budget])
            np.testing.assert_array_equal(out.tokens[i, : len(kept)].float().numpy(), patches.features[i, kept].float().numpy())
    finally:
        del REDUCERS["brightest"]
