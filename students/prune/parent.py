"""Open the model to cut: a name of timm's or ours, a folder of timm or transformers, a run."""

from pathlib import Path
from typing import Any

from zoo import wheels
from zoo.cut_format import is_cut_format
from zoo.files import near, read_json
from zoo.language.bars import bars_for_large
from zoo.language.classes import find_class
from zoo.language.gguf import dequantised, find_gguf
from zoo.language.open import RANDOM, split_name
from zoo.language.towers import TABLE, create_language_model, released_weights, weights_folder
from zoo.students.prune.library import Parent


def open_parent(
    name: str, *, pretrained: bool = True, dequantise: bool = False, **arguments: Any
) -> Parent:
    """Open a model together with how its library builds it.

    Args:
        name: A registered model (`vit_small_patch16_224.augreg_in1k`); with `/random` its random
            weights. Or a folder: of timm, of transformers, or a run's. Or a GGUF file. Or a name of
            the language table: `llama_tiny/random`, `llama/FOLDER`, `llama3_8b`.
        pretrained: Read the weights of a registered model.
        dequantise: Take quantised weights as float, in which a child of theirs is saved.
        arguments: Of timm's constructor.

    Raises:
        ValueError: there is no such model, the folder holds none that can be built here, or its
            weights are quantised and `dequantise` is false.
    """
    base, weights = split_name(name)
    if base and weights == RANDOM:
        return Parent(create_language_model(base).eval())
    folder = Path((weights or released_weights(base)) if base else name)
    if file := find_gguf(folder):
        if not dequantise:
            raise ValueError(
                f"{file} is quantised, and what is cut from it will be saved as float; pass "
                "--dequantise."
            )
        folder = dequantised(file)
    if base:
        folder = weights_folder(folder)
        return Parent(create_language_model(base, folder).eval(), folder=folder)
    if (folder / "export" / "config.json").is_file():
        folder = folder / "export"
    if (folder / "config.json").is_file():
        return _from_folder(folder, read_json(folder / "config.json"))
    if is_cut_format(folder):
        raise ValueError(f"{folder} was cut already, to zoo's own form; cut its parent again.")
    if folder.is_dir():
        raise ValueError(
            f"{folder} holds no model: config.json of timm or transformers is missing."
        )
    base = name.removesuffix("/random")
    try:
        wheels.check_known(base, TABLE)
    except ValueError as error:
        raise ValueError(f"{name} is no folder. {error}") from None
    if "/" in base and ":" not in base:
        raise ValueError(
            f"There is no folder {name}; give a name of timm, or a folder of timm, of transformers "
            f"or of a run.{near(name)}"
        )
    try:
        model = wheels.create_model(base, pretrained and base == name, **arguments)
    except RuntimeError as error:
        raise ValueError(f"{name} is no folder and no registered model ({error}).") from None
    return Parent(model.eval(), _architecture(base), arguments)


def _architecture(name: str) -> str:
    return name.partition(".")[0]


def _from_folder(folder: Path, config: dict[str, Any]) -> Parent:
    if "architecture" in config:
        model = wheels.create_model(f"local-dir:{folder}", True)
        arguments = dict(config.get("model_args") or {})
        arguments |= {k: config[k] for k in ("num_classes",) if k in config}
        return Parent(model.eval(), config["architecture"], arguments, folder)
    if "architectures" not in config:
        raise ValueError(
            f"{folder}/config.json names no architecture; a folder of timm has `architecture`, one "
            "of transformers `architectures`."
        )
    name = config["architectures"][0]
    kind = find_class(name)
    if kind is None:
        raise ValueError(f"{folder} holds a {name}, a class that transformers does not have.")
    with bars_for_large(folder):
        return Parent(kind.from_pretrained(folder).eval(), folder=folder)
