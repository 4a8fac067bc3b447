"""The results as tables of Markdown."""

from typing import Any

TITLES = {
    "width": "width",
    "depth": "depth",
    "both": "both",
    "random": "both, random units",
    "torch_pruning": "width, Torch-Pruning",
}


def size_table(content: dict[str, Any]) -> str:
    """Write what each network is, before it learns."""
    lines = [
        "| network | parameters (M) | GFLOPs | kNN | linear | img/s | × |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in _sorted(content["networks"]):
        parent, _, cut = name.partition("-")
        whole = content["networks"].get(parent, found)
        share = f" ({found['flops'] / whole['flops']:.1%})" if cut else ""
        size = f"{found['params'] / 1e6:.2f} | {found['flops'] / 1e9:.3f}{share}"
        speed, peer = (content["speed"].get(n, {}).get("best") for n in (name, parent))
        fast = f"{speed:,.0f} | {speed / peer:.2f}" if speed and peer else " | "
        title = f"{parent}, {TITLES[cut]}" if cut else f"**{parent}**"
        lines.append(f"| {title} | {size} | {found['knn']:.1f} | {found['linear']:.1f} | {fast} |")
    notes = [
        f"Torch-Pruning on {name.partition('-')[0]}: {found['error']}"
        for name, found in content["networks"].items()
        if found.get("error")
    ]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def learn_table(content: dict[str, Any]) -> str:
    """Write what distillation has given back."""
    lines = [
        "| parent | cut by | kNN: cut | KD, parent | KD, with others | linear: cut | KD, parent "
        "| KD, with others | fidelity, parent | with others |",
        "| --- | --- |" + " ---: |" * 8,
    ]
    for name, found in _sorted(content["networks"]):
        parent, _, cut = name.partition("-")
        if not cut:
            lines.append(f"| **{parent}** | | {found['knn']:.1f} | | | {found['linear']:.1f} |"
                         + " | | | |")  # fmt: skip
            continue
        rows = [content["cells"].get(f"{name}-{who}", {}) for who in ("parent", "others")]
        cells = [
            *(f"{row['knn']:.1f}" if row else "" for row in (found, *rows)),
            *(f"{row['linear']:.1f}" if row else "" for row in (found, *rows)),
            *(f"{row['fidelity']:.3f}" if row else "" for row in rows),
        ]
        lines.append(f"| {parent} | {TITLES[cut]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sorted(networks: dict[str, Any]) -> list[tuple[str, Any]]:
    order = ["", *TITLES]

    def place(item: tuple[str, Any]) -> tuple[str, int]:
        parent, _, cut = item[0].partition("-")
        return parent, order.index(cut)

    return sorted(networks.items(), key=place)
