"""Sides of a comparison that are PyTorch modules: transformers' own model, and the reference decoder.

What goes into the first layer and comes out of each is seen by hooks on the layers themselves: transformers' own
`output_hidden_states` gives the last one normalised.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmc.checkpoint import Checkpoint
from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.evaluate.parity import Array, Reading, Side
from llmc.model import load
from llmc.need import need
from llmc.runtime import Tokens


def open_checkpoint(folder: Path, *, context: int | None = None, **about: Any) -> Side:
    """A canonical checkpoint, run by the reference decoder in float32.

    Args:
        context: The length that rope scalings see; by default that of each piece, as transformers has it. An engine
            has that of its longest sequence.
        about: More attributes of the Side.
    """
    decoder = load(Checkpoint(folder))
    spec = decoder.spec
    about |= {"vocab_size": spec.vocab_size, "max_length": spec.max_positions}
    return _side("checkpoint", decoder.layers, lambda tokens: decoder(tokens, context=context), **about)


def open_hugging_face(folder: Path, **about: Any) -> Side:
    """A Hugging Face folder, run by transformers; see `load_hugging_face`."""
    model = load_hugging_face(folder)
    config = model.config.get_text_config()
    about |= {"vocab_size": config.vocab_size, "max_length": getattr(config, "max_position_embeddings", None)}
    # The first in the order of definition is the outermost: experts are inside.
    layers = next(
        found
        for found in model.modules()
        if isinstance(found, nn.ModuleList) and len(found) == config.num_hidden_layers
    )
    if hasattr(model, "score"):
        # The model itself gives the scores of one token.
        body = model.base_model
        return _side("hf", layers, lambda tokens: model.score(body(tokens, use_cache=False).last_hidden_state), **about)
    return _side("hf", layers, lambda tokens: model(tokens, use_cache=False).logits, **about)


def load_hugging_face(folder: Path) -> Any:
    """transformers' model of a Hugging Face folder in float32. Code that comes with a model is never run.

    Raises:
        UnsupportedModelError: transformers has no class of its own for it.
        CheckpointError: The folder lacks weights that the class has.
    """
    transformers = need("transformers")
    importlib.import_module("llmc.modeling")  # which adds llmc's own class to transformers'
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        model, report = _loader(transformers, folder).from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        words = " ".join(str(error).split()).partition(". ")[0][:300]
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot load {folder}: {words}. Where it has no class of its own "
            "for a model, compare what was converted: a checkpoint, or an export of one"
        ) from error
    # transformers draws these at random, and warns.
    if lacking := sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]})):
        raise CheckpointError(f"{folder}: {len(lacking)} tensors are missing or misshapen, the first is {lacking[0]}")
    return model.requires_grad_(False).eval()


def _loader(transformers: Any, folder: Path) -> Any:
    """transformers' class for what the folder says it has: a head that predicts tokens, or one that scores."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    is_scorer = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return transformers.AutoModelForSequenceClassification if is_scorer else transformers.AutoModelForCausalLM


def _side(kind: str, layers: nn.ModuleList, logits_of: Callable[[Tensor], Tensor], **about: Any) -> Side:
    def read(tokens: Tokens, with_states: bool) -> Reading:
        states: list[Array] = []
        with torch.inference_mode(), _watching(layers, states):
            logits = logits_of(torch.from_numpy(tokens)[None])[0].numpy()
        return Reading(logits, states if with_states else ())

    return Side(kind=kind, close=lambda: None, read=read, has_states=True, **about)


@contextmanager
def _watching(layers: nn.ModuleList, states: list[Array]) -> Iterator[None]:
    """Append what goes into the first layer and what comes out of each, [tokens, hidden]."""

    def keep(value: Any) -> None:
        hidden: Tensor = value[0] if isinstance(value, tuple) else value
        states.append(hidden.reshape(-1, hidden.shape[-1]).numpy().copy())

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep(arguments[0] if arguments else named["hidden_states"])

    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(lambda *seen: keep(seen[-1])) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
