"""How a teacher is named: kind:name[/weights][+neck][@resolution].

Configs import this file, so it imports no torch.
"""

import difflib
import re
from dataclasses import dataclass

KINDS = {
    "timm": ("zoo.teachers.from_timm", "open_timm"),
    "open_clip": ("zoo.teachers.from_open_clip", "open_open_clip"),
    "hf": ("zoo.teachers.from_transformers", "open_hf"),
    "zoo": ("zoo.teachers.from_zoo", "open_zoo"),
    "torch": ("zoo.teachers.from_torch", "open_torch"),
    "pretext": ("zoo.teachers.pretext", "open_pretext"),
    "rule": ("zoo.teachers.rule", "open_rule"),
    "cache": ("zoo.teachers.cache", "open_cache"),
}
"""Kind -> the module and the function that open its teachers."""

FOLDER = "local-dir:"
"""With this timm and open_clip mark a model that is a folder; a student's export is one."""

MOST_PIXELS = 8192
"""Longest side of an image that a teacher looks at: a ViT has 262,144 tokens there."""

SLASHED = ("hf:", "cache:", *(f"{kind}:{FOLDER}" for kind in ("open_clip", "timm", "zoo")))
"""Names that begin so are repositories or folders, and may have slashes themselves."""

NECK = "+neck"
"""At the end of a SAM's name: the map behind its neck."""


@dataclass(frozen=True)
class TeacherName:
    """The parts of a teacher's name: `kind:name[/weights][+neck][@resolution]`.

    `weights` is a file, a tag of the library, or `random`; the default is the library's own
    weights. `neck` asks a SAM for the map behind its neck, which its mask decoder takes; the
    default is the map before it. `resolution` is the side in pixels; the default is the network's
    own.

    A name ends at its first slash. Only `hf:ORG/NAME`, `hf:FOLDER`, `cache:FOLDER/LABEL` and
    `KIND:local-dir:FOLDER` (open_clip, timm, zoo) may have slashes themselves. There everything is
    the name except `/random` at its end: the weights are in the same repository or folder.
    """

    kind: str
    name: str
    weights: str | None = None
    resolution: int | None = None
    neck: bool = False

    @classmethod
    def parse(cls, text: str) -> "TeacherName":
        """Split a name into its parts.

        Raises:
            ValueError: the text has no kind, an unknown kind, or an empty name.
        """
        kind, colon, rest = text.partition(":")
        if not colon or not rest:
            raise ValueError(
                f"{text!r} does not name a teacher. The form is kind:name[/weights][@resolution] "
                f"with a kind out of {', '.join(KINDS)}, for example timm:vit_base_patch16_224."
            )
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            hint = f" Did you mean {near[0]}:{rest}?" if near else ""
            raise ValueError(
                f"Teachers of the kind {kind!r} are unknown; there are {', '.join(KINDS)}.{hint}"
            )
        at = re.fullmatch(r"(.+)@(\d+)", rest)
        resolution = None
        if at:
            rest, resolution = at[1], int(at[2][:9])
            if not 1 <= resolution <= MOST_PIXELS:
                raise ValueError(
                    f"{text!r} asks for images of {at[2]} px; a teacher's resolution is 1 to "
                    f"{MOST_PIXELS:,} pixels."
                )
        neck, rest = rest.endswith(NECK), rest.removesuffix(NECK)
        if text.startswith(SLASHED):
            name = rest.removesuffix("/random")
            weights = None if name == rest else "random"
        else:
            name, _, weights = rest.partition("/")
        if not name:
            raise ValueError(f"{text!r} has no name between its kind and its weights.")
        return cls(kind, name, weights or None, resolution, neck)

    def describe(self) -> str:
        """Return `kind:name`, as messages show it: without weights and resolution."""
        return f"{self.kind}:{self.name}"

    @property
    def label(self) -> str:
        """A short form of the name for metrics, files and modules: letters, digits, `_` and `-`."""
        separator = "." if self.kind == "torch" else "/"
        name = self.name.removeprefix(FOLDER).rpartition(separator)[2]
        return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def unknown_name(name: str, known: list[str], what: str) -> ValueError:
    """Return the error for a name that is not in `known`; it names the nearest that are."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return ValueError(f"There is no {what} {name!r}.{hint}")
