"""The rooms beside `zoo/` are reached by links inside it; where there are no links, say so once.

Git for Windows and some archives write a symbolic link as a text file that holds its target.
Needs nothing but the standard library: `hatch_build.py` runs this file too.
"""

from pathlib import Path

ROOMS = ("teachers", "students", "train", "eval")


def check_rooms(package: Path) -> None:
    """Look for the rooms in the folder of the package.

    Raises:
        ImportError: a room is missing, or is a text file where a link should be.
    """
    missing = [room for room in ROOMS if not (package / room).is_dir()]
    if missing:
        links = " ".join(f"zoo/{room}" for room in missing)
        raise ImportError(
            f"This copy of zoo has no folders {links.replace(' ', ', ')}: they are symbolic links, "
            "and they were not made as such. In a clone run `git config core.symlinks true` and "
            f"`git checkout -- {links}` (on Windows turn on Developer Mode first), or install the "
            "wheel, which holds folders instead of links."
        )


check_rooms(Path(__file__).parent)
