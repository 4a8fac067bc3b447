"""Classes of language models by their names, as configurations and recipes give them."""

from typing import Any


def find_class(name: str) -> Any:
    """Find a class of transformers, or one of ours that transformers does not have.

    Returns:
        None if there is none.
    """
    import transformers

    from zoo.language import hyena

    return getattr(hyena if name in hyena.__all__ else transformers, name, None)
