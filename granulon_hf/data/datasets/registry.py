"""The sets that `load` knows by name: a new one is a module with an `ADAPTER`, named here."""

from granulon_hf.data.datasets import (
    a_okvqa,
    amber,
    chair,
    flux_reason,
    hallusion_bench,
    llava,
    mmvp,
    pope,
    realworldqa,
    recap,
    seed_bench,
    surgvlm,
)
from granulon_hf.data.datasets.base import Adapter
from granulon_hf.data.granuscenes import dataset as granuscenes
from granulon_hf.data.prepared import format as prepared

PAPER = (flux_reason, seed_bench, a_okvqa, recap, surgvlm)
HALLUCINATION = (pope, hallusion_bench, mmvp, realworldqa, amber, chair)
MODULES = (*PAPER, *HALLUCINATION, llava, granuscenes, prepared)
ADAPTERS: dict[str, Adapter] = {module.ADAPTER.name: module.ADAPTER for module in MODULES}
