"""Models with other widths than their class can be built with: a parent, and what was cut.

A folder holds `zoo.json`, which says how the parent is built, the sizes of its named axes that
differ, the layers that stay, and what stands in for parts that went; and `model.safetensors`.
Loading builds the parent, leaves layers out, puts the tensors in, and sets the numbers that modules
keep beside them (heads, groups of depthwise convolutions, shapes of norms).
`zoo.create_model("local-dir:FOLDER")` does it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.axes import Axis, Shapes, State, dim_size, named_shapes
from zoo.files import written_whole
from zoo.language.classes import find_class

ABOUT = "zoo.json"
Place = tuple[int, int]
Recipe = Mapping[str, Any]
"""Of timm: `architecture`, `arguments`. Of transformers: `class`, `config`. And `emulated`: the
arguments of `Emulated` for each part that it stands in for."""


class Emulated(nn.Module):
    """What stands in for a part that went: a constant, or a linear map of low rank as well.

    2407.16286: the mean of what a part added, y = b + x D U, fitted in closed form
    (`zoo.students.prune.emulate`).

    Args:
        rank: 0 for the constant alone.
        passes: The part was a whole layer, which adds to what it is given; not a branch.
        outputs: How many values the part returned in a tuple; 0 if it returned a tensor.
    """

    def __init__(self, dim: int, *, rank: int = 0, passes: bool = False, outputs: int = 0):
        super().__init__()
        self.passes, self.outputs = passes, outputs
        self.bias = nn.Parameter(torch.zeros(dim))
        self.down = nn.Linear(dim, rank, bias=False) if rank else None
        self.up = nn.Linear(rank, dim, bias=False) if rank else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take what the part took, of which only the first is looked at."""
        x = args[0] if args else kwargs["hidden_states"]
        y = self.bias.expand_as(x)
        if self.down is not None and self.up is not None:
            y = y + self.up(self.down(x))
        y = x + y if self.passes else y
        return (y, *[None] * (self.outputs - 1)) if self.outputs else y


def is_cut_format(folder: Path) -> bool:
    """Tell whether a folder holds a model in this format."""
    return (folder / ABOUT).is_file()


def save(
    folder: Path,
    recipe: Recipe,
    state: State,
    sizes: Mapping[Axis, int],
    layers: Mapping[str, Sequence[int]],
) -> None:
    """Write what `load` reads.

    Args:
        state: The child's tensors; tied ones may stand twice.
        sizes: Of the parent's axes, those that differ.
        layers: Numbers of the parent's layers that stay, for each list that loses some.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[int, str] = {}
    first = [n for n, t in state.items() if seen.setdefault(t.data_ptr(), n) == n or not t.numel()]
    once = {name: state[name].detach().cpu().contiguous() for name in first}
    save_file(once, folder / "model.safetensors")
    about = dict(recipe=dict(recipe), sizes=dict(sizes), layers=dict(layers))
    with written_whole(folder / ABOUT) as path:
        path.write_text(json.dumps(about, indent=2) + "\n")


def load(folder: Path, **arguments: Any) -> nn.Module:
    """Build the model in a folder, in evaluation mode, on torch's default device.

    Args:
        arguments: Of timm's constructor, in place of the parent's own; with `num_classes=0` the
            classifier is left out.

    Raises:
        ValueError: the tensors are not those that its `zoo.json` speaks of.
    """
    about = json.loads((folder / ABOUT).read_text())
    recipe = about["recipe"]
    if arguments:
        recipe = recipe | dict(arguments=recipe["arguments"] | arguments)
    model = build_parent(recipe)
    state = load_file(folder / "model.safetensors")
    if arguments.get("num_classes") == 0:
        state = {name: state[name] for name in model.state_dict() if name in state}
    device = torch.get_default_device()
    # copies, which lie aligned: elsewhere products on some CPUs have other last bits
    state = {name: tensor.to(device, copy=True) for name, tensor in state.items()}
    return reshape(model, state, about["sizes"], about["layers"])


def save_trained(model: nn.Module, source: Path, folder: Path, **arguments: Any) -> None:
    """Write a model that `load` has read from `source`, with the weights that it has now.

    Args:
        arguments: That it was loaded with.
    """
    about = json.loads((source / ABOUT).read_text())
    recipe = about["recipe"] | dict(arguments=about["recipe"]["arguments"] | arguments)
    save(folder, recipe, model.state_dict(), about["sizes"], about["layers"])


def build_parent(recipe: Recipe) -> nn.Module:
    """Build the uncut model with random weights."""
    if "architecture" in recipe:
        import timm

        model = timm.create_model(recipe["architecture"], **recipe["arguments"])
    else:
        kind = find_class(recipe["class"])
        model = kind(kind.config_class.from_dict(recipe["config"]))
    put_emulated(model, {k: Emulated(**v) for k, v in recipe.get("emulated", {}).items()})
    return model


def put_emulated(model: nn.Module, parts: Mapping[str, Emulated]) -> None:
    """Put modules where others of a model stand, by path."""
    for path, part in parts.items():
        outer, _, name = path.rpartition(".")
        setattr(model.get_submodule(outer), name, part)


def reshape(
    model: nn.Module,
    state: State,
    sizes: Mapping[Axis, int],
    layers: Mapping[str, Sequence[int]],
) -> nn.Module:
    """Give a model other tensors and the numbers that go with them, in place.

    Raises:
        ValueError: a tensor is missing, extra, or has another shape than the sizes say.
    """
    shapes = named_shapes(model)
    _set_attributes(model, shapes, {**shapes.sizes, **sizes})
    for path, kept in layers.items():
        old: Any = model.get_submodule(path)
        outer, _, name = path.rpartition(".")
        setattr(model.get_submodule(outer), name, type(old)(*_as_given(old, kept)))
    own = model.state_dict()
    state = dict(state) | {n: state[first] for n, first in shapes.tied.items() if first in state}
    if wrong := sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{len(wrong)} tensors are missing or extra, for one {wrong[0]}.")
    done: dict[Place, nn.Parameter] = {}
    for name, tensor in state.items():
        _put(model, name, tensor, done)
    for module in model.modules():
        _fit(module)
    return model.eval()


def place(tensor: Tensor) -> Place:
    """Return where a tensor's numbers lie, which tied ones share; on the meta device too."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.element_size()


def _as_given(layers: nn.Module, kept: Sequence[int]) -> list[Any]:
    parts = [list(layers.children())[i] for i in kept]
    return [parts] if isinstance(layers, nn.ModuleList) else parts


def _set_attributes(model: nn.Module, shapes: Shapes, sizes: Mapping[Axis, int]) -> None:
    """Set what modules keep of their sizes: the `=` entries of the tables."""
    for entry in shapes.attributes:
        *path, name = entry.names[0].split(".")
        owner: Any = model.get_submodule(entry.scope)
        value = dim_size(entry.terms, sizes)
        if name.isdigit():  # an item of a tuple
            *path, word = path
            owner = owner.get_submodule(".".join(path))
            items = list(getattr(owner, word))
            items[int(name)] = value
            setattr(owner, word, tuple(items))
            continue
        # versions of a library name their parts and attributes in several ways
        parts = dict(owner.named_modules())
        if hasattr(parts.get(".".join(path)), name):
            setattr(parts[".".join(path)], name, value)


def _put(model: nn.Module, name: str, tensor: Tensor, done: dict[Place, nn.Parameter]) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    where = place(tensor)
    if where not in done:  # tied tensors stay one
        done[where] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    module._parameters[leaf] = done[where]


def _fit(module: Any) -> None:
    """Set what torch's own layers keep of the shapes of their weights."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1 and module.groups == module.out_channels:  # one group a channel
            module.groups = module.in_channels = module.out_channels = weight.shape[0]
        else:
            first, second = weight.shape[:2]
            module.out_channels, module.in_channels = (
                (second, first) if module.transposed else (first, second * module.groups)
            )
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(weight.shape)
