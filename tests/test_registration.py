"""timm knows the families of zoo, in whichever order the two are imported."""

import subprocess
import sys

import pytest

ORDERS = (
    "import timm, zoo",
    "import zoo, timm",
    "import zoo, timm.models",
    "import zoo; from timm.models import create_model",
    "from zoo import *",
    "import zoo; zoo.mambavision",
    "import zoo.hierarchy",  # imports timm, and the families are made of it
    "from zoo.layers import stage",
    "import contextlib, zoo\nwith contextlib.suppress(ModuleNotFoundError): import zoo.not_there",
)

FORKS = """
import os, sys
import torch, torchvision  # what takes long, once
assert "timm" not in sys.modules
for order in sys.argv[1:]:
    sys.stdout.flush()
    if not os.fork():
        exec(order)
        import timm
        families = ("eradio", "fastervit", "mambavision", "radio")
        print(*(len(timm.list_models(module=family)) > 2 for family in families))
        assert type(timm.create_model("eradio_nano")).__name__ == "ERadio"
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.mark.long
def test_the_families_are_registered_whatever_is_imported_first():
    command = [sys.executable, "-W", "error", "-c", FORKS, *ORDERS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True True True True"] * len(ORDERS), done.stderr


def test_what_zoo_does_not_have_is_refused_as_for_any_module():
    import zoo

    with pytest.raises(AttributeError, match="module 'zoo' has no attribute 'mambavison'"):
        zoo.mambavison  # noqa: B018
    assert zoo.compile_blocks.__module__ == "zoo.compiled_blocks"
    assert zoo.FAMILIES[0].__name__ == "zoo.eradio"
