"""JSON over HTTP to one server: bounded concurrency, and every request asked again until it has a usable answer.

    asked again     no connection, a timeout, 408, 425, 429 and 5xx, for `patience` seconds; `Retry-After` is respected
                    an answer that is not JSON or not of the expected form, `MOST_UNUSABLE` times
    an error        any other status, such as 400: the same request would fail again

Waits double from half a second to half a minute, each shortened at random by up to a half, so that requests that failed
together do not come back together. If a server stays away, a warning says so once. One thread owns the event loop and
the connections; requests are futures.

The API key is sent as a header and occurs nowhere else: it is cut out of what a server says in an error.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.errors import ModelError
from pipeline.teacher.engines.interface import Usage

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
logger = logging.getLogger("distill")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
REPORTED_AFTER_S = 5.0
MOST_UNUSABLE = 8
"""Answers to one request that cannot be used. If one in twenty is spoilt by chance, eight in a row never are."""
AGAIN = {408, 425, 429, 500, 502, 503, 504, 529}
SHOWN = 300  # characters of what a server says


class UnusableAnswer(Exception):
    """An answer is not of the expected form. The message says what was found and what was expected.

    Attributes:
        advice: what would help, as a field of `Advice`.
    """

    def __init__(self, message: str, advice: str | None = None) -> None:
        super().__init__(message)
        self.advice = advice


class Unusable(ModelError):
    """Several answers to one request could not be used.

    Attributes:
        advice: as in `UnusableAnswer`.
    """

    def __init__(self, message: str, advice: str | None) -> None:
        super().__init__(message)
        self.advice = advice


class Unwanted(ModelError):
    """An answer is of the expected form, but cannot be stored. With another seed there may be one that can."""


class Refused(ModelError):
    """The server answers with an error that will not pass.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Query(Generic[T]):
    """A request.

    Attributes:
        path: below the root of the server.
        read: makes the result of an answer, or the next request on the way to it. Raises UnusableAnswer, or ModelError
            if no other answer would do, or only one to another request (`Unwanted`).
    """

    path: str
    body: dict[str, Any]
    read: Callable[[Any], T | Query[T]]


class _Again(Exception):
    """Worth another attempt, after at least `after` seconds."""

    def __init__(self, problem: str, *, after: float = 0.0, unusable: bool = False, advice: str | None = None) -> None:
        super().__init__(problem)
        self.after, self.unusable, self.advice = after, unusable, advice


class HttpClient:
    """Requests to one server.

    Args:
        root: URL that all paths are below.
        timeout: seconds for one attempt.
        patience: seconds from the first failure of a request until it is given up.
        key_hint: what to do if the server wants an API key, for the error.

    Attributes:
        usage: tokens of all answers so far, rejected ones included; only if the server counts them.
    """

    def __init__(
        self,
        root: str,
        *,
        api_key: str | None = None,
        key_hint: str = "",
        concurrency: int = 16,
        timeout: float = 600.0,
        patience: float = 600.0,
    ) -> None:
        import httpx2

        self.root, self.patience = root, patience
        self.usage = Usage()
        self._key, self._key_hint = api_key, key_hint
        self._reported = False  # that the server does not work, since it last did
        self._client = httpx2.AsyncClient(
            base_url=root,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 30.0), pool=None),
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )
        self._concurrency, self._slots = concurrency, asyncio.Semaphore(concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()

    def limit(self, concurrency: int) -> None:
        """Lowers the number of requests that are under way at once, while none is."""
        self._slots = asyncio.Semaphore(min(concurrency, self._concurrency))

    def get(self, path: str) -> Any:
        """The JSON at `path`; None if the server has nothing there. Raises: ModelError."""
        try:
            return self._start(self._ask("GET", Query[Any](path, {}, lambda answer: answer), MOST_UNUSABLE)).result()
        except Refused as error:
            if error.status in (404, 405):
                return None
            raise

    def post(self, query: Query[T], *, most_unusable: int = MOST_UNUSABLE) -> Future[T]:
        """Starts a request, then the requests that its answers lead to, one at a time. The client's thread reads
        answers.

        Args:
            most_unusable: unusable answers after which a request is given up.

        The future raises: Refused, Unusable, ModelError.
        """
        return self._start(self._ask("POST", query, most_unusable))

    def _start(self, request: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(request, self._loop)

    def close(self) -> None:
        """Drops what is unanswered."""

        async def finish() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._client.aclose()

        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _ask(self, method: str, query: Query[T], most_unusable: int) -> T:
        async with self._slots:
            while True:
                found = await self._answer(method, query, most_unusable)
                if not isinstance(found, Query):
                    return found
                query = found

    async def _answer(self, method: str, query: Query[T], most_unusable: int) -> T | Query[T]:
        failing_since: float | None = None
        unusable, wait = 0, FIRST_WAIT_S
        while True:
            try:
                found = await self._once(method, query)
                self._reported = False
                return found
            except _Again as problem:
                now = time.monotonic()
                failing_since = now if failing_since is None else failing_since
                unusable += problem.unusable
                pause = max(problem.after, wait * random.uniform(0.5, 1.0))
                if unusable >= most_unusable:
                    text = f"{self.root}{query.path}: {problem}, in {unusable} answers to the same request."
                    raise Unusable(text, problem.advice) from problem
                if problem.after > self.patience:
                    raise ModelError(
                        f"{self.root}{query.path}: {problem}. The server asks to wait for {math.ceil(problem.after):,} "
                        f"seconds, longer than `server_patience` {self.patience:g}. Complete shards are kept: run the "
                        "same command again then."
                    ) from problem
                if now + pause - failing_since > self.patience:
                    raise ModelError(
                        f"{self.root}{query.path}: {problem}, for {now - failing_since:.0f} seconds (`server_patience` "
                        f"{self.patience:g}). Complete shards are kept: once the server works, run the same "
                        "command again."
                    ) from problem
                if not self._reported and now + pause - failing_since > REPORTED_AFTER_S:
                    self._reported = True
                    logger.warning(
                        "%s%s: %s. Asking again for up to %g seconds, as the server may be starting.",
                        *(self.root, query.path, problem, self.patience),
                    )
            await asyncio.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT_S)

    async def _once(self, method: str, query: Query[T]) -> T | Query[T]:
        import httpx2

        try:
            response = await self._client.request(method, query.path, json=query.body if method == "POST" else None)
        except httpx2.TransportError as error:
            raise _Again(self._clean(f"no answer: {str(error) or type(error).__name__}")) from error
        except httpx2.DecodingError as error:
            raise _Again(f"the answer is damaged: {error}", unusable=True) from error
        if response.status_code in AGAIN:
            said = self._said(response)
            raise _Again(f"status {response.status_code}{said}", after=_retry_after(response.headers))
        if not response.is_success:
            raise self._refused(query.path, response)
        try:
            answer = json.loads(response.content)
            self._count(answer)
            return query.read(answer)
        except UnusableAnswer as error:
            raise _Again(self._clean(str(error)), unusable=True, advice=error.advice) from error
        except ValueError as error:
            raise _Again(f"the answer is not JSON: {error}", unusable=True) from error

    def _count(self, answer: Any) -> None:
        found = answer.get("usage") if isinstance(answer, dict) else None
        if isinstance(found, dict):
            sent, received = found.get("prompt_tokens"), found.get("completion_tokens")
            self.usage.prompt_tokens += sent if isinstance(sent, int) else 0
            self.usage.completion_tokens += received if isinstance(received, int) else 0

    def _refused(self, path: str, response: httpx2.Response) -> Refused:
        status, said = response.status_code, self._said(response)
        hint = f" {self._key_hint}" if status in (401, 403) else ""
        return Refused(f"{self.root}{path}: the server refuses with status {status}{said}.{hint}", status)

    def _said(self, response: httpx2.Response) -> str:
        try:
            found = json.loads(response.content)
            while isinstance(found, dict):
                found = next(each for each in (found.get("error"), found.get("message"), found.get("detail")) if each)
        except (ValueError, StopIteration):
            found = response.text
        text = self._clean(" ".join(str(found).split()))[:SHOWN].rstrip(". ")  # a key that is cut is not recognised
        return f": {text}" if text else ""

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text


def _retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait for: given as a number or as a date."""
    text = headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0
