"""The table of language models: families, and by name their shapes. It imports no library.

To add a family, write its `Family` in a file here and put it into `FAMILIES`.
"""

from zoo.language.sizes.dense import DENSE
from zoo.language.sizes.experts import WITH_EXPERTS
from zoo.language.sizes.family import Family, Size
from zoo.language.sizes.hybrid import HYBRID
from zoo.language.sizes.hyena import HYENA

FAMILIES: tuple[Family, ...] = (*DENSE, *WITH_EXPERTS, *HYBRID, HYENA)

TABLE: dict[str, tuple[Family, Size]] = {
    name: (family, size) for family in FAMILIES for name, size in family.rows().items()
}
"""Name -> its family and its shape."""
