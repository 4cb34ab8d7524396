"""What `llmc train pretrain` is told: one TOML or JSON file, every field of it described here.

Relative paths in the file are relative to the folder that the file is in, so that a run does not depend on where the
command was typed. Knows no torch: a wrong field is reported before anything heavy is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from llmc import config
from llmc.config import Strict
from llmc.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Data(Strict):
    """Which text is learned, and which is held out.

    Attributes:
        paths: Files, folders (searched to any depth) and globs. A file is one document.
        suffixes: Of the files taken from folders and globs; none given takes every file.
        exclude: Globs over the names of files and folders below a given folder ("test", "*_pb2.py") to leave out.
        held_out_fraction: Part of the bytes, in whole files, that is never trained on. 0 holds nothing out.
        undecodable: What to do with a file that is not UTF-8.
    """

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    suffixes: tuple[str, ...] = (".txt", ".md")
    exclude: tuple[str, ...] = ()
    held_out_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.01
    undecodable: Literal["error", "skip"] = "error"


class Tokenizer(Strict):
    """A new tokenizer of `vocab_size`, or the one in `folder`.

    Attributes:
        vocab_size: Words of a byte-level BPE trained on the training text, special tokens included.
        folder: A Hugging Face folder with a tokenizer.json and an end-of-text token.
    """

    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] | None = None
    folder: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Tokenizer:
        if (self.vocab_size is None) == (self.folder is None):
            raise ValueError("give either vocab_size (to train a tokenizer) or folder (to take one)")
        return self


class Model(Strict):
    """The LLaMA to train.

    Attributes:
        hidden_size: Width of the residual stream; a multiple of num_heads.
        num_layers: Blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads, shared by groups of query heads; as many as query heads when not given.
        intermediate_size: Width inside the gated MLP.
        max_positions: Longest context, tokens.
        rope_theta: Base of the rotary embedding.
        norm_eps: Added to the mean square in RMSNorm.
        tied: The head is the embedding.
    """

    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    intermediate_size: PositiveInt
    max_positions: Annotated[int, Field(ge=8)]
    rope_theta: PositiveFloat = 10000.0
    norm_eps: PositiveFloat = 1e-5
    tied: bool = True

    @model_validator(mode="after")
    def _heads_fit(self) -> Model:
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} is not an even number of channels"
            )
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self


class Training(Strict):
    """How long and how it is trained.

    Attributes:
        steps, tokens, epochs: How long; at most one of them, one epoch when none is given.
        max_minutes: A limit on the time spent in training. The schedule follows whichever of length and time is
            nearer its end, so a run that time cuts short still ends with its learning rate decayed.
        sequence_length: Tokens of a row; the model's max_positions when not given.
        batch_size: Rows of a forward pass on each device.
        gradient_accumulation: Forward passes of a step.
        learning_rate: The highest.
        warmup_steps: Steps of linear rise to it.
        schedule: "cosine" falls to `final_learning_rate` times the highest; "constant" stays.
        final_learning_rate: A fraction of `learning_rate`.
        weight_decay: AdamW's; norms are left out.
        beta1, beta2: AdamW's.
        max_grad_norm: Gradients are clipped to this norm; 0 leaves them.
        seed: Of the weights, the order of the rows, and the choice of held-out files.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        precision: "auto" is bf16 on a GPU that has it and fp32 elsewhere.
        log_every, evaluate_every, checkpoint_every: Steps.
    """

    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    max_minutes: PositiveFloat | None = None
    sequence_length: Annotated[int, Field(ge=8)] | None = None
    batch_size: PositiveInt = 8
    gradient_accumulation: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    final_learning_rate: Fraction = 0.05
    weight_decay: NonNegativeFloat = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    max_grad_norm: NonNegativeFloat = 1.0
    seed: NonNegativeInt = 0
    gradient_checkpointing: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    log_every: PositiveInt = 10
    evaluate_every: PositiveInt = 200
    checkpoint_every: PositiveInt = 500

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how long to train: keep one")
        return self


class Pretrain(Strict):
    """The whole file.

    Attributes:
        output: The run folder to write; `--output` overrides it.
    """

    output: str | None = None
    data: Data
    tokenizer: Tokenizer
    model: Model
    training: Training = Training()

    @model_validator(mode="after")
    def _rows_fit(self) -> Pretrain:
        length = self.training.sequence_length
        if length and length > self.model.max_positions:
            raise ValueError(
                f"training.sequence_length {length} is over model.max_positions {self.model.max_positions}"
            )
        return self

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        return self.training.sequence_length or self.model.max_positions


def load(path: Path) -> Pretrain:
    """Read a configuration and make its paths absolute.

    Raises:
        ConfigError: It cannot be read, or a field of it is wrong.
    """
    found = config.load(Pretrain, path)
    base = path.absolute().parent
    data = found.data.model_copy(update={"paths": tuple(_absolute(base, entry) for entry in found.data.paths)})
    folder, output = found.tokenizer.folder, found.output
    tokenizer = found.tokenizer.model_copy(update={"folder": folder and _absolute(base, folder)})
    return found.model_copy(update={"data": data, "tokenizer": tokenizer, "output": output and _absolute(base, output)})


def _absolute(base: Path, path: str) -> str:
    try:
        return str(base / Path(path).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"{path}: {error}") from None
