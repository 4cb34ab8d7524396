"""The `llmc` command: a table of names, each command's module imported only when it is called.

So `llmc --help` costs as much as importing click, and a host that only serves never meets torch.
"""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any

import click

import llmc
from llmc.errors import LlmcError

# name -> (module under llmc.commands, help in one line), in the order of the pipeline. Each module has `command`.
COMMANDS = {
    "train": ("train", "Train a model: pretrain."),
    "convert": ("convert", "Make a canonical checkpoint from a Hugging Face folder, a GGUF file or a training run."),
    "export": ("export", "Write a checkpoint in another project's format."),
    "quantize": ("quantize", "Make a smaller checkpoint."),
    "build-engine": ("build_engine", "Make an engine that can be served."),
    "evaluate": ("evaluate", "Perplexity and solved tasks of models, side by side."),
    "verify": ("verify", "Whether two forms of a model compute the same: source, checkpoint, engine, server."),
    "score": ("score", "What a reward model says of texts."),
    "generate": ("generate", "Continue a text with an engine."),
    "serve": ("serve", "Serve an engine over HTTP."),
    "families": ("families", "Print the model families that llmc converts, and what each supports."),
    "bench": ("bench", "Measure an engine, or a server."),
    "inspect": ("inspect", "Say what a folder is, where it came from, and whether it is whole."),
}


class LazyGroup(click.Group):
    """A group whose commands live in a table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"llmc.commands.{COMMANDS[name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands, in the order of the pipeline"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise click.UsageError(f"There is no command '{args[0]}'.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(llmc.__version__, prog_name="llmc")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning (default) or error; or set LLMC_LOG.")
def group(log_level: str | None) -> None:
    """From a trained language model to a running server.

    Each command reads a folder and writes a folder; every folder carries a manifest.
    """
    from llmc import log

    log.configure(log_level)


def main(args: list[str] | None = None) -> None:
    """Entry point: a user's mistake becomes one line on standard error and an exit status, never a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status: Any = group.main(args, prog_name="llmc", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("llmc: interrupted", err=True)
        sys.exit(130)
    except LlmcError as error:
        click.echo(f"llmc: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output (`head`, say) left; Python would complain once more when it flushes at exit.
        sys.stderr.close()
        sys.exit(0)


def _terminate(signum: int, _frame: object) -> None:
    """Leave through the same doors as Ctrl-C does, so that half-written folders are removed."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
