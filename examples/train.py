"""Train a Granulon model with the supplement's recipe: frozen backbones, projector only.

    accelerate launch examples/train.py                         # the demo model on drawn scenes, in minutes: examples/demo.yaml
    accelerate launch examples/train.py --max_steps 3           # the same recipe, but for what the line says
    accelerate launch --config_file examples/accelerate_multi_gpu.yaml examples/train.py examples/granulon_qwen2.5.yaml
    accelerate launch --config_file examples/accelerate_zero2.yaml examples/train.py examples/granulon_llama3.2.yaml \\
        --data ./flux-reason-200k --output_dir runs/llama
    accelerate launch examples/train.py --variant clip-qwen2.5 --data chat/chat.json --save_full true
    accelerate launch examples/train.py <as before> --resume_from_checkpoint last   # goes on after a crash or SIGTERM

All options: python examples/train.py --help. What a run does, step by step: granulon_hf.training.run.train.
"""

import os
import sys
from pathlib import Path

from granulon_hf.errors import GranulonError
from granulon_hf.training import TrainingStopped, parse
from granulon_hf.training.run import train

DEMO = os.path.relpath(Path(__file__).with_name("demo.yaml"))

if __name__ == "__main__":
    try:
        train(*parse(sys.argv[1:], default=DEMO))
    except TrainingStopped as error:
        print(error)
        sys.exit(143)  # as the signal itself would have ended it
    except GranulonError as error:
        sys.exit(f"Error: {error}" if int(os.environ.get("RANK", 0)) == 0 else 1)
