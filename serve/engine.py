"""The loop schedule -> run -> sample -> publish, on the one thread that touches the runner.

    any thread                      engine thread                              runner
    submit() ──► queue ──► schedule ──► chunks ─────────────────────────────► step()
    Handle   ◄── events ◄── text ◄── sample ◄── rows of logits ◄──────────────┘

One lock guards the scheduler; it is not held while the runner computes. Whatever fails, fails as little as it can: a
sequence whose sampling fails ends alone, a step that fails ends the requests in it, and the loop goes on. Only when
steps keep failing, or the loop itself breaks, is the engine unhealthy.

Does not know: HTTP, prompts as text, how the runner computes.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable

import numpy as np

from llmc.errors import DrainingError, EngineError, LlmcError, OverloadedError, UserError
from llmc.log import logger
from llmc.runtime import Chunk, Limits, Logits, Runner
from llmc.serve.grammar import Grammars
from llmc.serve.handle import Event, Handle
from llmc.serve.pooling import Pooler, check_kind
from llmc.serve.request import Request
from llmc.serve.sampler import Sampler, TokenLogprobs, logprobs
from llmc.serve.scheduler import Budget, Scheduler, Work
from llmc.serve.sequence import Sequence
from llmc.serve.stats import Health, Stats
from llmc.serve.stream import StopStrings, TextStream, Vocabulary
from llmc.tokenizer import Tokenizer

# Tokens computed in a step: large enough to keep matrix products busy, small enough for streams not to stall.
STEP_TOKENS = 128
MAX_WAITING = 128
# A reader this far behind has stopped reading.
MAX_BACKLOG = 4096
UNHEALTHY_AFTER = 3
GIVE_UP_SECONDS = 5.0
IDLE_SECONDS = 60.0


class Choice(Sequence):
    """A sequence with what it takes to turn its logits into events."""

    __slots__ = "arrived begun ends handle last_token pooler position reported sampler text".split()  # noqa: SIM905

    def __init__(
        self,
        sequence_id: int,
        request: Request,
        limit: int,
        index: int,
        *,
        handle: Handle,
        position: int,
        text: TextStream,
        ends: frozenset[int],
    ) -> None:
        """Begin choice `index` of a request, which is choice `position` of all that were submitted with it."""
        super().__init__(sequence_id, request, limit, index=index)
        self.handle = handle
        self.position = position
        self.ends = ends
        matcher = None if request.grammar is None else request.grammar.begin()
        self.sampler = Sampler(request.sampling, request.prompt, ends, index=index, matcher=matcher)
        self.text = text
        self.arrived = time.monotonic()
        self.last_token: float | None = None
        self.begun = False
        # Prompt tokens whose log-probabilities were reported; a preempted sequence computes them again.
        self.reported = 0
        self.pooler = None if request.pooling is None else Pooler(request.pooling)


class Engine:
    """Serves one runner.

    Attributes:
        limits: The runner's.
        budget: What the scheduler keeps to.
        stats: What happened so far.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        step_tokens: int | None = None,
        max_waiting: int = MAX_WAITING,
        max_waiting_tokens: int | None = None,
        stuck_after: float = 120.0,
    ) -> None:
        """Take over `runner`, which nobody else may use from now on; `start` begins serving.

        Args:
            step_tokens: Tokens computed in one step, over all sequences.
            max_waiting: Sequences in the queue before requests are refused.
            max_waiting_tokens: Tokens of all of these before requests are refused.
            stuck_after: Seconds after which a step that has not come back means that the engine is stuck.
        """
        self.limits: Limits = runner.limits
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self.grammars = Grammars(tokenizer, runner.limits.vocab_size)
        self.stats = Stats()
        self.budget = Budget(
            max_sequences=self.limits.max_sequences,
            max_length=self.limits.max_length,
            cache_tokens=self.limits.cache_tokens,
            step_tokens=step_tokens if step_tokens is not None else max(STEP_TOKENS, self.limits.max_sequences),
            max_waiting=max_waiting,
            max_waiting_tokens=max_waiting_tokens,
        )
        self._runner = runner
        self._scheduler: Scheduler[Choice] = Scheduler(self.budget, self)
        self._stuck_after = stuck_after
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._ids = itertools.count(1)
        # Given up: with the error to end with, None when the client itself went away.
        self._given_up: dict[Handle, LlmcError | None] = {}
        self._active: dict[Handle, list[Choice]] = {}
        self._draining = False
        self._stopping = False
        self._broken: str | None = None
        self._failures = 0
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="llmc-engine", daemon=True)

    # The scheduler's Cache.

    def claim(self, choice: Choice) -> int:
        """See scheduler.Cache."""
        wanted = choice.tokens
        if choice.request.every_row:
            # What is reused has no logits: a claim of one token reuses none.
            wanted = wanted[:1]
        found = self._runner.claim(choice.id, np.array(wanted, np.int64), choice.request.cache_scope)
        if not choice.begun:
            choice.begun = True
            choice.handle.cached_tokens += found
            self.stats.queue_time.observe(time.monotonic() - choice.arrived)
            self.stats.prompt_tokens += choice.num_prompt
            self.stats.prompt_length.observe(choice.num_prompt)
        self.stats.prefix_queries += len(wanted)
        self.stats.prefix_hits += found
        return found

    def free(self, choice: Choice) -> None:
        """See scheduler.Cache."""
        self._runner.free(choice.id)

    # For any thread.

    def start(self) -> None:
        """Begin serving."""
        self._thread.start()

    def submit(self, *requests: Request) -> Handle:
        """Queue requests, all or none; their choices are numbered through in this order.

        Raises:
            UserError: A request is wrong, or could never fit; says which field and which limit.
            OverloadedError: The queue is full.
            DrainingError: The server is shutting down.
            EngineError: The engine is broken.
        """
        with self._lock:
            try:
                self._refuse_if_closed()
                limits = [self.check(request) for request in requests]
                total = sum(request.n for request in requests)
                handle = Handle(total, sum(len(request.prompt) for request in requests), self.cancel)
                choices = self._choices(requests, limits, handle)
                self._scheduler.add(choices)
            except LlmcError as error:
                self.stats.refused[_refusal(error)] += 1
                raise
            self._active[handle] = choices
            self._wake.notify_all()
            return handle

    def cancel(self, handle: Handle) -> None:
        """Give requests up; see Handle.cancel."""
        with self._lock:
            self._give_up(handle, None)

    def begin_drain(self) -> None:
        """Take nothing new from now on; what is queued or running goes on."""
        with self._lock:
            self._draining = True
            self._wake.notify_all()

    def drain(self, timeout: float) -> bool:
        """Take nothing new and wait for the rest; whatever is not done in `timeout` seconds is ended with an error.

        Returns:
            Whether all ended by themselves.
        """
        self.begin_drain()
        with self._lock:
            done = self._wake.wait_for(lambda: not self._active, timeout)
            if not done:
                for handle in list(self._active):
                    self._give_up(handle, DrainingError("the server shut down before this request was finished"))
                self._wake.wait_for(lambda: not self._active, GIVE_UP_SECONDS)
            return done

    def close(self, timeout: float = 10.0) -> None:
        """Stop the thread, end what still runs, and close the runner.

        Args:
            timeout: Seconds to wait for a step that is under way; if it does not come back, the runner stays open.
        """
        with self._lock:
            self._stopping = self._draining = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self.grammars.close()
        if not self._thread.is_alive():
            with self._lock:
                self._fail(list(self._active), DrainingError("the server is shutting down"))
            self._runner.close()

    @property
    def health(self) -> Health:
        """Asks no lock that a step holds, so that it answers while one is stuck."""
        began = self._step_began
        reason = self._broken or ""
        if not reason and self._failures >= UNHEALTHY_AFTER:
            reason = f"the last {self._failures} steps failed"
        if not reason and began is not None and (lasts := time.monotonic() - began) > self._stuck_after:
            reason = f"a step has not come back for {lasts:.0f} seconds"
        return Health(not reason, reason, self._draining)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def adapters(self) -> tuple[set[str], set[str]]:
        """Of the running and of the waiting sequences."""
        with self._lock:
            return self._scheduler.adapters

    @property
    def preemptions(self) -> int:
        return self._scheduler.preemptions

    @property
    def cache_usage(self) -> float:
        """Part of the cache that running sequences hold, 0 to 1."""
        with self._lock:
            return self._scheduler.held_tokens / self.limits.cache_tokens

    def _refuse_if_closed(self) -> None:
        if self._draining:
            raise DrainingError("the server is shutting down and takes no new requests")
        if self._broken is not None:
            raise EngineError(f"the engine has stopped: {self._broken}")

    def check(self, request: Request) -> int:
        """The length at which the request's sequences end; raises UserError for what this model cannot do."""
        check_kind(request, self.limits)
        limit = self._scheduler.limit(len(request.prompt), request.max_tokens)
        sampling, vocab = request.sampling, self.limits.vocab_size
        named: dict[str, Iterable[int]] = {
            "prompt": request.prompt,
            "logit_bias": sampling.logit_bias,
            "allowed_token_ids": sampling.allowed_token_ids or (),
            "stop_token_ids": sampling.stop_token_ids,
        }
        for param, ids in named.items():
            if (wrong := next((each for each in ids if not 0 <= each < vocab), None)) is not None:
                raise UserError(f"{param}: there is no token {wrong} in a vocabulary of {vocab}", param=param)
        if sampling.min_tokens > limit - len(request.prompt):
            most = limit - len(request.prompt)
            raise UserError(
                f"min_tokens is {sampling.min_tokens}, but at most {most} are generated", param="min_tokens"
            )
        return limit

    def _choices(self, requests: Iterable[Request], limits: list[int], handle: Handle) -> list[Choice]:
        choices: list[Choice] = []
        for request, limit in zip(requests, limits, strict=True):
            sampling = request.sampling
            endless = sampling.ignore_eos and request.grammar is None
            own = frozenset() if endless else self.tokenizer.eos_ids
            ends = frozenset(each for each in own.union(sampling.stop_token_ids) if each < self.limits.vocab_size)
            for index in range(request.n):
                text = TextStream(
                    self.vocabulary.detokenizer(skip_special_tokens=sampling.skip_special_tokens),
                    StopStrings(sampling.stop, include=sampling.include_stop_str_in_output),
                )
                position, sequence_id = len(choices), next(self._ids)
                choices.append(
                    Choice(sequence_id, request, limit, index, handle=handle, position=position, text=text, ends=ends)
                )
        return choices

    def _give_up(self, handle: Handle, error: LlmcError | None) -> None:
        if handle in self._active:
            handle.cancelled = True
            self._given_up[handle] = error
            self._wake.notify_all()

    # The engine's thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:
            logger.exception("the engine's loop failed")
            with self._lock:
                self._broken = f"{type(error).__name__} in the engine's loop"
                self._fail(list(self._active), EngineError(f"the engine has stopped: {self._broken}"))

    def _turn(self) -> None:
        """One step, or a wait for something to do."""
        began = time.monotonic()
        with self._lock:
            self._reap()
            work = self._schedule()
            if not work:
                if not self._stopping and not self._given_up:
                    self._wake.wait(IDLE_SECONDS)
                return
        chunks = [_chunk(item) for item in work]
        self._step_began = started = time.monotonic()
        try:
            rows = self._runner.step(chunks)
        except Exception as error:
            self._failed([item.sequence for item in work], error)
            return
        finally:
            self._step_began = None
        ended = time.monotonic()
        self._failures = 0
        for item, logits in zip(work, rows, strict=True):
            item.sequence.computed += item.length
            if item.logits and not item.sequence.handle.cancelled:
                self._publish(item, logits, ended)
        self.stats.steps += 1
        self.stats.step_time.observe(ended - started)
        self.stats.overhead_time.observe(time.monotonic() - ended + started - began)

    def _reap(self) -> None:
        """End what was given up since the last step."""
        given_up, self._given_up = self._given_up, {}
        for handle, error in given_up.items():
            if error is not None:
                self._fail([handle], error)
                continue
            for choice in list(self._active.get(handle, ())):
                self._end(choice, Event(choice.position, "", 0, "abort"))

    def _schedule(self) -> list[Work[Choice]]:
        try:
            return self._scheduler.schedule()
        except LlmcError as error:
            # The runner would not take the first in the queue.
            first = self._scheduler.waiting[0]
            self._runner.free(first.id)
            self._failed([first], error)
            return []

    def _publish(self, item: Work[Choice], logits: Logits, now: float) -> None:
        choice = item.sequence
        try:
            event = self._advance(item, logits, now)
        except UserError as error:
            self._fail([choice.handle], error)
            return
        except Exception as error:
            # Whatever is wrong with this request's sampling or text is no matter of the others.
            logger.exception("sampling failed")
            self._fail([choice.handle], _engine_error(error, "the next token could not be chosen"))
            return
        if event.finish_reason is None:
            choice.handle.put(event)
            if choice.handle.backlog > MAX_BACKLOG * choice.handle.choices:
                self.cancel(choice.handle)
            return
        self._end(choice, event)
        self.stats.request_time.observe(now - choice.arrived)
        self.stats.generation_length.observe(choice.num_output)

    def _advance(self, item: Work[Choice], logits: Logits, now: float) -> Event:
        """Sample the next token of one sequence, and say what is new of it."""
        choice = item.sequence
        request = choice.request
        if choice.pooler is not None:
            vector = choice.pooler.add(logits, item.start, last=choice.computed == len(choice.tokens))
            return Event(choice.position, "", 0, None if vector is None else "stop", vector=vector)
        prompt = _prompt_logprobs(item, logits) if request.prompt_logprobs else ()
        if choice.computed < len(choice.tokens):
            return Event(choice.position, "", 0, None, None, prompt)
        if len(choice.tokens) >= choice.limit:
            return Event(choice.position, "", 0, "length", None, prompt)
        row = logits[-1]
        token = choice.sampler.sample(row)
        details = None if request.logprobs is None else logprobs(row, token, request.logprobs)
        reason = choice.append(token, choice.ends)
        text = ""
        if reason != "stop" or request.sampling.include_stop_str_in_output:
            text = choice.text.push(token, check=choice.num_output > request.sampling.min_tokens)
        if choice.text.stopped or choice.sampler.finished:
            reason = "stop"
        if reason is not None:
            text += choice.text.flush()
        self._note_token(choice, now)
        return Event(choice.position, text, 1, reason, details, prompt)

    def _note_token(self, choice: Choice, now: float) -> None:
        self.stats.generation_tokens += 1
        if choice.last_token is None:
            self.stats.first_token_time.observe(now - choice.arrived)
        else:
            self.stats.inter_token_time.observe(now - choice.last_token)
        choice.last_token = now

    def _failed(self, choices: Iterable[Choice], error: Exception) -> None:
        """A step failed: end the requests that were in it."""
        logger.error("a step of the engine failed", exc_info=error)
        self._failures += 1
        self.stats.failed_steps += 1
        self._fail({choice.handle for choice in choices}, _engine_error(error, "a step of the engine failed"))

    def _fail(self, handles: Iterable[Handle], error: LlmcError) -> None:
        with self._lock:
            for handle in handles:
                for choice in list(self._active.get(handle, ())):
                    self._end(choice, Event(choice.position, "", 0, "error", error=error))

    def _end(self, choice: Choice, event: Event) -> None:
        reason = event.finish_reason or "error"
        with self._lock:
            self._scheduler.finish(choice, reason)
            self.stats.finished[reason] += 1
            choices = self._active[choice.handle]
            choices.remove(choice)
            if not choices:
                del self._active[choice.handle]
                self._wake.notify_all()
        choice.handle.put(event)


def _chunk(item: Work[Choice]) -> Chunk:
    choice, end = item.sequence, item.start + item.length
    request = choice.request
    states = request.pooling in ("mean", "last")
    return Chunk(
        choice.id, item.start, np.array(choice.tokens[item.start : end], np.int64), item.logits, states, request.adapter
    )


def _prompt_logprobs(item: Work[Choice], logits: Logits) -> tuple[TokenLogprobs, ...]:
    """Of the prompt tokens that the rows of this chunk foretell and that were not reported yet."""
    choice = item.sequence
    first = item.start + item.length - len(logits) + 1
    found = []
    for position in range(max(first, choice.reported + 1), min(first + len(logits), choice.num_prompt)):
        found.append(logprobs(logits[position - first], choice.tokens[position], choice.request.logprobs or 0))
        choice.reported = position
    return tuple(found)


def _engine_error(error: Exception, what: str) -> LlmcError:
    """What the client is told: llmc's own words, or no more than the kind of anything else."""
    return EngineError(f"{what}: {error if isinstance(error, LlmcError) else type(error).__name__}")


def _refusal(error: LlmcError) -> str:
    kinds: dict[type[LlmcError], str] = {
        OverloadedError: "queue_full",
        DrainingError: "draining",
        EngineError: "engine",
    }
    return kinds.get(type(error), "invalid")
