"""Other libraries' exceptions as one line for the person who started the service."""

from __future__ import annotations

from collections.abc import Collection

_MAX_CHARS = 300
_NAMED_KEYS = 3
_NO_MEMORY = ("out of memory", "can't allocate memory")  # torch, of a GPU and of main memory


def one_line(error: BaseException) -> str:
    """The exception's text with its type, on one line and cut to a readable length."""
    text = " ".join(str(error)[: 4 * _MAX_CHARS].split())
    if len(text) > _MAX_CHARS:
        text = text[:_MAX_CHARS] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory for something, on whichever device."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def missing_weights(names: Collection[str]) -> str:
    """transformers would fill them with random numbers and go on."""
    some = ", ".join(sorted(names)[:_NAMED_KEYS])
    more = f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else ""
    return f"the checkpoint lacks weights that the model needs: {some}{more}"


def gib(num_bytes: int) -> str:
    """A number of bytes, readable."""
    return f"{num_bytes / 2**30:.1f} GiB"
