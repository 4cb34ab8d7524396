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

from llmc.errors import DrainingError, EngineError, LlmcError, UserError
from llmc.log import logger
from llmc.runtime import Chunk, Limits, Logits, Runner
from llmc.serve import invariance
from llmc.serve.choice import Choice, prompt_logprobs
from llmc.serve.failures import Health, engine_error, refusal
from llmc.serve.grammar import Grammars
from llmc.serve.handle import Event, Handle
from llmc.serve.pooling import check_kind
from llmc.serve.request import Request
from llmc.serve.sampler import logprobs
from llmc.serve.scheduler import Budget, Scheduler, Work
from llmc.serve.speculate import Speculation
from llmc.serve.stats import Stats
from llmc.serve.stream import StopStrings, TextStream, Vocabulary
from llmc.tokenizer import Tokenizer

# Tokens computed in a step: large enough to keep matrix products busy, small enough for streams not to stall.
MAX_STEP_TOKENS = 128
MAX_QUEUE = 128
# A reader this far behind has stopped reading.
MAX_BACKLOG = 4096
UNHEALTHY_AFTER = 3
GIVE_UP_SECONDS = 5.0
IDLE_SECONDS = 60.0


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
        max_step_tokens: int | None = None,
        max_queue: int = MAX_QUEUE,
        max_queued_tokens: int | None = None,
        deterministic: bool = False,
        speculation: Speculation | None = None,
        stuck_after: float = 120.0,
    ) -> None:
        """Take over `runner`, which nobody else may use from now on; `start` begins serving.

        Args:
            max_step_tokens: Tokens computed in one step, over all sequences.
            max_queue: Sequences in the queue before requests are refused.
            max_queued_tokens: Tokens of all of these before requests are refused.
            deterministic: The same tokens whatever else runs; the runner must have been opened for it, too. See
                llmc/serve/invariance.py.
            speculation: Drafts tokens; taken over like the runner.
            stuck_after: Seconds after which a step that has not come back means that the engine is stuck.

        Raises:
            UserError: Options that cannot be kept together.
            EngineError: This runner cannot be deterministic.
        """
        self.limits: Limits = runner.limits
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self.grammars = Grammars(tokenizer, runner.limits.vocab_size)
        self.stats = Stats()
        block = invariance.BLOCK if deterministic else None
        self.budget = Budget(
            max_sequences=self.limits.max_sequences,
            max_length=self.limits.max_length,
            cache_tokens=self.limits.cache_tokens,
            max_step_tokens=max_step_tokens or max(MAX_STEP_TOKENS, self.limits.max_sequences + (block or 0)),
            max_queue=max_queue,
            max_queued_tokens=max_queued_tokens,
            block=block,
        )
        if deterministic:
            invariance.check(runner, drafting=speculation is not None)
        self._runner = runner
        self._speculation = speculation
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
        if self.budget.block is not None:
            wanted = wanted[: choice.num_prompt]
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
        if self._speculation is not None:
            self._speculation.forget(choice.id)

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
                self.stats.refused[refusal(error)] += 1
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
            if self._speculation is not None:
                self._speculation.drafter.close()

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
        end = self.limits.prefix_end
        if end is not None and end not in request.prompt:
            raise UserError(f"the prompt has no token {end}, behind which this model answers", param="prompt")
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
        end = self.limits.prefix_end
        for request, limit in zip(requests, limits, strict=True):
            sampling, uncut = request.sampling, 0 if end is None else request.prompt.index(end) + 1
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
                choices[-1].uncut = uncut
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
        self._step_began = started = time.monotonic()
        self._draft(work)
        chunks = [_chunk(item) for item in work]
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

    def _draft(self, work: list[Work[Choice]]) -> None:
        """Let sequences that decode try some tokens more, where they are few enough."""
        speculation = self._speculation
        if speculation is None or len(work) > speculation.together:
            return
        room = self._scheduler.room(work)
        for item in work:
            choice = item.sequence
            if item.length == item.logits == 1 and choice.pooler is None:
                most = min(room, choice.limit - len(choice.tokens) - 1)
                choice.draft = speculation.draft(choice.id, choice.tokens, most, choice.request.cache_salt)
                room -= len(choice.draft)

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
        """The next token, and those after it as long as they are what was drafted."""
        choice, draft = item.sequence, item.sequence.draft
        choice.draft, accepted = (), 0
        own = len(logits) - len(draft)
        goes_on = self._emit(item, logits[:own], now)
        while goes_on and accepted < len(draft) and choice.tokens[-1] == draft[accepted]:
            self.stats.accepted_at[accepted] += 1
            accepted += 1
            choice.computed += 1
            goes_on = self._emit(item, logits[own + accepted - 1 :][:1], now)
        if draft:
            self._note_draft(choice, len(draft), accepted, goes_on)

    def _note_draft(self, choice: Choice, drafted: int, accepted: int, goes_on: bool) -> None:
        self.stats.drafts += 1
        self.stats.draft_tokens += drafted
        self.stats.accepted_tokens += accepted
        if goes_on and self._speculation is not None:
            self._runner.truncate(choice.id, choice.computed)
            self._speculation.learn(choice.id, drafted, accepted)

    def _emit(self, item: Work[Choice], logits: Logits, now: float) -> bool:
        """Say what is new of one sequence, and whether it goes on."""
        choice = item.sequence
        try:
            event = self._advance(item, logits, now)
        except UserError as error:
            self._fail([choice.handle], error)
            return False
        except Exception as error:
            # Whatever is wrong with this request's sampling or text is no matter of the others.
            logger.exception("sampling failed")
            self._fail([choice.handle], engine_error(error, "the next token could not be chosen"))
            return False
        if event.finish_reason is None:
            choice.handle.put(event)
            if choice.handle.backlog > MAX_BACKLOG * choice.handle.choices:
                self.cancel(choice.handle)
            return True
        self._end(choice, event)
        self.stats.request_time.observe(now - choice.arrived)
        self.stats.generation_length.observe(choice.num_output)
        return False

    def _advance(self, item: Work[Choice], logits: Logits, now: float) -> Event:
        """Sample the next token of one sequence, and say what is new of it."""
        choice = item.sequence
        request = choice.request
        if choice.pooler is not None:
            vector = choice.pooler.add(logits, item.start, last=choice.computed == len(choice.tokens))
            return Event(choice.position, "", 0, None if vector is None else "stop", vector=vector)
        prompt = prompt_logprobs(item, logits) if request.prompt_logprobs else ()
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
        self._fail({choice.handle for choice in choices}, engine_error(error, "a step of the engine failed"))

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
    tokens = np.array([*choice.tokens[item.start : end], *choice.draft], np.int64)
    states = request.pooling in ("mean", "last")
    return Chunk(choice.id, item.start, tokens, item.logits + len(choice.draft), states, request.adapter)
