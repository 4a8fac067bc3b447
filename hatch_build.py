"""Refuse to build, or to install from, a copy of the tree whose rooms are not there."""

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class RoomsHook(BuildHookInterface):
    """Look for the rooms before hatchling leaves them out in silence."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        try:
            runpy.run_path(str(Path(self.root, "zoo", "rooms.py")))
        except ImportError as error:
            self.app.abort(str(error))
