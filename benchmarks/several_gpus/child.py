"""`zoo` with the words that are given, and behind it the most memory that this process held."""

import json
import os
import sys
from pathlib import Path

import torch

from zoo.cli import main

try:
    main(sys.argv[2:])
finally:
    rank = os.environ.get("RANK", "0")
    held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    Path(f"{sys.argv[1]}.{rank}.json").write_text(json.dumps(dict(peak_gb=held / 1e9)))
