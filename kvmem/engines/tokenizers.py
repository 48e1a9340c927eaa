"""The renderer of a served model, from its own tokenizer and chat template."""

from __future__ import annotations

from kvmem.context import ChatRenderer
from kvmem.errors import ConfigError

__all__ = ["renderer_of"]


def renderer_of(model: str) -> ChatRenderer:
    """The renderer of a model's folder, or of its name on the Hugging Face hub.

    Raises:
        ConfigError: transformers is not installed, or cannot read that tokenizer.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ConfigError(
            "The model's tokenizer is read by transformers, which is not installed",
            next_step="Install it, or give a renderer of your own (kvmem.context.Renderer).",
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The tokenizer of {model} cannot be read: {error}",
            next_step="Give tokenizer= a folder that this process can read, or a renderer.",
            setting="tokenizer",
        ) from error
    return ChatRenderer.of(tokenizer)
