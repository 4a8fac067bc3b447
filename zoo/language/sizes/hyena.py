"""StripedHyena 2 (2503.01868), the class of zoo's own; its shapes stand in `hyena_sizes.py`."""

from typing import Any

from zoo.language.hyena_sizes import SIZES
from zoo.language.sizes.family import BYTES, Family, Size, gated


def _hyena(dim: int) -> dict[str, Any]:
    groups = max(4, dim // 16)
    return dict(
        hidden_size=dim, intermediate_size=gated(dim), num_attention_heads=max(4, dim // 128),
        se_groups=groups, mr_groups=groups,
    )  # fmt: skip


PARAMETERS = dict(
    hyena_1b=1_107_989_760,
    hyena_7b=6_481_059_584,
    hyena_7b_262k=6_481_059_584,
    hyena_7b_1m=6_581_722_880,
    hyena_20b=19_738_780_160,
    hyena_40b=40_331_142_144,
    hyena_40b_1m=41_117_574_144,
)

HYENA = Family(
    name="hyena",
    config="zoo.language.hyena_config:HyenaConfig",
    widths=_hyena,
    tiny=Size(64_380, _hyena(32) | BYTES | dict(pattern="smla", max_position_embeddings=512)),
    laptop=Size(
        6_532_688, _hyena(256) | BYTES | dict(pattern="smlasmls", max_position_embeddings=2048)
    ),
    # Released in vortex' form (Apache-2.0): zoo/language/hyena_weights.py makes a folder of it.
    sizes={
        name: Size(PARAMETERS[name], fields, "", "apache-2.0") for name, fields in SIZES.items()
    },
)
