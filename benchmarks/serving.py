"""Run ``vllm serve`` as a subprocess and look at it from outside: chat API, /metrics, log.

Nothing here knows about compaction, and nothing imports vLLM: what is measured is what any client
and any Prometheus would see.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families

HOST = "127.0.0.1"
#: Seconds until a server has to be ready, may take for one answer, and has for shutting down.
START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 600, 1800, 20

T = TypeVar("T")
Labels = frozenset[tuple[str, str]]


class ServerError(RuntimeError):
    """The server did not start, died, or refused a request; the message can be shown as it is."""


class Unreachable(ServerError):
    """There was no answer."""


@dataclass(frozen=True)
class Metrics:
    """One reading of ``/metrics``, or the difference between two."""

    samples: Mapping[tuple[str, Labels], float]

    @classmethod
    def parse(cls, text: str) -> Metrics:
        """From the Prometheus text format."""
        return cls(
            {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
        )

    def since(self, earlier: Metrics) -> Metrics:
        """What was added since the earlier reading (counters and histograms)."""
        return Metrics({k: v - earlier.samples.get(k, 0.0) for k, v in self.samples.items()})

    def total(self, name: str) -> float:
        """Sum over all label values.

        Raises:
            ServerError: the server has no such metric.
        """
        found = [value for (sample, _), value in self.samples.items() if sample == name]
        if not found:
            raise ServerError(f"the server's /metrics has no {name}")
        return sum(found)

    def mean(self, histogram: str) -> float:
        """Mean of a histogram's observations; NaN without any."""
        count = self.total(f"{histogram}_count")
        return self.total(f"{histogram}_sum") / count if count else float("nan")

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Values that are not zero, by the value of one label."""
        totals: dict[str, float] = {}
        for (sample, labels), value in self.samples.items():
            if sample == name and value:
                key = dict(labels).get(label, "")
                totals[key] = totals.get(key, 0.0) + value
        return totals


@dataclass(frozen=True)
class Completion:
    """An answer of the chat API, with the token counts of its ``usage``."""

    request_id: str
    text: str
    prompt_tokens: int
    completion_tokens: int


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """``vllm serve`` as a context manager: started on entry, always stopped on exit.

    Args:
        model: folder or name, as on the command line; also the name that requests use.
        flags: further arguments of ``vllm serve``.
        log: file that takes its output.
        env: variables to set besides the caller's, which win.
        port: loopback port; a free one by default.
    """

    def __init__(
        self,
        model: str,
        flags: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.model = model
        self.log = log
        self.port = port or free_port()
        self.env = {k: os.environ.get(k, v) for k, v in (env or {}).items()}
        executable = Path(sys.executable).parent / "vllm"
        if executable.is_relative_to(Path.cwd()):
            executable = executable.relative_to(Path.cwd())
        self.command = [
            *(str(executable), "serve", model, *flags),
            *("--host", HOST, "--port", str(self.port)),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._client = httpx.Client(base_url=f"http://{HOST}:{self.port}", timeout=ANSWER_SECONDS)

    @property
    def pid(self) -> int:
        """Of ``vllm serve``, whose children are all other processes of the server."""
        assert self._process is not None, "not started"
        return self._process.pid

    def command_line(self) -> str:
        """The command with its variables, ready to be pasted into a shell, a flag per line."""
        lines = [" ".join(f"{k}={shlex.quote(v)}" for k, v in self.env.items())]
        for word in self.command:
            if word.startswith("--") or not lines[-1]:
                lines.append(shlex.quote(word))
            else:
                lines[-1] += " " + shlex.quote(word)
        return " \\\n  ".join(line for line in lines if line)

    def __enter__(self) -> Self:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, self.port)) == 0:
                raise ServerError(f"port {self.port} is in use")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            # A session of its own: Ctrl-C reaches us alone, and we stop the server in order.
            self._process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_until_ready(self, on_wait: Callable[[float], None] = lambda seconds: None) -> float:
        """Wait for ``/health``; calls ``on_wait`` with the seconds so far, returns them at the end.

        Raises:
            ServerError: it died or took too long; with the end of its log.
        """
        started = time.monotonic()
        while True:
            seconds = time.monotonic() - started
            on_wait(seconds)
            self._check_alive()
            with suppress(httpx.TransportError):
                if self._client.get("/health", timeout=5).is_success:
                    return seconds
            if seconds > START_SECONDS:
                raise ServerError(
                    f"the server was not ready after {seconds:.0f} s\n{self.log_tail()}"
                )
            time.sleep(0.5)

    def stop(self) -> None:
        """Ask it to shut down, then make sure that it and its engine processes are gone."""
        self._client.close()
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int,
        options: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> Completion:
        """One greedy chat completion.

        Args:
            options: ``vllm_xargs`` of the request.
            cache_salt: requests with different salts share no cached prefix.

        Raises:
            ServerError: the request was refused, or the server died over it.
        """
        body = chat_body(self.model, messages, max_tokens, options, cache_salt)
        body["temperature"] = 0
        reply = self._request("POST", "/v1/chat/completions", json=body).json()
        return Completion(
            reply["id"],
            (reply["choices"][0]["message"]["content"] or "").strip(),
            reply["usage"]["prompt_tokens"],
            reply["usage"]["completion_tokens"],
        )

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What another endpoint answers.

        Raises:
            ServerError: the request was refused, or the server died over it.
        """
        found: dict[str, Any] = self._request("POST", path, json=body).json()
        return found

    def delete(self, path: str) -> None:
        """Have something deleted; the same errors."""
        self._request("DELETE", path)

    def metrics(self) -> Metrics:
        """Read ``/metrics``."""
        return Metrics.parse(self._request("GET", "/metrics").text)

    def log_lines(self, phrase: str) -> list[str]:
        """Lines of the log that contain a phrase."""
        text = self.log.read_text(errors="replace")
        return [line for line in text.splitlines() if phrase in line]

    def log_tail(self, lines: int = 30) -> str:
        """The end of the log, under its name."""
        text = self.log.read_text(errors="replace")
        return "\n".join([f"The end of {self.log}:", *text.splitlines()[-lines:]])

    def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            return request(self._client, method, path, **kwargs)
        except Unreachable as error:
            self._check_alive()
            raise ServerError(f"{error}\n{self.log_tail()}") from None

    def _check_alive(self) -> None:
        if self._process is not None and (code := self._process.poll()) is not None:
            raise ServerError(f"the server ended with exit status {code}\n{self.log_tail()}")


def chat_body(
    model: str,
    messages: Sequence[Mapping[str, str]],
    max_tokens: int,
    options: Mapping[str, Any] | None,
    cache_salt: str | None,
) -> dict[str, Any]:
    """A request to the chat API, with what vLLM adds to it.

    Args:
        options: ``vllm_xargs`` of the request.
        cache_salt: requests with different salts share no cached prefix.
    """
    body: dict[str, Any] = {"model": model, "messages": list(messages), "max_tokens": max_tokens}
    if options:
        body["vllm_xargs"] = dict(options)
    if cache_salt:
        body["cache_salt"] = cache_salt
    return body


def request(client: httpx.Client, method: str, path: str, **kwargs: Any) -> httpx.Response:
    """Send a request.

    Raises:
        Unreachable: there was no answer.
        ServerError: it was refused.
    """
    try:
        response = client.request(method, path, **kwargs)
    except httpx.TransportError as error:
        raise Unreachable(f"{method} {path}: {error!r}") from None
    if not response.is_success:
        raise ServerError(f"{method} {path}: HTTP {response.status_code}: {response.text}")
    return response


def concurrently(calls: Sequence[Callable[[], T]], workers: int) -> Iterator[tuple[int, T]]:
    """Run calls in threads, in order of their start; yields (index, result) as they finish.

    The first exception, and closing the iterator, give up the calls that have not started.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(call): index for index, call in enumerate(calls)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # Without waiting: after Ctrl-C the threads end when the server does.
        pool.shutdown(wait=False, cancel_futures=True)
