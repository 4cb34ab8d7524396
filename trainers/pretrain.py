"""`llmc train pretrain`: a LLaMA from scratch, on plain text, with the Hugging Face Trainer.

Load, data, model, train, evaluate, save: in this order. An interrupt (Ctrl-C, SIGTERM) saves a checkpoint at the end of
the running step; the same command goes on from the last checkpoint, and ends where an uninterrupted run ends, bit for
bit (without a time limit). Knows Hugging Face's model and Trainer; does not know canonical names or engines.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from llmc import checkpoint, manifest
from llmc.errors import UserError
from llmc.trainers import corpus as corpora
from llmc.trainers import curves, work
from llmc.trainers.config import Pretrain
from llmc.trainers.corpus import Corpus, Prepared
from llmc.trainers.data.packing import Rows
from llmc.trainers.interrupts import Interrupted, StopOnSignal
from llmc.trainers.progress import ShowProgress
from llmc.trainers.schedule import Budget, learning_rate

_PATHS: dict[str, Any] = {"output": True, "data": {"paths"}, "tokenizer": {"folder"}}  # a manifest holds none


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run.

    Attributes:
        folder: The run folder.
        parameters: Of the model, a tied head not counted twice.
        steps, seconds: Spent.
        history: Entries of log.jsonl: step, tokens, seconds, and "loss" or "held_out_loss".
    """

    folder: Path
    parameters: int
    steps: int
    seconds: float
    history: Sequence[dict[str, Any]]


def run(config: Pretrain, output: Path, *, overwrite: bool = False, console: Console | None = None) -> Result:
    """Train, and write the run folder.

    Args:
        output: The folder to write; `OUTPUT.work` beside it holds the unfinished run.
        overwrite: Replace an existing `output`, and unfinished work of other settings.
        console: Where progress is shown; standard error by default.

    Raises:
        UserError: The text, the tokenizer or `output` is not usable.
        Interrupted: A signal came; a checkpoint is saved and the same call goes on from it.
    """
    console = console or Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    manifest.check_target(output, overwrite=overwrite)
    corpus = corpora.find(config)
    settings = config.model_dump(mode="json", exclude={"output"}) | {"text": corpus.sha256}
    with work.opened(output, settings, overwrite=overwrite) as folder:
        prepared = corpora.prepare(config, corpus, folder, console.print)
        trainer = _trainer(config, prepared, folder)
        _train(trainer, console, resume=work.last_checkpoint(folder))
        with manifest.creating(output, overwrite=overwrite) as target:
            _write_run(target, config, corpus, prepared, trainer)
        result = Result(
            output,
            trainer.llama.num_parameters(),
            trainer.state.global_step,
            trainer.budget.seconds,
            _history(trainer),
        )
        work.remove(folder)
    return result


class PretrainTrainer(Trainer):
    """The Trainer with our schedule, our log entries, and an exact held-out loss."""

    def __init__(self, config: Pretrain, budget: Budget, model: LlamaForCausalLM, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self.llama, self.settings, self.budget = model, config.training, budget
        self._tokens_per_step = (
            self.args.train_batch_size
            * self.args.world_size
            * self.args.gradient_accumulation_steps
            * config.sequence_length
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,  # type: ignore[arg-type]  # the Trainer has made it by now
            lambda step: learning_rate(self.settings, step, self.budget.fraction(step)),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to every entry how many tokens and seconds it took to get there.

        Raises:
            UserError: The loss is no longer a number.
        """
        if not math.isfinite(logs.get("loss", 0.0)):
            raise UserError(
                f"the loss is {logs['loss']} at step {self.state.global_step}: the training diverged; "
                "lower training.learning_rate or raise training.warmup_steps, and pass --overwrite"
            )
        tokens = self.state.global_step * self._tokens_per_step
        seconds = self.budget.seconds
        logs |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9)}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss, nats per predicted token: a mean over tokens, where the Trainer's own is over batches."""
        sums = torch.zeros(2, dtype=torch.float64)
        self.llama.eval()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                count = int((inputs["labels"][:, 1:] >= 0).sum())
                if count:
                    with self.compute_loss_context_manager():
                        loss = self.llama(**inputs, use_cache=False).loss
                    sums += torch.tensor([float(loss) * count, count], dtype=torch.float64)
        self.llama.train()
        sums = self.accelerator.reduce(sums.to(self.args.device), "sum")
        metrics = {"held_out_loss": float(sums[0] / sums[1])}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _trainer(config: Pretrain, prepared: Prepared, folder: Path) -> PretrainTrainer:
    training = config.training
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.set_seed(training.seed)
    rows, held_out = (
        Rows(tokens, config.sequence_length, padding=prepared.end_of_text)
        for tokens in (prepared.train, prepared.held_out)
    )
    arguments = _arguments(config, folder, evaluates=len(held_out) > 0)
    rows_per_step = arguments.train_batch_size * arguments.world_size * training.gradient_accumulation
    steps = _steps(config, len(rows), rows_per_step)
    arguments.max_steps = steps
    trainer = PretrainTrainer(
        config,
        Budget(steps, training.max_minutes and training.max_minutes * 60),
        model=LlamaForCausalLM(_model_config(config, prepared)),
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _steps(config: Pretrain, rows: int, rows_per_step: int) -> int:
    training = config.training
    if training.steps:
        return training.steps
    if training.tokens:
        return max(1, round(training.tokens / (rows_per_step * config.sequence_length)))
    return max(1, math.ceil((training.epochs or 1.0) * rows / rows_per_step))


def _arguments(config: Pretrain, folder: Path, *, evaluates: bool) -> TrainingArguments:
    training = config.training
    has_cuda = torch.cuda.is_available()
    can_bf16 = has_cuda and torch.cuda.is_bf16_supported()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=1,  # the right number is set when the number of devices is known
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.beta1,
        adam_beta2=training.beta2,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        activation_checkpointing=training.gradient_checkpointing,
        bf16=training.precision == "bf16" or (training.precision == "auto" and can_bf16),
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=training.evaluate_every,
        save_steps=training.checkpoint_every,
        save_total_limit=2,
        dataloader_pin_memory=has_cuda,
        use_cache=False,
        disable_tqdm=True,
        report_to="none",
    )


def _model_config(config: Pretrain, prepared: Prepared) -> LlamaConfig:
    model = config.model
    return LlamaConfig(
        vocab_size=prepared.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads or model.num_heads,
        max_position_embeddings=model.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tied,
        bos_token_id=None,
        eos_token_id=prepared.end_of_text,
        pad_token_id=None,
        use_cache=False,
    )


def _train(trainer: PretrainTrainer, console: Console, *, resume: Path | None) -> None:
    progress = ShowProgress(console, trainer.budget)
    stop = StopOnSignal(trainer.budget)
    trainer.add_callback(progress)
    trainer.add_callback(stop)
    trainer.budget.start()
    if resume:
        state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
        trainer.budget.start(max((entry["seconds"] for entry in state.log_history), default=0.0))
        console.print(f"going on from {resume}")
    if resume and trainer.budget.fraction(state.global_step) >= 1:
        # The run died after its last step. The Trainer would do one more.
        trainer.state = state
        trainer.llama.load_state_dict(LlamaForCausalLM.from_pretrained(resume).state_dict())
    else:
        try:
            with stop.listening():
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            progress.close()
    if stop.signal is not None and trainer.budget.fraction(trainer.state.global_step) < 1:
        raise Interrupted(stop.signal, trainer.state.global_step)
    if trainer.eval_dataset and not any(
        entry["step"] == trainer.state.global_step and "held_out_loss" in entry for entry in trainer.state.log_history
    ):
        trainer.evaluate()


def _name_of(config: Pretrain) -> str:
    return ", ".join(Path(path).name for path in config.data.paths)


def _history(trainer: PretrainTrainer) -> list[dict[str, Any]]:
    """The run's log without the Trainer's own closing summary."""
    return [entry for entry in trainer.state.log_history if "loss" in entry or "held_out_loss" in entry]


def _write_run(target: Path, config: Pretrain, corpus: Corpus, prepared: Prepared, trainer: PretrainTrainer) -> None:
    model = target / "model"
    trainer.llama.config.use_cache = True  # off for packing alone: see data/packing.py
    trainer.llama.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    trainer.llama.save_pretrained(model)
    checkpoint.copy_tokenizer(prepared.folder, model)  # after the model, whose generation_config it replaces
    shutil.copyfile(prepared.folder / corpora.HELD_OUT, target / corpora.HELD_OUT)
    (target / "config.json").write_text(config.model_dump_json(indent=1, exclude={"output"}) + "\n", encoding="utf-8")
    history = _history(trainer)
    (target / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
    curves.draw(history, target / "curves.png")
    manifest.seal(
        target,
        manifest.Manifest(
            kind="run",
            tools=manifest.tools("torch", "transformers", "tokenizers", "accelerate"),
            settings=config.model_dump(mode="json", exclude=_PATHS),
            parents=(manifest.Parent(kind="text", sha256=corpus.sha256, name=_name_of(config)),),
            notes={
                "steps": trainer.state.global_step,
                "parameters": trainer.llama.num_parameters(),
                "trained_files": len(corpus.trained),
                "held_out_files": len(corpus.held_out),
                **{key: entry[key] for entry in history for key in ("loss", "held_out_loss") if key in entry},
            },
        ),
    )
