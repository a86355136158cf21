"""Surgery, in the style of SurgVLM and Cholec80-VQA: LLaVA conversations, or `question|answer` lines beside the frames.

SurgVLM has no repository of its own; SurgSigma/SurgSigma-DB is partly released and its schema not established. Give `source`.
"""

import re

from granulon_hf.data.datasets import llava
from granulon_hf.data.datasets.base import TABLES, Row, by_video, define, encoded_list, single_turn, text
from granulon_hf.data.sample import Sample

TOPICS = TABLES["topics"]


def to_sample(row: Row) -> Sample:
    """Make a sample of a conversation or a line."""
    if row.get("conversations") is not None:
        sample = llava.to_sample(row, task="vqa")
    else:
        question, answer = text(row.get("question"), "question"), text(row.get("answer"), "answer")
        images = encoded_list(row.get("image"))
        sample = single_turn(row, id_column="id", images=images, question=question, answer=answer, task="vqa")
    name = re.sub(r"[^a-z]", "", sample.reference.lower())
    for topic, names in TOPICS.items():
        if name in map(str.lower, names):
            sample.meta["category"] = topic
    return sample


ADAPTER = define("surgvlm", to_sample, group=("image", by_video))
