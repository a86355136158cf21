"""GranuScenes: generated scenes with questions at three levels, in which fixed visual tokens are not enough."""

from granulon_hf.data.granuscenes.dataset import baselines, granuscenes, shared
from granulon_hf.data.granuscenes.pictures import Pictures
from granulon_hf.data.granuscenes.scenes import GranuScenes

__all__ = ["GranuScenes", "Pictures", "baselines", "granuscenes", "shared"]
