"""Language models by name: from zoo's own table to plain objects of transformers.

    zoo.create_model("nemotron_h_8b")                                   random weights
    zoo.create_model("nemotron_h", pattern="M-M*-ME", d_model=256)      a shape of one's own
    zoo.create_model("llama", pretrained=FOLDER_OR_FILE_OR_REPOSITORY)

Nothing here imports transformers or torch before a model is built. The names do not stand in timm's
registry: what timm promises of its models is not true of these.
"""

import difflib
import importlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from zoo.files import near
from zoo.language.bars import bars_for_large
from zoo.language.sizes import FAMILIES, TABLE
from zoo.language.sizes.family import Family, Size

OPTIONS = ("dtype", "attn_implementation", "experts_implementation")
"""What transformers takes beside a configuration."""
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Files of a repository: weights, configurations, tokenizers, and no code."""
OWN_WORDS = {"d_model": "hidden_size"}
"""Words for every family's field of that meaning."""


class TowerFacts(NamedTuple):
    """What `zoo list --kind language` shows of a name."""

    parameters: int
    layers: int
    context: int | None
    """Positions; `None` where a state carries the text on without end."""
    licence: str
    weights: str


def is_language_model(name: str) -> bool:
    """Tell whether a name stands in the table of language models."""
    return name in TABLE


def list_language_models(filter: str = "") -> list[str]:
    """List the names that fit a shell pattern."""
    return sorted(name for name in TABLE if not filter or fnmatchcase(name, filter))


def facts_of(name: str) -> TowerFacts:
    """Read the facts about a name; nothing is built."""
    _, size = _find(name)
    pattern = size.fields.get("pattern")
    layers = len(pattern) if pattern else size.fields["num_hidden_layers"]
    context = size.fields.get("max_position_embeddings")
    return TowerFacts(size.parameters, layers, context, size.licence, size.weights)


def _find(name: str) -> tuple[Family, Size]:
    if name not in TABLE:
        raise unknown_name(name)
    return TABLE[name]


def unknown_name(name: str) -> ValueError:
    """Return the error for a name that the table lacks, with the nearest that it has."""
    similar = difflib.get_close_matches(name, TABLE, n=1)
    hint = f" Did you mean {similar[0]}?" if similar else ""
    return ValueError(
        f"There is no language model {name!r}; `zoo list --kind language` shows all.{hint}"
    )


def resembles_language_model(name: str) -> bool:
    """Tell whether a name that is not in the table begins like a family's name."""
    return name not in TABLE and any(name.startswith(family.name) for family in FAMILIES)


# ---------------------------------------------------------------- building


def create_language_model(name: str, pretrained: bool | str | Path = False, **fields: Any) -> Any:
    """Build a causal language model of transformers.

    Args:
        name: A name of the table.
        pretrained: A folder of transformers, a GGUF file, or a repository on the Hub; `True` for
            the weights that the name was released with.
        fields: Fields of the configuration by transformers' names; `d_model` and, where layers are
            of several kinds, `pattern` (Nemotron-H: M for Mamba-2, * attention, - MLP, E experts;
            Granite: M *; Zamba2: M, and H for Mamba-2 with the shared block). In a shape of zoo's
            own (`llama`, `llama_tiny`) the other widths follow `d_model`; in a published one only
            what is named changes. Also `dtype`, `attn_implementation`, `experts_implementation`.

    Raises:
        ValueError: there is no such name, field or letter, numbers do not divide, transformers is
            missing, or the weights are not there or not of this family.
    """
    family, size = _find(name)
    _import_transformers()
    options = {key: fields.pop(key) for key in OPTIONS if key in fields}
    if not pretrained:
        return _build(build_config(name, **fields), options)
    if fields:
        raise ValueError(
            f"{', '.join(fields)} cannot be set: the sizes of {name} come with its weights. Leave "
            "out pretrained, or the fields."
        )
    place = weights_folder(released_weights(name) if pretrained is True else pretrained)
    model = _load(name, family, size, place, options)
    if pretrained is True:
        from zoo.licence import warn_of

        warn_of(name, size.licence)
    return model


def _build(config: Any, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(_one_line(f"{type(config).__name__} is refused", error)) from error


def build_config(name: str, **fields: Any) -> Any:
    """Return the configuration of a name, with some fields of its own.

    Raises:
        ValueError: there is no such field or letter, or numbers do not divide.
    """
    family, size = _find(name)
    kind = _config_class(family)
    fields = {OWN_WORDS.get(key, key): value for key, value in fields.items()}
    base = dict(size.fields)
    if "hidden_size" in fields and size in (family.tiny, family.laptop):
        base |= family.widths(fields["hidden_size"])
    if family.letters and "pattern" not in fields and family.kinds not in fields:
        _refuse_depth(name, fields, base["pattern"])
    for word in fields:
        _check_field(name, family, kind, word)
    asked = base | fields
    if family.letters:
        pattern = asked.pop("pattern")
        if family.kinds not in fields:
            asked[family.kinds] = kinds_of(family, pattern)
        asked["num_hidden_layers"] = len(asked[family.kinds])
    try:
        config = kind(**asked)
    except Exception as error:  # strict dataclasses have errors of their own
        raise ValueError(_one_line(f"{name} cannot have these numbers", error)) from error
    _check_numbers(name, family, config)
    return config


def kinds_of(family: Family, pattern: str) -> list[str]:
    """Return the kinds of layers that a pattern's letters stand for.

    Raises:
        ValueError: it is empty, has another letter, or lacks one that the class needs.
    """
    known = ", ".join(f"{letter} ({kind})" for letter, kind in family.letters.items())
    for place, letter in enumerate(pattern):
        if letter not in family.letters:
            raise ValueError(
                f"{letter!r} in place {place} of the pattern {pattern!r} is no layer of "
                f"{family.name}; there are {known}."
            )
    missing = [letter for letter in family.needs if letter not in pattern]
    if missing or not pattern:
        raise ValueError(
            f"The pattern {pattern!r} of {family.name} needs at least one "
            f"{missing[0] if missing else 'layer'!r}; there are {known}."
        )
    return [family.letters[letter] for letter in pattern]


def _refuse_depth(name: str, fields: dict[str, Any], pattern: str) -> None:
    if "num_hidden_layers" in fields and fields["num_hidden_layers"] != len(pattern):
        raise ValueError(
            f"The layers of {name} are those of its pattern {pattern!r}; give "
            "pattern=... in place of num_hidden_layers."
        )


def _config_class(family: Family) -> Any:
    module, _, name = family.config.rpartition(":")
    return getattr(importlib.import_module(module or "transformers"), name)


def _check_field(name: str, family: Family, kind: Any, word: str) -> None:
    own = {"pattern"} if family.letters else set()
    known = own | {entry for entry in kind.__dataclass_fields__ if not entry.startswith("_")}
    known |= set(getattr(kind, "attribute_map", {}))
    if word not in known:
        similar = difflib.get_close_matches(word, [*known, *OWN_WORDS], n=1)
        hint = f" Did you mean {similar[0]}?" if similar else ""
        raise ValueError(f"{name} has no field {word!r} ({kind.__name__}).{hint}")


def _check_numbers(name: str, family: Family, config: Any) -> None:
    """Refuse what transformers builds and cannot run."""
    pairs = [("num_attention_heads", "num_key_value_heads", "groups of keys and values")]
    if family.state_space:
        pairs.append((*family.state_space, "groups of the state-space layers"))
    for whole, part, what in pairs:
        heads, groups = getattr(config, whole, None), getattr(config, part, None)
        if heads is not None and groups and heads % groups:
            raise ValueError(
                f"{whole} = {heads} of {name} does not split into {groups} {what}; give a "
                f"multiple of {groups}, or another {part}."
            )
    experts = getattr(config, "num_local_experts", None)
    met = getattr(config, "num_experts_per_tok", None)
    if experts and met and met > experts:
        raise ValueError(
            f"A token of {name} cannot meet {met} experts of {experts}: num_experts_per_tok is at "
            f"most {experts}."
        )
    turned = getattr(config, "head_dim", None) if getattr(config, "rope_parameters", None) else None
    if turned and turned % 2:
        raise ValueError(
            f"Heads of {turned} channels in {name}: rotary positions turn pairs of them; give an "
            "even head_dim, or another number of heads."
        )


# ---------------------------------------------------------------- weights


def released_weights(name: str) -> str:
    """Return the repository on the Hub that holds the weights which a name was released with.

    Raises:
        ValueError: there is none in transformers' form.
    """
    _, size = _find(name)
    if not size.weights:
        raise ValueError(
            f"{name} has no released weights that transformers reads; name some (a folder, a GGUF "
            f"file, a repository on the Hub), or take random ones ({name}/random)."
        )
    return size.weights


def weights_folder(place: str | Path, wanted: Sequence[str] = WANTED) -> Path:
    """Return a folder of transformers: itself, that of a GGUF file's weights, or one of the Hub.

    Args:
        wanted: Patterns of the files that are fetched where the place is a repository on the Hub.

    Raises:
        ValueError: there is none, or it cannot be fetched.
    """
    from zoo.language.gguf import dequantised, find_gguf

    if file := find_gguf(place):
        return dequantised(file)
    folder = Path(place)
    if (folder / "config.json").is_file():
        return folder
    if not is_repository(place):
        raise ValueError(
            f"There is no language model in {place}: config.json is missing. Give a folder of "
            f"transformers, a GGUF file, or a repository on the Hub (owner/name).{near(place)}"
        )
    return fetch(str(place), wanted)


def is_repository(place: str | Path) -> bool:
    """Tell whether a place may be a repository on the Hub: no path, and nothing that is here."""
    word = str(place)
    return not (Path(word).exists() or word.startswith((".", "/", "~")) or word.count("/") > 1)


def fetch(repository: str, wanted: Sequence[str]) -> Path:
    """Fetch files of a repository on the Hub, if they are not here already; return their folder.

    Raises:
        ValueError: there is no network, no such repository, or it is behind a gate.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(wanted)))
    except (OSError, ValueError) as error:
        owned, what = "/" in repository, f"{repository} cannot be fetched"
        hint = near(repository, () if owned else TABLE)
        if hint or not owned:
            asked = f" ({hint.strip()})" if hint else ""
            what = f"There is no folder {repository} here{asked}, and it cannot be fetched"
        raise ValueError(
            f"{_one_line(what, error)} Where there is network, `hf download {repository} "
            "--local-dir FOLDER` fetches it; then give the folder."
        ) from error


def _load(name: str, family: Family, size: Size, folder: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = _config_class(family)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_one_line(f"{folder} cannot be opened", error)) from error
    if not isinstance(config, kind):
        own = next((f.name for f in FAMILIES if config.model_type == _model_type(f)), None)
        raise ValueError(
            f"{folder} holds a model of the kind {config.model_type}, not {family.name}"
            + (f"; its name here is {own}." if own else ", and zoo has no name for it.")
        )
    if size not in (family.tiny, family.laptop):
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            there, here = getattr(config, key, None), getattr(build_config(name), key, None)
            if there != here:
                raise ValueError(
                    f"{folder} has {key} = {there}, and {name} has {here}: it is another size. "
                    f"The family's name, {family.name}, takes any."
                )
    try:
        with bars_for_large(folder):
            return AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_one_line(f"{folder} cannot be opened", error)) from error


def _model_type(family: Family) -> str:
    return _config_class(family).model_type


def _import_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            "Language models need transformers: pip install 'backbone-zoo[llm]'."
        ) from error


def _one_line(what: str, error: Exception) -> str:
    """Say what went wrong in one line: the last of a validator's, the first of the Hub's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if not line.endswith(":")), type(error).__name__)
    return f"{what}: {reason.removeprefix('ValueError: ').rstrip('.')}."
