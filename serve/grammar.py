"""Output that is bound to a form: a JSON schema, a regular expression, a grammar.

    schema ──► compile, in a worker with a time limit ──► Grammar ──► Matcher, one a sequence
    token  ──► Matcher.advance ──► the next mask is computed by another thread while the runner computes
    logits ──► Matcher.allowed ──► tokens that are not allowed get no probability

llguidance does the parsing. What it is given comes from strangers: sizes are limited, its own limits of work are kept,
and it compiles on a large stack, because a long chain of references recurses once for each.

Knows: llguidance and the tokenizer. Does not know: requests, sampling, HTTP.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from llmc.errors import OverloadedError, UserError
from llmc.need import need
from llmc.tokenizer import Tokenizer

Kind = Literal["json_schema", "regex", "choice", "grammar"]

COMPILE_SECONDS = 5.0
MAX_COMPILING = 2
MAX_TEXT = 64 << 10
CACHED = 64
MASK_THREADS = 2
# Address space, touched only as deep as the recursion goes.
STACK_BYTES = 256 << 20
# One blank, or a new line with its indentation: enough to be read, and no model can fill its answer with blanks.
WHITESPACE = r"( |\n {0,20})?"


class Constraint(NamedTuple):
    """A form as it was asked for.

    Attributes:
        kind: What `text` is: a JSON schema, a regular expression, a JSON list of texts, a grammar in Lark or GBNF form.
        param: The field that it came from, for messages.
        lenient: Pass over keywords of a schema that cannot be kept to, instead of refusing them.
    """

    kind: Kind
    text: str
    param: str
    lenient: bool = False


class Matcher:
    """Where one sequence is in its grammar.

    llguidance's object must not be touched by two threads at a time: while a mask is computed, only that is waited for.

    Attributes:
        finished: Nothing may follow.
    """

    def __init__(self, matcher: Any, vocab_size: int, pool: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._pool = pool
        self.finished = False
        self._mask: Future[bytes] = pool.submit(matcher.compute_bitmask)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [vocab_size]: which tokens may come next, the end of the text among them where it may end.

        Raises:
            UserError: The grammar turned out to be too complex, or leaves nothing to say.
        """
        bits = np.unpackbits(np.frombuffer(self._mask.result(), np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise UserError(f"the output's grammar cannot be followed: {_first_line(self._matcher.get_error())}")
        found = np.zeros(self._vocab_size, np.bool_)
        found[: len(bits)] = bits[: self._vocab_size]
        if not found.any():
            raise UserError("the output's grammar leaves no token that may come next")
        return found

    def advance(self, token: int) -> None:
        """Go on by a token, and begin to compute what may follow it."""
        self._mask.result()
        self._matcher.consume_token(token)
        self.finished = bool(self._matcher.is_stopped())
        if not self.finished:
            self._mask = self._pool.submit(self._matcher.compute_bitmask)


class Grammar:
    """A compiled form, shared by all sequences that are bound to it."""

    def __init__(self, matcher: Any, vocab_size: int, pool: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._pool = pool

    def begin(self) -> Matcher:
        """For a new sequence."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size, self._pool)


class Grammars:
    """Compiles forms for one model, and remembers the last ones."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Cheap: everything is made when the first form is asked for.

        Args:
            vocab_size: Width of a row of logits.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._places = threading.Semaphore(MAX_COMPILING)
        self._prepared: Any = None
        self._pool = ThreadPoolExecutor(MASK_THREADS, "llmc-mask")
        self._cached = functools.lru_cache(maxsize=CACHED)(self._in_worker)

    def compile(self, constraint: Constraint) -> Grammar:
        """Make a form ready to be followed.

        Raises:
            UserError: It is wrong, too large, or takes too long; names the field and what is wrong with it.
            OverloadedError: Too many others are being compiled.
            MissingDependencyError: llguidance is not installed.
        """
        if (length := len(constraint.text)) > MAX_TEXT:
            message = f"{constraint.param} has {length} characters, more than {MAX_TEXT}"
            raise UserError(message, param=constraint.param)
        self._vocabulary()
        return self._cached(constraint)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _vocabulary(self) -> Any:
        """The tokenizer as llguidance has it: made once, which takes a second for a large vocabulary."""
        library = need("llguidance")
        with self._lock:
            if self._prepared is None:
                if not self._tokenizer.eos_ids:
                    raise UserError("this model has no token that ends a text, so its output can have no form")
                ends = sorted(self._tokenizer.eos_ids)
                text = self._tokenizer.backend.to_str()
                self._prepared = library.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=ends)
            return self._prepared

    def _in_worker(self, constraint: Constraint) -> Grammar:
        """Compile on a thread of its own that is not waited for longer than the limit."""
        if not self._places.acquire(timeout=COMPILE_SECONDS):
            raise OverloadedError("too many grammars are being compiled: try again later")
        done: Future[Grammar] = Future()

        def work() -> None:
            try:
                done.set_result(self._compile(constraint))
            except BaseException as error:
                done.set_exception(error)
            finally:
                self._places.release()

        _start_with_stack(work)
        # Not the built-in TimeoutError before Python 3.11.
        with contextlib.suppress(futures.TimeoutError):
            return done.result(COMPILE_SECONDS)
        raise UserError(
            f"{constraint.param} could not be compiled within {COMPILE_SECONDS:g} seconds: make it simpler",
            param=constraint.param,
        )

    def _compile(self, constraint: Constraint) -> Grammar:
        library = need("llguidance")
        try:
            if constraint.kind == "json_schema":
                options = {"whitespace_pattern": WHITESPACE, "lenient": constraint.lenient}
                source = library.LLMatcher.grammar_from_json_schema(constraint.text, overrides=options)
            else:
                source = library.grammar_from(constraint.kind, constraint.text)
        except ValueError as error:
            raise _wrong(constraint, str(error)) from None
        limits = library.LLParserLimits(verbose_errors=False)
        matcher = library.LLMatcher(self._vocabulary(), source, log_level=0, limits=limits)
        first = matcher.deep_copy()
        # What has no text at all shows only when the first mask is computed.
        first.compute_bitmask()
        if first.is_error():
            raise _wrong(constraint, first.get_error())
        return Grammar(matcher, self._vocab_size, self._pool)


def choice(texts: list[str]) -> str:
    """The text of a constraint of the kind "choice"."""
    return json.dumps(texts)


def _wrong(constraint: Constraint, message: str) -> UserError:
    return UserError(
        f"{constraint.param} is not a form that output can have: {_first_line(message)}", param=constraint.param
    )


def _first_line(message: str) -> str:
    lines = message.strip().splitlines() or ["unknown"]
    return lines[0][:300]


_stack_lock = threading.Lock()


def _start_with_stack(work: Callable[[], None]) -> None:
    with _stack_lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=work, name="llmc-grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
