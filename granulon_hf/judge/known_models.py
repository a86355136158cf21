"""Judges that are known; `granulon_hf.evaluation.judge_table` writes this file of litellm's published prices."""

# USD per million tokens, tokens, days; `models.JudgeModel` says what each is.
# ruff: noqa: E501
# fmt: off

DATE = "2026-11-28"
SOURCE = "litellm 1.110.2"
MODELS = {
    "gpt-4-turbo": {"prompt": 10.0, "completion": 30.0, "context": 128000, "output": 4096, "image": {"base": 85, "tile": 170}, "retires": "2026-10-23", "successor": "gpt-5.6-sol"},
    "gpt-4.1": {"prompt": 2.0, "completion": 8.0, "context": 1047576, "output": 32768, "image": {"base": 85, "tile": 170}, "retires": "2027-01-14", "successor": "gpt-6-luna"},
    "gpt-4.1-mini": {"prompt": 0.4, "completion": 1.6, "context": 1047576, "output": 32768, "image": {"patch": 1.62}, "retires": "2027-01-14", "successor": "gpt-6-luna"},
    "gpt-4.1-nano": {"prompt": 0.1, "completion": 0.4, "context": 1047576, "output": 32768, "image": {"patch": 2.46}, "retires": "2026-10-23", "successor": "gpt-5.6-luna"},
    "gpt-4o": {"prompt": 2.5, "completion": 10.0, "context": 128000, "output": 16384, "image": {"base": 85, "tile": 170}, "retires": "2027-01-14", "successor": "gpt-6-luna"},
    "gpt-4o-2024-05-13": {"prompt": 5.0, "completion": 15.0, "context": 128000, "output": 4096, "image": {"base": 85, "tile": 170}, "retires": "2026-10-23", "successor": "gpt-5.6-sol"},
    "gpt-4o-mini": {"prompt": 0.15, "completion": 0.6, "context": 128000, "output": 16384, "image": {"base": 2833, "tile": 5667}, "retires": "2027-01-14", "successor": "gpt-6-luna"},
    "gpt-5": {"prompt": 1.25, "completion": 10.0, "context": 272000, "output": 128000, "reasons": True, "image": {"base": 70, "tile": 140}, "retires": "2026-12-11", "successor": "gpt-5.6-sol"},
    "gpt-5-chat": {"prompt": 1.25, "completion": 10.0, "context": 128000, "output": 16384, "reasons": True, "image": {"base": 70, "tile": 140}, "retires": "2026-07-23", "successor": "gpt-5.2-chat-latest"},
    "gpt-5-chat-latest": {"prompt": 1.25, "completion": 10.0, "context": 128000, "output": 16384, "reasons": True, "image": {"base": 70, "tile": 140}, "retires": "2026-07-23", "successor": "gpt-5.6-sol"},
    "gpt-5-mini": {"prompt": 0.25, "completion": 2.0, "context": 272000, "output": 128000, "reasons": True, "image": {"patch": 1.62}, "retires": "2026-12-11", "successor": "gpt-5.6-terra"},
    "gpt-5-nano": {"prompt": 0.05, "completion": 0.4, "context": 272000, "output": 128000, "reasons": True, "image": {"patch": 2.46}, "retires": "2026-12-11", "successor": "gpt-5.6-luna"},
    "gpt-5.1": {"prompt": 1.25, "completion": 10.0, "context": 272000, "output": 128000, "reasons": True, "image": {"base": 70, "tile": 140}, "retires": "2027-04-01", "successor": "gpt-6-sol"},
    "gpt-5.1-chat-latest": {"prompt": 1.25, "completion": 10.0, "context": 128000, "output": 16384, "reasons": True, "image": {"base": 70, "tile": 140}, "retires": "2026-07-23", "successor": "gpt-5.6-sol"},
    "gpt-5.2": {"prompt": 1.75, "completion": 14.0, "context": 272000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "gpt-5.2-chat-latest": {"prompt": 1.75, "completion": 14.0, "context": 128000, "output": 16384, "reasons": True, "image": {"patch": 1.62}, "retires": "2026-08-10", "successor": "gpt-5.6-sol"},
    "gpt-5.3-chat-latest": {"prompt": 1.75, "completion": 14.0, "context": 128000, "output": 16384, "reasons": True, "image": {"patch": 1.62}, "retires": "2026-08-10", "successor": "gpt-5.6-sol"},
    "gpt-5.4": {"prompt": 2.5, "completion": 15.0, "context": 1050000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "gpt-5.4-mini": {"prompt": 0.75, "completion": 4.5, "context": 272000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "gpt-5.4-nano": {"prompt": 0.2, "completion": 1.25, "context": 272000, "output": 128000, "reasons": True, "image": {"patch": 1.62}, "retires": "2027-04-01", "successor": "gpt-6-luna"},
    "gpt-5.5": {"prompt": 5.0, "completion": 30.0, "context": 1050000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "gpt-5.6": {"prompt": 4.0, "completion": 20.0, "context": 922000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "gpt-5.6-luna": {"prompt": 0.2, "completion": 1.2, "context": 922000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "gpt-5.6-sol": {"prompt": 4.0, "completion": 20.0, "context": 922000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "gpt-5.6-terra": {"prompt": 2.0, "completion": 12.0, "context": 922000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "gpt-6-astra": {"prompt": 10.0, "completion": 50.0, "context": 922000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "gpt-6-luna": {"prompt": 0.1, "completion": 0.5, "context": 922000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "gpt-6-sol": {"prompt": 2.0, "completion": 10.0, "context": 922000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "gpt-6.1-sol": {"prompt": 2.0, "completion": 10.0, "context": 922000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "gpt-6.1-terra": {"prompt": 1.0, "completion": 5.0, "context": 922000, "output": 128000, "reasons": True, "image": {"patch": 1.62}},
    "o1": {"prompt": 15.0, "completion": 60.0, "context": 200000, "output": 100000, "reasons": True, "image": {"base": 75, "tile": 150}, "retires": "2026-10-23", "successor": "gpt-5.6-sol"},
    "o3": {"prompt": 2.0, "completion": 8.0, "context": 200000, "output": 100000, "reasons": True, "image": {"base": 75, "tile": 150}, "retires": "2026-12-11", "successor": "gpt-5.6-sol"},
    "o4-mini": {"prompt": 1.1, "completion": 4.4, "context": 200000, "output": 100000, "reasons": True, "image": {"patch": 1.72}, "retires": "2026-10-23", "successor": "gpt-5.6-terra"},
}
