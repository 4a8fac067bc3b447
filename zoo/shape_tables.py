"""Tables of named shapes, and how they are written.

A table has a block for each class of modules, and in it one line for each tensor:

    [hf.LlamaAttention] d=head_dim k>num_key_value_heads k*q>num_attention_heads !d:rope
    q_proj.weight    k q d, C
    o_proj.weight    C, k q d

Dims are separated by commas, parts that are stacked within a dim by `|`. A part is a product:
`3 h d` means three blocks of `h` heads of `d` channels each. A number is itself, `_` is no axis.
Small letters belong to one instance of the class. `C` is the residual stream, the same axis
everywhere in a model without stages. Where there are stages, `C` is the stream of the stage that
the module is in, `C-` and `C+` those of its neighbours, `C0` and `C9` the first and the last, and
`C<` what enters a block: the stage before's in a stage's first block, else `C`. `path:C` is the
stream of a module with a stream of its own, relative to the one the block describes; `{path}`, a
whole dim, is what that module says of its output (`output_shape`), or its stream; `{.name}` is what
the attribute `name` of the module itself says, where that differs from one instance to the next:
how many maps it joins, how many vectors a row holds. `@` marks a dim that is multiplied and summed
over, where that does not follow from a linear layer or a convolution. `#` in a name stands for a
number, and behind a letter for the same number. A bias, and a norm's statistics, follow the first
dim of the weight beside them. Of several lines with one name, the first counts whose dims are as
many as the tensor's, and whose numbers fit.

Behind the class names may stand

    d=head_dim           an attribute that holds this size: read where shapes leave it open, and
                         set where widths change (also of products and sums, g*p+2*s=width)
    k*q>num_heads        the constructor's field that follows; alternatives by commas
    !d:scale             `d` cannot have another size, and why
    !!d:rope             its units cannot even change places
    C&f&h                by default, cutting `C` cuts `f` and `h` by the same share
    stream               modules of this class have a residual stream of their own
    stream=backbone      so they have, and its stages are those of the module inside
    stage=layers.#       which submodules are stages (`+1`: counted from 1)
    C<~C?has_skip        two letters are one axis if an attribute is true (`!x`: false, `x=1`: 1)
    config=text_config   the part of a library's configuration that describes this module
    #layers>depth        a list of layers, and the field that says how many there are

Lines that begin with `+` continue the head of a block, `--` begins a comment. A class may have
several blocks. Axes whose names an instance chooses are one where its `same_axes` says so, pairs
of them. Of the modules that a tensor lies in, the outermost with a line for it decides. All
else follows: counts, who writes and reads an axis, cuts, permutations, fields of the configuration.
A tensor without a line is an error, so that no model is cut by a guess.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

Dims = tuple[tuple[tuple[str, ...], ...], ...]


class Line(NamedTuple):
    """One tensor of a class: its name, the letters of its dims, the dim that is summed over."""

    name: re.Pattern[str]
    dims: Dims
    read: int | None

    def numbered(self, numbers: Sequence[str]) -> "Line":
        """Put the name's first number behind the letters that ask for it."""
        if not numbers:
            return self
        dims = tuple(
            tuple(tuple(u.replace("#", numbers[0]) for u in part) for part in dim)
            for dim in self.dims
        )
        return self._replace(dims=dims)


class Declared(NamedTuple):
    """A sum of products, what it is divided by, and the attributes or fields that hold it."""

    terms: tuple[tuple[str, ...], ...]
    over: tuple[str, ...]
    names: tuple[str, ...]


@dataclass
class Block:
    """What the tables say about a class."""

    lines: list[Line] = field(default_factory=list)
    reads: list[Declared] = field(default_factory=list)
    fields: list[Declared] = field(default_factory=list)
    layers: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    fixed: dict[str, str] = field(default_factory=dict)
    rigid: set[str] = field(default_factory=set)
    ties: list[tuple[str, str, str]] = field(default_factory=list)
    follows: list[tuple[str, ...]] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)

    def declare(self, word: str) -> None:
        """Read one word of a block's head."""
        key, _, value = word.partition("=")
        if key in ("stream", "stage", "config"):
            self.words[key] = value
        elif "&" in word:
            self.follows.append(tuple(word.split("&")))
        elif "~" in word:
            letters, _, condition = word.partition("?")
            one, _, other = letters.partition("~")
            self.ties.append((one, other, condition))
        elif word.startswith("!"):
            letter, _, reason = word.lstrip("!").partition(":")
            self.fixed[letter] = reason
            self.rigid |= {letter} if word.startswith("!!") else set()
        elif word.startswith("#"):
            path, _, names = word[1:].partition(">")
            self.layers.append((path, tuple(names.split(","))))
        else:
            sign = ">" if ">" in word else "="
            product, found, names = word.partition(sign)
            if not found:
                raise ValueError(f"A table's head has {word!r}, which means nothing there.")
            above, _, over = product.partition("/")
            terms = tuple(_split(term) for term in above.split("+"))
            into = self.fields if sign == ">" else self.reads
            into.append(Declared(terms, _split(over), tuple(names.split(","))))


def _split(product: str) -> tuple[str, ...]:
    return tuple(product.split("*")) if product else ()


_registered: list[str] = []


def register(table: str) -> None:
    """Add a table of named shapes, as a family of models does with its own."""
    _registered.append(table)
    tables.cache_clear()


@cache
def tables() -> dict[str, Block]:
    files = sorted((Path(__file__).parent / "tables").glob("*.txt"))
    return parse_tables("\n".join([*(file.read_text() for file in files), *_registered]))


def parse_tables(text: str) -> dict[str, Block]:
    """Read tables: from a class's name (`timm.swin_transformer.PatchMerging`) to its block."""
    blocks: dict[str, Block] = {}
    current: list[Block] = []
    text = re.sub(r"\[[^\]]*\]", lambda match: " ".join(match[0].split()), text)
    for row in text.splitlines():
        row = row.partition("--")[0].strip()
        if row.startswith("["):
            classes, _, words = row[1:].partition("]")
            current = [blocks.setdefault(name, Block()) for name in classes.split()]
        elif row.startswith("+"):
            words = row[1:]
        elif row:
            name, _, dims = row.partition(" ")
            for block in current:
                block.lines.append(_line(name, dims))
            continue
        else:
            continue
        for block in current:
            for word in words.split():
                block.declare(word)
    return blocks


def _line(name: str, text: str) -> Line:
    pattern = re.compile(re.escape(name).replace(r"\#", r"(\d+)"))
    dims = [dim.split("|") for dim in text.split(",")] if text.strip() else []
    read = [i for i, dim in enumerate(dims) if "@" in dim[0]]
    parts = tuple(tuple(tuple(part.replace("@", "").split()) for part in dim) for dim in dims)
    return Line(pattern, parts, read[0] if read else None)


def fits(dims: Dims, lengths: tuple[int, ...] | None) -> bool:
    """Whether a line has as many dims as a tensor, and its numbers the right lengths."""
    if lengths is None:
        return True
    numbers = [part[0][0] if len(part) == len(part[0]) == 1 else "" for part in dims]
    return len(dims) == len(lengths) and all(
        not number.isdigit() or int(number) == length
        for number, length in zip(numbers, lengths, strict=True)
    )
