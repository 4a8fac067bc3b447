"""A COCO folder of drawn shapes."""

import pytest


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder of drawn shapes."""
    pytest.importorskip(
        "faster_coco_eval", reason="faster-coco-eval is not installed; it is in [det]"
    )
    from zoo.eval.detect.shapes import write_shapes

    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, train=6, val=4, side=64)
    return folder
