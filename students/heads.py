"""One teacher's pair of heads on a student: the adaptor MLPs (AM-RADIO, 2312.06709, 3.2)."""

from collections.abc import Callable, Mapping

from torch import nn

from zoo.adaptors import Head
from zoo.features import Features


class TeacherHead(nn.Module):
    """A summary and a spatial adaptor; one is absent where the teacher gives nothing to match.

    During training the spatial one answers in the normalised space; `fold` puts the inverse of
    the normalisation into its last layer.

    Args:
        ours: Summary and spatial width of the student.
        theirs: Summary and spatial width of the teacher; `None` for no such target.
    """

    def __init__(
        self,
        ours: tuple[int, int],
        theirs: tuple[int | None, int | None],
        *,
        kind: str = "v2",
        hidden: int,
        inner: int = 1,
    ):
        super().__init__()

        def make(width: int, out: int | None) -> nn.Module | None:
            if out is None:
                return None
            return Head(hidden=hidden, out_dim=out, num_inner=inner, kind=kind).build(width)

        self.summary, self.spatial = (make(*pair) for pair in zip(ours, theirs, strict=True))
        self.widths = theirs

    def forward(self, seen: Features) -> Features:
        summary = self.summary(seen.summary) if self.summary is not None else None
        spatial = self.spatial(seen.spatial) if self.spatial is not None else None
        return Features(summary, spatial)

    def fold(self, change: Callable[[nn.Linear], nn.Linear]) -> None:
        """Replace the last layer of the spatial adaptor by what `change` makes of it."""
        if self.spatial is not None:
            self.spatial.replace_last(change(self.spatial.last))


def head_hidden(widths: Mapping[str, tuple[int | None, int | None]]) -> int:
    """Choose the hidden width of all heads: the widest teacher's (2312.06709, 3.2)."""
    return max((w for pair in widths.values() for w in pair if w), default=1)
