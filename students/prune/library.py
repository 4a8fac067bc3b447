"""Rebuild a cut model as its library's own class with other numbers: the library is the judge.

The fields of the constructor follow from the named shapes. What they say is built on the meta
device and compared with the tensors, shape by shape; no list of what works is kept here.
"""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import timm
import torch
from timm.models._hub import save_for_hf
from timm.models._pretrained import filter_pretrained_cfg
from torch import Tensor, nn

from zoo import cut_format
from zoo.axes import Field, Shapes, State, dim_size, part_size
from zoo.language.bars import bars_for_large

LAYER_LISTS = re.compile(
    r"(layer_types|layers_block_type|mlp_layer_types|mlp_activations|pattern|\w+_per_layer)"
)
"""Fields of configurations with an item, or a letter, for each layer."""
ATTENTION = ("attention", "full_attention")


class NotExpressible(ValueError):
    """No choice of its constructor's fields gives a library's class these shapes."""


@dataclass(frozen=True)
class Parent:
    """A model and how its library builds it.

    Args:
        name: timm's name of the architecture; empty for a model of transformers, which carries its
            configuration.
        arguments: What timm's constructor was given.
        folder: Where it was read, for the files beside the weights.
        emulated: Parts that something else stands in for: see `zoo.cut_format.Emulated`.
        sample: One image with its text, for the costs of a model that takes both.
    """

    model: nn.Module
    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    emulated: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sample: Mapping[str, Tensor] | None = field(default=None, compare=False, kw_only=True)


Kept = Mapping[str, list[int]]
"""Layers that stay, for each list of layers that loses some."""


@dataclass(frozen=True)
class Reshaped(Parent):
    """A model that its class cannot be built as: the recipe of its parent, and what was cut."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    layers: "Kept" = field(default_factory=dict)


def recipe_of(parent: Parent) -> dict[str, Any]:
    """Describe how a parent is built, for `zoo.cut_format`."""
    model: Any = parent.model
    emulated = {"emulated": dict(parent.emulated)} if parent.emulated else {}
    if parent.name:
        arguments = {**getattr(model, "build_args", {}), **parent.arguments}
        return dict(architecture=parent.name, arguments=arguments) | emulated
    return {"class": type(model).__name__, "config": model.config.to_dict()} | emulated


def reshaped(parent: Parent, before: Shapes, after: Shapes, layers: Kept, state: State) -> Parent:
    """Give a parent's class other tensors than it can be built with.

    Raises:
        NotExpressible: a layer keeps something of its old width that the tables do not name.
    """
    if layers and hasattr(getattr(parent.model, "config", None), SHARED):
        raise NotExpressible(
            f"{type(parent.model).__name__} knows its layers by their numbers, which change when "
            "one goes; drop layers with --form library."
        )
    sizes = {axis: n for axis, n in after.sizes.items() if n != before.sizes[axis]}
    for path, module in parent.model.named_modules():
        if hasattr(module, "mup_vector") and any(axis.startswith(f"{path}.") for axis in sizes):
            raise NotExpressible(
                f"{type(module).__name__} keeps its multipliers in a table as wide as its input "
                "projection, which no checkpoint holds; cut its axes with --form library."
            )
    like = next(t for t in state.values() if t.is_floating_point())
    with like.device:
        model = cut_format.build_parent(recipe_of(parent))
    copies: dict[cut_format.Place, Tensor] = {}  # what no cut has touched is still the parent's
    own = {n: copies.setdefault(cut_format.place(t), t.clone()) for n, t in state.items()}
    model = cut_format.reshape(model.to(like), own, sizes, layers)
    if not parent.name:
        _carry(parent.model.config, model.config)
    own = (parent.name, parent.arguments, parent.folder, parent.emulated)
    return Reshaped(model, *own, sizes, layers)


def express(parent: Parent, before: Shapes, after: Shapes, layers: Kept | None = None) -> Parent:
    """Build the parent's class with the sizes in `after`, on the meta device.

    Raises:
        NotExpressible: the library refuses these sizes, or they are not the same where it has one
            number for several.
    """
    layers = layers or {}
    if parent.emulated:
        raise NotExpressible(
            f"{type(parent.model).__name__} has no place for what stands in for "
            f"{next(iter(parent.emulated))}; take --form zoo."
        )
    changed = _changed(before, after, layers)
    # What is not cut keeps the library's own numbers, even where no field of a table gives them.
    try:
        with torch.device("meta"):
            if parent.name:
                return _timm(parent, before, changed, layers)
            return _transformers(parent, before, after, layers)
    except NotExpressible:
        raise
    except Exception as error:  # whatever a library refuses sizes with
        raise _refusal(parent, changed, " ".join(str(error).split())[:300]) from error


def fill(child: Parent, state: State) -> nn.Module:
    """Put tensors into a model from the meta device, strictly, and build what it computes itself.

    Raises:
        NotExpressible: a tensor has another shape than the library built.
    """
    check_tensors(child.model, state)
    like = next(t for t in state.values() if t.is_floating_point())
    # Built again, with values: a constructor also computes tables that no state dict holds.
    with like.device:
        model = rebuilt(child).to(like.device)  # tables made by NumPy are elsewhere
    if like.dtype not in (torch.float16, torch.bfloat16):
        model.to(like.dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():  # those tables stay in float32
        tensor.data = tensor.data.to(state[name].dtype)
    model.load_state_dict(state, strict=True)
    _carry_images(child.model, model)
    return model.eval()


def check_tensors(model: nn.Module, state: State) -> None:
    """Hold what a library built against the tensors that it should have.

    Raises:
        NotExpressible: one has another shape, is missing, or is extra.
    """
    built = model.state_dict()
    for name in [*built, *state]:
        wanted = tuple(state[name].shape) if name in state else "no tensor"
        made = tuple(built[name].shape) if name in built else "no tensor"
        if wanted != made:
            raise NotExpressible(
                f"{type(model).__name__} has {made} where {name} should be {wanted}: one of "
                "its numbers sets several sizes. Cut them together, by the same share, or take "
                "--form zoo."
            )


def rebuilt(child: Parent) -> nn.Module:
    """Build a model with random weights from its recipe."""
    if child.name:
        return timm.create_model(child.name, **child.arguments)
    return type(child.model)(copy.deepcopy(child.model.config))


def save(child: Parent, folder: Path) -> None:
    """Write a plain checkpoint: for `local-dir:FOLDER` in timm, or for `from_pretrained`."""
    model: Any = child.model
    if isinstance(child, Reshaped):
        cut_format.save(folder, recipe_of(child), model.state_dict(), child.sizes, child.layers)
        return
    if not child.name:
        with bars_for_large(model):
            model.save_pretrained(folder)
        return
    cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True, remove_null=True)
    for key in ("architecture", "pool_size"):
        cfg.pop(key, None)
    arguments = {k: v for k, v in child.arguments.items() if k != "num_classes"}
    # A release's tag would change how RADIO is built.
    cfg |= dict(num_classes=model.num_classes, custom_load=False, tag=None)
    if size := arguments.get("img_size"):  # timm writes it down from 1.0.30 on
        cfg["input_size"] = (
            cfg["input_size"][0],
            *(size if isinstance(size, (list, tuple)) else (size, size)),
        )
    save_for_hf(
        model,
        str(folder),
        model_config=dict(pretrained_cfg=cfg, num_classes=model.num_classes),
        model_args=arguments,
        safe_serialization=True,
    )


# Fields


def value_of(entry: Field, sizes: Mapping[str, int]) -> float | int:
    """Compute what a field is for these sizes."""
    above = dim_size(entry.terms, sizes)
    if not entry.over:
        return above
    # int(dim * ratio) must give the width again, for every dim that shares the ratio
    return above / part_size(entry.over, sizes) * (1 + 1e-9)


Group = tuple[str, tuple[str, ...]]
"""A part of the configuration and the names that a field may have there."""


def _changed(
    before: Shapes, after: Shapes, layers: Kept
) -> dict[Group, dict[int | None, float | int]]:
    """Find the fields that differ, and their new value in each stage."""
    gone = [
        f"{path}.{i}."
        for path, kept in layers.items()
        for i in range(before.num_layers(path))
        if i not in kept
    ]
    found: dict[Group, dict[int | None, float | int]] = {}
    differs = set()
    for entry in before.fields:
        if any(f"{entry.scope}.".startswith(prefix) for prefix in gone):
            continue
        group = (entry.config, entry.names)
        value = value_of(entry, after.sizes)
        if value != value_of(entry, before.sizes):
            differs.add(group)
        stages = found.setdefault(group, {})
        if not math.isclose(stages.setdefault(entry.stage, value), value):
            stages[entry.stage] = math.nan  # more than one value: refused if it is asked for
    return {group: stages for group, stages in found.items() if group in differs}


def _single(group: Group, values: Iterable[float | int]) -> float | int:
    distinct = list(dict.fromkeys(values))
    if any(value != value for value in distinct) or not all(
        math.isclose(value, distinct[0]) for value in distinct
    ):
        raise NotExpressible(
            f"{group[1][0]} is one number for all layers in this library, and layers would differ: "
            f"{distinct[:4]}. Keep the same share everywhere, or take --form zoo."
        )
    return distinct[0]


def _timm(parent: Parent, before: Shapes, changed: Mapping, layers: Kept) -> Parent:
    parameters = _parameters(type(parent.model))
    # what a family reads out of its weights' file about the architecture, then the user's own
    arguments = {**getattr(parent.model, "build_args", {}), **parent.arguments}
    for group, stages in changed.items():
        name = next((n for n in group[1] if n in parameters), group[1][0])
        if _is_per_stage(parameters.get(name)):
            values = [_single(group, [stages[stage]]) for stage in sorted(stages)]
            arguments[name] = tuple(values)
        else:
            arguments[name] = _single(group, stages.values())
    for names in {entry.names for entry in before.layers if entry.path in layers}:
        counts = [
            len(layers.get(entry.path, range(before.num_layers(entry.path))))
            for entry in before.layers
            if entry.names == names
        ]
        per_stage = _is_per_stage(parameters.get(names[0]))
        arguments[names[0]] = tuple(counts) if per_stage else counts[0]
    model = timm.create_model(parent.name, **arguments)
    _carry_images(parent.model, model)
    return Parent(model, parent.name, arguments)


def _carry_images(source: Any, target: Any) -> None:
    """Keep what timm says of weights and images: the mean is that of a release, not of a class."""
    if hasattr(source, "pretrained_cfg"):
        target.pretrained_cfg = dict(source.pretrained_cfg)


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Collect the constructor's parameters, those of its bases too where it passes them on."""
    found: dict[str, inspect.Parameter] = {}
    for base in reversed(kind.__mro__):
        if "__init__" in vars(base):
            found |= inspect.signature(base.__init__).parameters
    return found


def _is_per_stage(parameter: inspect.Parameter | None) -> bool:
    if parameter is None:
        return False
    is_many = isinstance(parameter.default, tuple | list)
    return is_many or "tuple" in str(parameter.annotation).lower()


def _of_each_layer(group: Group, before: Shapes, after: Shapes, old: list[int]) -> list[int]:
    """Return a field that has an item for each layer, as they now are."""
    values = list(old)
    for entry in before.fields:
        if (entry.config, entry.names) != group:
            continue
        for path in (found.path for found in before.layers):
            if match := re.match(rf"{re.escape(path)}\.(\d+)\.", entry.scope):
                values[int(match[1])] = round(value_of(entry, after.sizes))
    return values


def _transformers(parent: Parent, before: Shapes, after: Shapes, layers: Kept) -> Parent:
    model: Any = parent.model
    config = copy.deepcopy(model.config)
    for path, tower in towers_of(model).items():
        config.vision_config = _tower(tower, path, before, after, layers)
        before = _outside(before, path)
    changed = _changed(before, after, layers)
    for group, stages in changed.items():
        part = getattr(config, group[0]) if group[0] else config
        name = next((n for n in group[1] if hasattr(part, n)), None)
        if name and isinstance(old := getattr(part, name), list):
            setattr(part, name, _of_each_layer(group, before, after, old))
            continue
        value = _single(group, stages.values())
        if name is None:
            continue  # follows from other fields; the shapes tell whether it did
        old = getattr(part, name)
        if (
            isinstance(old, int)
            and not float(value).is_integer()
            and abs(value - round(value)) > 1e-6
        ):
            raise NotExpressible(
                f"{name} is a whole number in {type(part).__name__}, not {value:.4f}; the nearest "
                f"is {max(1, round(value))}."
            )
        setattr(part, name, round(value) if isinstance(old, int) else value)
        top, experts = getattr(part, "num_experts_per_tok", 0), float(value)
        if name in ("num_local_experts", "num_experts", "n_routed_experts") and top > experts:
            raise NotExpressible(
                f"A router that gives each token to {top} experts cannot have {value:g}; keep at "
                f"least {top}."
            )
        groups = getattr(part, "n_group", None) or 1
        if name == "n_routed_experts" and experts % groups:
            raise NotExpressible(
                f"{value:g} experts do not split into the router's {groups} groups."
            )
    for entry in before.layers:
        if entry.path in layers:
            part = getattr(config, entry.config) if entry.config else config
            _shorten(part, entry.names, layers[entry.path], before.num_layers(entry.path))
    # From its dictionary, so that the configuration checks the numbers as a new one does.
    fields = config.to_dict()
    if layers:  # names of layers that a backbone returns: the last one's, unless they are asked for
        fields = {k: v for k, v in fields.items() if k not in ("out_features", "out_indices")}
    checked = type(config).from_dict(fields)
    _carry(config, checked)
    return Parent(type(model)(checked))


@runtime_checkable  # for the checks of types in the tests
class Tower(Protocol):
    """A part of a model of transformers with networks of timm inside: see `zoo.multimodal`."""

    def networks(self) -> dict[str, tuple[str, dict[str, Any]]]: ...

    def resized(
        self, keywords: Mapping[str, Mapping[str, Any]], widths: Mapping[str, int]
    ) -> Any: ...


def towers_of(model: nn.Module) -> dict[str, Any]:
    """Find the parts of a model whose networks timm builds, by path; the outermost ones."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if hasattr(module, "networks") and not any(path.startswith(f"{p}.") for p in found):
            found[path] = module
    return found


def _tower(tower: Tower, path: str, before: Shapes, after: Shapes, layers: Kept) -> Any:
    """Return the configuration of a tower that was cut.

    Raises:
        NotExpressible: the tower refuses it.
    """
    keywords, widths = {}, dict[str, int]()
    own = _inside(before, path)
    for name, recipe in tower.networks().items():
        place = f"{path}.{name}"
        model: Any = tower
        network = Parent(model.get_submodule(name), *recipe)
        inside = _inside(before, place)
        child = _timm(network, inside, _changed(inside, after, layers), layers)
        keywords[name] = child.arguments
        own = _outside(own, place)
    for entry in own.fields:
        at = f"{entry.scope}.".removeprefix(f"{path}.")
        widths[f"{at}{entry.names[0]}"] = round(value_of(entry, after.sizes))
    try:
        return tower.resized(keywords, widths)
    except ValueError as error:
        raise NotExpressible(str(error)) from error


def _inside(shapes: Shapes, path: str) -> Shapes:
    """Keep the fields and lists of layers of what lies below a path."""
    return _where(shapes, lambda place: f"{place}.".startswith(f"{path}."))


def _outside(shapes: Shapes, path: str) -> Shapes:
    return _where(shapes, lambda place: not f"{place}.".startswith(f"{path}."))


def _where(shapes: Shapes, holds: Callable[[str], bool]) -> Shapes:
    fields = tuple(entry for entry in shapes.fields if holds(entry.scope))
    return replace(
        shapes, fields=fields, layers=tuple(entry for entry in shapes.layers if holds(entry.path))
    )


SHARED = "hybrid_layer_ids"
"""Zamba2's layers that run a shared block, which has an adapter for each of them."""


def _renumber(config: Any, kept: list[int]) -> None:
    """Give the layers that run a shared block their new numbers."""
    numbers = getattr(config, SHARED, None)
    if numbers is None:
        return
    if gone := [i for i in numbers if i not in kept]:
        raise NotExpressible(
            f"The layers {gone} run a shared block, which has an adapter for each of them, so that "
            f"{type(config).__name__} cannot go without; keep all of {numbers}."
        )
    setattr(config, SHARED, [kept.index(i) for i in numbers])


def _shorten(config: Any, names: tuple[str, ...], kept: list[int], length: int) -> None:
    """Set the number of layers, and leave the others out of every list with an item for each."""
    for key, value in list(vars(config).items()):
        if LAYER_LISTS.fullmatch(key) and isinstance(value, list | str) and len(value) == length:
            left = [value[i] for i in kept]
            setattr(config, key, "".join(left) if isinstance(value, str) else left)
            # transformers' cache asks a layer of attention how long the text is
            attention = [i for i, kind in enumerate(value) if kind in ATTENTION]
            if key == "layers_block_type" and attention and not set(attention) & set(kept):
                raise NotExpressible(
                    f"Of the layers {left} none is attention, and {type(config).__name__} cannot "
                    f"run without; keep one of {attention}."
                )
    _renumber(config, kept)
    for name in names:
        if not isinstance(getattr(config, name), list | str):
            setattr(config, name, len(kept))


def _carry(source: Any, target: Any) -> None:
    """Keep which implementations run, which a configuration's dictionary does not say."""
    for name in ("_attn_implementation", "_experts_implementation"):
        if getattr(source, name, None) is not None:
            setattr(target, name, getattr(source, name))


def _refusal(parent: Parent, changed: Mapping, reason: str) -> NotExpressible:
    asked = ", ".join(
        f"{names[0]} = {'/'.join(f'{v:g}' for v in stages.values())}"
        for (_, names), stages in changed.items()
    )
    return NotExpressible(
        f"{type(parent.model).__name__} cannot be built with {asked}: {reason}. Take sizes that "
        "divide, or cut what depends on them too (a stream and its heads); --form zoo has any."
    )
