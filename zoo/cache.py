"""Where files that can be made again are kept between runs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Give the folder `$ZOO_CACHE`, else `backbone-zoo` in the user's cache folder."""
    base = os.environ.get("ZOO_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "backbone-zoo"
