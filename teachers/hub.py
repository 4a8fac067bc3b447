"""The Hugging Face hub, for teachers of several libraries: licences, and how to fetch weights."""

from pathlib import Path

from huggingface_hub import ModelCard, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError


def read_license(source: str | Path) -> str | None:
    """Read the licence from the model card of a folder or a repository; `None` if none is stated.

    A licence that the hub has no identifier for is returned by its own name.
    """
    folder = Path(source)
    try:
        card = ModelCard.load(folder / "README.md" if folder.is_dir() else str(source))
    except (OSError, HfHubHTTPError, ValueError):  # no card, no network, or not a readable one
        return None
    stated = card.data.to_dict()
    if stated.get("license") == "other":
        return stated.get("license_name") or "other"
    return stated.get("license")


def how_to_fetch(repository: str) -> str:
    """Say how to get a repository onto a machine that has no network or may not use it."""
    blocked = "HF_HUB_OFFLINE is set, so nothing was downloaded. " if is_offline_mode() else ""
    return (
        f"{blocked}Where there is network, `hf download {repository} --local-dir FOLDER` fetches "
        "it; carry the folder over here."
    )
