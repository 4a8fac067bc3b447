"""Run mmseg's own tools, which its wheel contains, with mmcv's missing operations supplied.

python -m zoo.eval.openmmlab.mmseg_tool train segmenter.py --resume
torchrun --nproc_per_node 8 -m zoo.eval.openmmlab.mmseg_tool train segmenter.py --launcher pytorch
python -m zoo.eval.openmmlab.mmseg_tool test segmenter.py runs/segmenter/iter_160000.pth
"""

import sys

from zoo.eval.openmmlab.mmdet_tool import run_tool

if __name__ == "__main__":
    run_tool("mmseg", sys.argv[1:])
