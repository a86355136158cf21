"""Run by vLLM's own Python, which has none of this package: answer the prompts of a file, and write the tokens beside it.

    python ask_vllm.py FOLDER WORK

reads WORK/cases.json and writes WORK/tokens.json: a list of token ids, or null for a request that was refused.
"""

import json
import sys
from pathlib import Path


def main(folder: str, work: Path) -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=2048,
        limit_mm_per_prompt={"image": 2},
    )

    def ask(cases: list[dict]) -> list[list[int]]:
        prompts = [
            {
                "prompt": case["prompt"],
                "multi_modal_data": {"image": [Image.open(work / name).convert("RGB") for name in case["images"]]},
                "mm_processor_kwargs": case["choice"],
            }
            for case in cases
        ]
        length = cases[0]["length"]
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=length, min_tokens=length), use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    cases = json.loads((work / "cases.json").read_text())
    # All that are good in one batch, in which levels are mixed.
    tokens = iter(ask([case for case in cases if not case["bad"]]))
    found: list[list[int] | None] = []
    for case in cases:
        if not case["bad"]:
            found.append(next(tokens))
            continue
        try:
            found += ask([case])
        except ValueError:
            found.append(None)
    (work / "tokens.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
