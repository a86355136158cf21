"""examples/train.py on CPU processes that share the weights, for test_launch.py.

accelerate shards models on accelerators alone, and torch on CPUs too: processes with gloo are called what it shards on.
"""

import sys

from accelerate import DistributedType, PartialState

from granulon_hf.training import parse
from granulon_hf.training.run import train

make_state = PartialState.__init__


def as_accelerators(self, *args, **kwargs):
    make_state(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = as_accelerators
    model, _ = train(*parse(sys.argv[1:]))
    print("sharded:", type(model).__name__, {type(parameter).__name__ for parameter in model.parameters()})
