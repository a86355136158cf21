"""Run by SGLang's own Python, which has none of this package: answer the prompts of a file, and write the tokens beside it.

    python ask_sglang.py FOLDER WORK

reads WORK/cases.json and writes WORK/tokens.json: a list of token ids, or null for a request that was refused.
"""

import json
import sys
from pathlib import Path


def main(folder: str, work: Path) -> None:
    import sglang

    engine = sglang.Engine(
        model_path=folder,
        trust_remote_code=True,
        model_impl="transformers",
        device="cpu",
        attention_backend="torch_native",
        dtype="float32",
        context_length=1024,
        max_total_tokens=8192,
        max_running_requests=16,
    )

    def ask(cases: list[dict]) -> list[list[int]]:
        answers = engine.generate(
            [case["prompt"] for case in cases],
            {"temperature": 0, "max_new_tokens": cases[0]["length"], "min_new_tokens": cases[0]["length"]},
            image_data=[[str(work / name) for name in case["images"]] or None for case in cases],
        )
        return [answer["output_ids"] for answer in answers]

    cases = json.loads((work / "cases.json").read_text())
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
    # It still lives.
    assert ask(cases[:1]) == found[:1]
    (work / "tokens.json").write_text(json.dumps(found))
    engine.shutdown()


if __name__ == "__main__":  # it starts processes, which import this file
    main(sys.argv[1], Path(sys.argv[2]))
