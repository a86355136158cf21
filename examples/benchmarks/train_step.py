"""Our training step against the released style and against TRL's SFTTrainer: one model, the same samples, in turns.

    python examples/benchmarks/train_step.py                                     # a CPU, scaled down
    python examples/benchmarks/train_step.py --device cuda --size full --samples 256 --rounds 5

What is timed is the training of the projector alone, on batches that are collated before: copying a batch to the device,
forward, backward and a step of AdamW with a learning rate of 0, so that every arm sees the same weights for ever. Decoding of
images and tokenizing are not in it (data_loading.py measures them). In each round every arm goes once over all samples; the
order rotates. Reported are the median over rounds and, round by round, the ratio to the first arm, with its least and greatest
value. All arms must give the same mean loss over all labelled tokens (to 1e-5 in float32), or the script fails.

    ours, grouped       GranulonTrainer.compute_loss on batches of similar length
    ours, packed        the same without padding, with attention within samples; budget: --batch times the mean length, or four
                        times that: accumulation folded into one pass
    released style      gradient checkpointing as LLaVA's script switches it on (inputs made to require gradients, so that the
                        tower is in the graph), logits at all positions, random batches padded on the right
    TRL                 SFTTrainer.compute_loss, its collator (prompt and completion, loss on the completion), no checkpointing,
                        random batches: it refuses packing and padding-free batches where there are images. Its loss takes all
                        positions in chunks on a CPU, and labelled positions on a GPU.
    TRL, grouped        the same in our grouped batches: Trainer's `group_by_length` works in TRL too, once somebody has counted
                        the tokens of every sample, image slots included (`collator.lengths`); TRL does not for images

`--ablation` adds the released style with one of its habits taken away at a time, and `--compile` our packed arms as
`examples/train.py --compile regional` has them: their model is a copy of the same weights, which the warm-up compiles.

`--fp8` adds our packed arm with the products of the frozen language model in float8 (`--frozen_dtype fp8`), with `--compile`
compiled; its loss is another one, and the difference is printed. On a CPU it says that alone: its products are slow there.

`--kernels` counts what one pass over a batch launches, forward and backward: kernels on a GPU; on a CPU operators that compute
something, of which a compiled region counts as one for each loop that the compiler makes of it. Those of the tower and of AdaTA
are counted apart, too: both have a forward pass alone, since the tower is frozen.

TRL's collator keeps the question mask of the prompts alone, which fits nothing and is dropped: its controller would read the
answers, but the controller here is untrained and always says "middle". It also puts a label on the line break behind the
end-of-turn token, which is taken off before the clock starts.

Samples: one drawn picture (216 slots) and random words; the answer has a log-normal number of words (median 130, sigma 1.2, at
most 1,300). `padding` is cells by tokens: 1.00 is none. tokens/s counts real tokens, image slots included.

Sizes: `full` has the shapes of Qwen2.5-1.5B and DINOv3-L with random weights; `small` is an eighth as wide everywhere, with 6
layers for 28 in the decoder and 5 for 24 in the tower. Its vocabulary is chosen so that logits cost as much of the decoder as
at full size (`head / decoder`, printed; a vocabulary of 32,000 would make it eight times as much, and flatter us).

On a CPU: float32 on one thread, in seconds of the processor, so that other load matters little.

On a GPU: frozen weights and autocast in bfloat16; memory is the peak of what is allocated; the share of the measured bf16
matmul rate counts the products that our step needs (those of GranulonTrainer.step_flops and logits at labelled positions; real
tokens only, no attention).
"""

import argparse
import copy
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from datasets import List as ListOf
from transformers import AutoConfig, CLIPImageProcessor, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from granulon_hf import variants  # noqa: E402
from granulon_hf.data import Sample  # noqa: E402
from granulon_hf.data.collator import GranulonCollator  # noqa: E402
from granulon_hf.data.datasets.shapes import Shapes  # noqa: E402
from granulon_hf.data.packing import balanced_packs  # noqa: E402
from granulon_hf.modeling.configuration_granulon import GranulonConfig  # noqa: E402
from granulon_hf.modeling.modeling_granulon import GranulonForConditionalGeneration  # noqa: E402
from granulon_hf.modeling.processing_granulon import GranulonProcessor  # noqa: E402
from granulon_hf.training import GranulonTrainer, RecipeArguments, set_stage  # noqa: E402
from granulon_hf.training.trainer import GroupedSampler  # noqa: E402

# Fields of (vision, text) configs; those of GranulonConfig's defaults where nothing is said.
SIZES: dict[str, tuple[dict, dict]] = {
    "full": ({}, {}),
    "small": (
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 2},
        {
            **{"hidden_size": 192, "intermediate_size": 1120, "num_hidden_layers": 6, "num_attention_heads": 3},
            **{"num_key_value_heads": 1, "vocab_size": 4128},
        },
    ),
    "tiny": (  # for tests: no honest proportions
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 96},
        {
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"num_key_value_heads": 2, "vocab_size": 512},
        },
    ),
}
# In training mode DINOv3 scales its positions at random, and model.train() puts a frozen tower in training mode too, but for
# ours: it is switched off, or losses could not be compared.
EVERYWHERE = {"pos_embed_rescale": None}
WORDS = "a the dog cup of coffee rocket flower people on beach red green blue yellow left right top bottom picture car".split()
IMAGE = {"type": "image"}
FP8 = "ours, packed, fp8"


@dataclass
class Arm:
    """One way to train.

    Args:
        name (`str`): as in the table.
        batches (`list[dict]`): all samples, collated.
        loss (`callable`): mean over the labels of a batch.
        checkpointing (`bool`): of every layer.
        tower_in_graph (`bool`): whether inputs are made to require gradients.
        model (`GranulonForConditionalGeneration`, *optional*): a model of its own, with the weights of the others'.
    """

    name: str
    batches: list[dict[str, Any]]
    loss: Callable[[dict[str, Any]], torch.Tensor]
    checkpointing: bool = False
    tower_in_graph: bool = False
    model: Any = None

    def padding(self, tokens: int) -> float:
        return sum(batch["input_ids"].numel() for batch in self.batches) / tokens


def config_of(size: str) -> GranulonConfig:
    defaults = GranulonConfig.sub_configs_defaults
    vision, text = (
        AutoConfig.for_model(defaults[name].model_type, **{**defaults[name].init_kwargs, **fields})
        for name, fields in zip(("vision_config", "text_config"), (EVERYWHERE | SIZES[size][0], SIZES[size][1]), strict=True)
    )
    return GranulonConfig(vision_config=vision, text_config=text)


def build(size: str, device: str, dtype: torch.dtype) -> tuple[Any, GranulonProcessor]:
    """Random weights of that size, the projector to be trained, and a processor with the toy tokenizer."""
    set_seed(0)
    config = config_of(size)
    tokenizer = variants.tiny_tokenizer(variants.DECODERS["qwen2.5"])
    side = config.vision_config.image_size
    processor = GranulonProcessor.from_parts(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer,
        config.vision_config,
        num_semantic_tokens=config.num_semantic_slots,
    )
    config.image_token_id = processor.image_token_id
    config.image_seq_length = (side // config.vision_config.patch_size) ** 2
    config.text_config.pad_token_id = tokenizer.pad_token_id
    with torch.device(device):
        model = GranulonForConditionalGeneration._from_config(config, dtype=dtype)
    set_stage(model, "projector")
    return model, processor


def shares(size: str) -> dict[str, float]:
    """Parameters of the output layer and of the tower, by those of the decoder's layers."""
    with torch.device("meta"):
        model = GranulonForConditionalGeneration(config_of(size))
    tower, decoder = (sum(p.numel() for p in part.parameters()) for part in (model.model.vision_tower, layers(model)))
    return {"head / decoder": round(model.lm_head.weight.numel() / decoder, 3), "tower / decoder": round(tower / decoder, 3)}


def layers(model: Any) -> torch.nn.Module:
    return model.model.language_model.layers


def make_samples(count: int, median_words: int) -> list[Sample]:
    random, pictures = np.random.default_rng(0), [Shapes(32)[i].images for i in range(32)]

    def say(number: int) -> list[dict[str, str]]:
        return [{"type": "text", "text": " ".join(random.choice(WORDS, number))}]

    samples = []
    for i in range(count):
        words = int(np.clip(random.lognormal(np.log(median_words), 1.2), 3, 10 * median_words))
        asked, answer = say(random.integers(6, 24)), say(words)
        messages = [{"role": "user", "content": [IMAGE, *asked]}, {"role": "assistant", "content": answer}]
        samples.append(Sample(str(i), pictures[i % 32], messages, answer[0]["text"], "caption"))
    return samples


def draw(collator: GranulonCollator, options: argparse.Namespace) -> tuple[list[Sample], list[int], list[list[int]]]:
    """Samples of some length-grouped batches of a large set, evenly from the shortest to the longest, with lengths and batches.

    LengthGroupedSampler sorts 50 batches at a time, and fewer where there are few samples: a small set alone would not be
    grouped as in real training.
    """
    pool = make_samples(max(200, 4 * 50 * options.batch), options.median_words)
    lengths = collator.lengths(pool)
    order = list(GroupedSampler(options.batch, lengths, 0))
    batches = [order[i : i + options.batch] for i in range(0, len(order) - options.batch + 1, options.batch)]
    batches.sort(key=lambda batch: sum(lengths[i] for i in batch))
    count = options.samples // options.batch
    chosen = [batches[int((k + 0.5) * len(batches) / count)] for k in range(count)]
    kept = [i for batch in chosen for i in batch]
    batches = [list(range(i, i + options.batch)) for i in range(0, len(kept), options.batch)]
    return [pool[i] for i in kept], [lengths[i] for i in kept], batches


def for_trl(samples: list[Sample]) -> Dataset:
    rows = [{"images": s.images, "prompt": s.prompt, "completion": s.messages[-1:]} for s in samples]
    return Dataset.from_list(rows).cast_column("images", ListOf(Image()))


def drop_labels_behind_the_answer(batch: dict[str, Any], end: int) -> dict[str, Any]:
    ended = batch["labels"] == end
    batch["labels"] = batch["labels"].masked_fill(ended.cumsum(1) > ended.int(), -100)
    return dict(batch)


def make_arms(model: Any, processor: GranulonProcessor, options: argparse.Namespace, folder: str) -> tuple[list[Arm], int]:
    """The arms, and how many tokens the samples have."""
    # Now: hooks that trainers leave hold on to their model.
    twin, float8_twin = (copy.deepcopy(model) if wanted else None for wanted in (options.compile, options.fp8))
    collator, cpu = GranulonCollator(processor), options.device == "cpu"
    samples, lengths, grouped = draw(collator, options)
    common = {"per_device_train_batch_size": options.batch, "use_cpu": cpu, "bf16": False, "report_to": "none"}
    ours = GranulonTrainer(
        model,
        RecipeArguments(output_dir=folder, auto_precision=False, **common),
        data_collator=collator,
        train_dataset=samples,
        lengths=lengths,
        processing_class=processor,
    )
    rows = for_trl(samples)
    trl = SFTTrainer(
        model,
        SFTConfig(output_dir=folder, gradient_checkpointing=False, max_length=None, **common),
        train_dataset=rows,
        processing_class=processor,
    )

    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    random = [[order[i] for i in batch] for batch in grouped]
    budget = max(options.batch * sum(lengths) // len(lengths), max(lengths))
    # As --batching packed has it, which also says how packed rows attend.
    packed = GranulonTrainer(
        model,
        RecipeArguments(output_dir=folder, auto_precision=False, **common),
        data_collator=GranulonCollator(processor, packing=True),
        train_dataset=samples,
        lengths=lengths,
        max_tokens_per_batch=budget,
        processing_class=processor,
    )

    def packs(tokens):
        return collate(balanced_packs(range(len(samples)), lengths, tokens), packed.data_collator)

    def collate(indices, make=collator):
        return [make([samples[i] for i in batch]) for batch in indices]

    def collate_trl(indices):
        end = processor.tokenizer.eos_token_id
        made = [drop_labels_behind_the_answer(trl.data_collator([rows[i] for i in batch]), end) for batch in indices]
        return [{name: value for name, value in batch.items() if name != "question_mask"} for batch in made]

    def full(batch):
        return model(**batch, use_cache=False).loss

    def lean(batch):
        return model(**batch, use_cache=False, skip_logits=True).loss

    def by_trl(batch):
        return trl.compute_loss(model, dict(batch))

    padded, similar = collate(random), collate(grouped)
    arms = [
        Arm("ours, grouped", similar, lambda batch: ours.compute_loss(model, batch)),
        Arm("ours, packed", packs(budget), lambda batch: packed.compute_loss(model, batch)),
        Arm("ours, packed, 4 batches in one", packs(4 * budget), lambda batch: packed.compute_loss(model, batch)),
        Arm("released style", padded, full, checkpointing=True, tower_in_graph=True),
        Arm("TRL", collate_trl(random), by_trl),
        Arm("TRL, grouped", collate_trl(grouped), by_trl),
    ]
    if options.compile:
        compiled = GranulonTrainer(
            twin,
            RecipeArguments(output_dir=folder, auto_precision=False, compile="regional", **common),
            data_collator=GranulonCollator(processor, packing=True),
            train_dataset=samples,
            lengths=lengths,
            max_tokens_per_batch=budget,
            processing_class=processor,
        )
        name, loss = "ours, packed, compiled", lambda batch: compiled.compute_loss(twin, batch)
        arms += [
            Arm(name, packs(budget), loss, model=twin),
            Arm(f"{name}, 4 batches in one", packs(4 * budget), loss, model=twin),
        ]
    if options.fp8:
        rounded = GranulonTrainer(
            float8_twin,
            RecipeArguments(
                output_dir=folder,
                auto_precision=False,
                frozen_dtype="fp8",
                compile="regional" if options.compile else "none",
                **common,
            ),
            data_collator=GranulonCollator(processor, packing=True),
            train_dataset=samples,
            lengths=lengths,
            max_tokens_per_batch=budget,
            processing_class=processor,
        )
        arms.append(Arm(FP8, packs(budget), lambda batch: rounded.compute_loss(float8_twin, batch), model=float8_twin))
    if options.ablation:
        arms += [
            Arm("released, tower not in the graph", padded, full, checkpointing=True),
            Arm("released, no checkpointing", padded, full, tower_in_graph=True),
            Arm("released, logits at labels", padded, lean, checkpointing=True, tower_in_graph=True),
            Arm("released, grouped", similar, full, checkpointing=True, tower_in_graph=True),
        ]
    if options.arms:
        arms = [arm for arm in arms if arm.name in options.arms]
    return arms, sum(lengths)


@contextmanager
def habits(model: Any, arm: Arm):
    """Switch on what the arm wants, and off again."""
    if arm.checkpointing:
        model.activation_checkpointing_enable()
    if arm.tower_in_graph:
        model.enable_input_require_grads()
    try:
        yield
    finally:
        if arm.checkpointing:
            model.activation_checkpointing_disable()
        if arm.tower_in_graph:
            model.disable_input_require_grads()


def train(model: Any, arm: Arm, batches: list[dict[str, Any]], optimizer: Any, device: str) -> dict[str, float]:
    """Go over the batches once: seconds, mean loss over all labels, peak memory in GiB."""
    cuda, model = device != "cpu", arm.model or model
    total, labels = torch.zeros((), device=device, dtype=torch.float64), 0
    with habits(model, arm):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        clock = time.perf_counter if cuda else time.process_time
        start = clock()
        for batch in batches:
            count = int((batch["labels"] != -100).sum())
            inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            model.train()  # as Trainer does before every step
            with torch.autocast(device, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
                loss = arm.loss(inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total, labels = total + loss.detach().double() * count, labels + count
        if cuda:
            torch.cuda.synchronize()
        seconds = clock() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {"seconds": seconds, "loss": total.item() / labels, "peak": peak, "labels": labels}


# Operators of a CPU that only say how to look at memory, or ask for some.
WITHOUT_WORK = re.compile(
    r"aten::(_?reshape|_?unsafe_view|view|as_strided|t$|transpose|permute|expand|(un)?squeeze|select|slice|narrow|split|unbind|chunk|"
    r"detach|alias|empty|new_empty|resize|set_|lift|item|_local_scalar|is_|result_type|unfold|diagonal|movedim|swapaxes)"
)


@contextmanager
def named_parts(model: Any):
    """Name what the tower and AdaTA do in a profile."""
    tower, reducer = model.model.vision_tower, model.model.reducer
    forward = tower.forward

    def inside(name: str, call: Callable) -> Callable:
        def run(*args, **kwargs):
            with torch.profiler.record_function(name):
                return call(*args, **kwargs)

        return run

    tower.forward = inside("tower", forward)
    if not isinstance(reducer, torch.nn.Module):
        model.model.reducer = inside("AdaTA", reducer)
    try:
        yield
    finally:
        tower.forward, model.model.reducer = forward, reducer


def kernels(model: Any, arm: Arm, device: str) -> dict[str, int]:
    """Count what the pass over an arm's first batch launches: in the tower, in AdaTA, and in all."""
    model, cuda = arm.model or model, device != "cpu"
    inputs = {name: value.to(device) for name, value in arm.batches[0].items()}
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with habits(model, arm), named_parts(model), torch.profiler.profile(activities=activities) as profile:
        model.train()
        with torch.autocast(device, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            arm.loss(inputs).backward()
    model.zero_grad()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]
    if cuda:
        launched = [event for event in events if re.match(r"(cuda|cu)Launch(Cooperative)?Kernel", event.name)]
    else:
        compute = ("aten::", "cpp_", "mkldnn", "onednn")
        leaves = (event for event in events if not event.cpu_children and event.name.startswith(compute))
        launched = [event for event in leaves if not WITHOUT_WORK.match(event.name)]
    found = {"all": len(launched)}
    for part in ("tower", "AdaTA"):
        spans = [(event.time_range.start, event.time_range.end) for event in events if event.name == part]
        found[part] = sum(start <= event.time_range.start <= end for event in launched for start, end in spans)
    return found


def matmul_rate(side: int = 8192, turns: int = 20) -> float:
    """bf16 matrix multiplications of this GPU, FLOPs a second: the median of what it does now."""
    left, right = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(turns):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            left @ right
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 5)
    return 2 * side**3 / statistics.median(times[3:])


def flops(model: Any, tokens: int, images: int, labels: int) -> float:
    """Of one pass over all samples as our step needs them: 2 a weight and token forward, 2 for the gradient of activations."""
    step = GranulonTrainer.step_flops(argparse.Namespace(model=model), {"visible": tokens, "images": images, "encoded": images})  # type: ignore[arg-type]
    return step + 4 * model.lm_head.weight.numel() * labels


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build, run all rounds, print the table.

    Raises:
        SystemExit: the arms do not compute the same loss.
    """
    if options.device == "cpu":
        torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    model, processor = build(options.size, options.device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        arms, tokens = make_arms(model, processor, options, folder)
    models = {id(one): one for one in (model, *(arm.model for arm in arms)) if one is not None}.values()
    trained = [parameter for one in models for parameter in one.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    for arm in arms:  # warm up: on a GPU with every shape, for its allocator
        small = min(arm.batches, key=lambda batch: batch["input_ids"].numel())
        train(model, arm, arm.batches if options.device != "cpu" else [small], optimizer, options.device)
    rounds: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
    rates = []
    for turn in range(options.rounds):
        if options.device != "cpu":
            rates.append(matmul_rate())
        for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
            rounds[arm.name].append(train(model, arm, arm.batches, optimizer, options.device))
            if options.verbose:
                print(turn, arm.name, rounds[arm.name][-1], file=sys.stderr, flush=True)

    results = {}
    first = rounds[arms[0].name]
    for arm in arms:
        seen = rounds[arm.name]
        ratios = [mine["seconds"] / base["seconds"] for mine, base in zip(seen, first, strict=True)]
        seconds = statistics.median(one["seconds"] for one in seen)
        results[arm.name] = {
            "seconds": round(seconds, 3),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
            "tokens_per_s": round(tokens / seconds, 1),
            "padding": round(arm.padding(tokens), 2),
            "peak_gib": round(max(one["peak"] for one in seen), 2),
            "loss": statistics.mean(one["loss"] for one in seen),
            "labels": seen[0]["labels"],
        }
        if options.kernels:
            results[arm.name]["kernels"] = kernels(model, arm, options.device)
    summary: dict[str, Any] = {
        **{"size": options.size, "device": options.device, "dtype": str(dtype).removeprefix("torch.")},
        "machine": torch.cuda.get_device_name() if options.device != "cpu" else f"{torch.get_num_threads()} CPU threads",
        **{"samples": options.samples, "batch": options.batch, "rounds": options.rounds, "tokens": tokens},
        **{"shares": shares(options.size), "shares_full": shares("full"), "arms": results},
    }
    if rates:
        needed = flops(model, tokens, options.samples, int(first[0]["labels"]))
        summary["matmul_tflops"] = round(statistics.median(rates) / 1e12, 1)
        summary["share_of_matmul_rate"] = {
            name: round(needed / results[name]["seconds"] / statistics.median(rates), 3)
            for name in (arm.name for arm in arms[:2])
        }
    show(summary)
    losses = [result["loss"] for name, result in results.items() if name != FP8]
    if FP8 in results:
        print(f"{FP8}: the loss differs by {results[FP8]['loss'] - losses[0]:+.2e}")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    if len({result["labels"] for result in results.values()}) > 1 or max(losses) - min(losses) > tolerance:
        sys.exit(f"The arms do not compute the same loss: {results}")
    return summary


def show(summary: dict[str, Any]) -> None:
    print(f"{summary['size']}: {summary['shares']}, full: {summary['shares_full']}; {summary['machine']}, {summary['dtype']}")
    if "matmul_tflops" in summary:
        print(f"bf16 matmul rate {summary['matmul_tflops']} TFLOPS; our share of it {summary['share_of_matmul_rate']}")
    columns = ["arm", "seconds", "time by ours (min-max)", "tokens/s", "padding", "peak GiB", "loss"]
    counted = next(iter(summary["arms"].values())).get("kernels", {})
    columns += [f"kernels, {part}" for part in counted]
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    for name, arm in summary["arms"].items():
        ratio = f"{arm['ratio']:.2f} ({arm['ratio_min']:.2f}-{arm['ratio_max']:.2f})"
        peak = arm["peak_gib"] or "-"
        cells = [name, arm["seconds"], ratio, arm["tokens_per_s"], f"{arm['padding']:.2f}", peak, f"{arm['loss']:.6f}"]
        cells += [arm["kernels"][part] for part in counted]
        print("|", " | ".join(map(str, cells)), "|")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of frozen weights (CPU float32, GPU bfloat16)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--median-words", type=int, default=130, help="of an answer")
    parser.add_argument("--ablation", action="store_true", help="also the released style without one of its habits")
    parser.add_argument("--compile", action="store_true", help="also our packed arms, compiled")
    parser.add_argument("--fp8", action="store_true", help="also our packed arm in float8, compiled where the others are")
    parser.add_argument("--kernels", action="store_true", help="count what a pass over a batch launches")
    parser.add_argument("--arms", nargs="+", help="names of arms; by default all")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    logging.set_verbosity_error()
    print(json.dumps(measure(parse())))
