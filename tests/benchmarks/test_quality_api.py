"""The datasets' command against a small server that speaks enough of the OpenAI API."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.quality.__main__ import app
from benchmarks.quality.chat import Sampling
from benchmarks.quality.datasets import Sample
from benchmarks.quality.prompts import SYSTEM
from benchmarks.quality.question_answering import Setup, exact_tokens, serve_arguments

FREED = 4  # blocks per compacted sequence
PROMPT_TOKENS = 150  # with an answer of 11 tokens 10 blocks of 16


@dataclass
class FakeServer:
    """Answers B with the full cache, and A when compacted to a tenth or less."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    freed: int = 0
    has_metrics: bool = True
    answer_tokens: int = 11

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(body)
        options = body.get("vllm_xargs", {})
        compacted = "kv_compaction_ratio" in options
        self.freed += FREED if compacted else 0
        letter = "A" if compacted and options["kv_compaction_ratio"] <= 0.1 else "B"
        return {
            "choices": [{"message": {"content": f"Hm.\n{letter}"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": self.answer_tokens},
        }

    def metrics(self) -> str:
        prefix = "vllm:kv_compaction"
        counts = {"blocks_freed": self.freed, "compactions": self.freed // FREED, "failures": 0}
        return "".join(
            f"# TYPE {prefix}_{name} counter\n{prefix}_{name}_total {value}\n"
            for name, value in counts.items()
        )


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["model"] != "fake":
                self._send(404, json.dumps({"error": "no such model"}))
            else:
                self._send(200, json.dumps(fake.reply(body)))

        def do_GET(self) -> None:
            self._send(200 if fake.has_metrics else 404, fake.metrics())

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield fake
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize(("tokens", "early"), [(4, "1.0"), (5, "0.0")])
def test_answers_that_the_full_cache_may_have_decided_are_counted(server, data, tokens, early):
    server.answer_tokens = tokens
    assert _invoke(server, data).exit_code == 0
    assert [row["early"] for row in _rows(data)] == ["0.0", early, early]


def test_an_answer_begun_for_the_model_is_continued(server, tmp_path):
    record = {"input": "A text.\nWhat?", "outputs": ["B"], "answer_prefix": "It is"}
    path = tmp_path / "qa_1.jsonl"
    path.write_text(json.dumps(record))
    command = f"ruler --data {path} --model fake --url {server.url} --ratio 5x --output"
    for flags, role in (([], "user"), (["--answer-prefix"], "assistant")):
        server.requests.clear()
        out = str(tmp_path / "out")
        result = CliRunner().invoke(app, [*command.split(), out, *flags])
        assert result.exit_code == 0, result.output
        sent = server.requests[-1]
        assert sent["messages"][-1]["role"] == role
        assert sent.get("continue_final_message", False) == (role == "assistant")
        assert "| qa_1 | 5x | 1 | 100.0% |" in (tmp_path / "out.md").read_text()


@pytest.fixture
def data(tmp_path):
    questions = [
        {
            "question": f"Why {number}?",
            "question_unique_id": f"q{number}",
            "options": ["because", "so", "who knows", "never"],
            "gold_label": 2,
        }
        for number in range(3)
    ]
    path = tmp_path / "dev"
    path.write_text(json.dumps({"article": "An article.", "questions": questions}))
    return path


def _invoke(server, data, *arguments, model="fake"):
    fixed = ["quality", "--data", str(data), "--model", model, "--url", server.url]
    output = ["--output", str(data.parent / "out"), "--ratio", "5x,20x"]
    return CliRunner().invoke(app, [*fixed, *output, *arguments])


def _rows(data):
    lines = (data.parent / "out.csv").read_text().splitlines()
    return [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]


def test_accuracy_and_memory_of_every_ratio(server, data):
    result = _invoke(server, data)
    assert result.exit_code == 0, result.output
    rows = _rows(data)
    assert [float(row["ratio"]) for row in rows] == [1.0, 0.2, 0.05]
    assert [float(row["accuracy"]) for row in rows] == [1.0, 1.0, 0.0]
    assert [float(row["memory"]) for row in rows] == pytest.approx([1.0, 0.6, 0.6])
    assert [float(row["compactions"]) for row in rows] == [0, 3, 3]
    table = (data.parent / "out.md").read_text()
    assert "| quality | 20x | 3 | 0.0% | 100.0% | 0.0% | 60.0% | 3 |" in table


def test_what_is_sent(server, data):
    assert _invoke(server, data, "--greedy", "--no-thinking", "--seed", "5").exit_code == 0
    first, last = server.requests[0], server.requests[-1]
    assert [m["role"] for m in first["messages"]] == ["system", "user", "user"]
    assert first["temperature"] == 0 and first["seed"] == 5 and first["max_tokens"] == 2048
    assert first["chat_template_kwargs"] == {"enable_thinking": False}
    assert first["vllm_xargs"] == {"kv_compaction": "off"}
    assert last["vllm_xargs"] == {"kv_compaction_ratio": 0.05}
    assert first["cache_salt"] != last["cache_salt"]

    server.requests.clear()
    assert _invoke(server, data, "--one-turn", "--limit", "1").exit_code == 0
    assert len(server.requests) == 3
    assert [m["role"] for m in server.requests[0]["messages"]] == ["system", "user"]
    assert "temperature" not in server.requests[0], "the model's generation config is to decide"


def test_answers_are_kept_and_not_asked_for_again(server, data):
    assert _invoke(server, data, "--limit", "2").exit_code == 0
    assert len(server.requests) == 6
    assert _invoke(server, data).exit_code == 0
    assert len(server.requests) == 9
    assert _rows(data)[1]["memory"] == "nan", "the server's counts are of one answer only"
    assert _invoke(server, data, "--seed", "1").exit_code == 0
    assert len(server.requests) == 18, "another seed gives other answers"
    assert _invoke(server, data, "--fresh").exit_code == 0
    assert len(server.requests) == 27


def test_a_server_without_metrics_will_do(server, data):
    server.has_metrics = False
    assert _invoke(server, data).exit_code == 0
    assert _rows(data)[1]["memory"] == "nan" and _rows(data)[1]["accuracy"] == "1.0"


def test_refusals_are_shown(server, data):
    result = _invoke(server, data, model="other")
    assert result.exit_code == 1 and "no such model" in result.output
    data.write_text('{"article": "x"}\n')
    result = _invoke(server, data)
    assert result.exit_code == 1 and "questions" in result.output


def _tokenize(chat):
    """A word per token, roles included, and a generation prompt."""
    words = [word for m in chat for word in (f"<{m['role']}>", *m["content"].split(), "</>")]
    return [hash(word) for word in [*words, "<assistant>"]]


def test_template_and_question_stay_exact(tmp_path):
    sample = Sample("1", "one two three " * 200, "What is it ?", answers=("x",))
    setup = Setup(
        model="m",
        ratios=[0.1, 0.02],
        config={"method": "omp"},
        sampling=Sampling(),
        max_tokens=100,
        one_turn=False,
        answer_prefix=False,
        concurrency=1,
        block_size=32,
        output=tmp_path,
        url=None,
        serve_flags=["--dtype", "float32"],
    )
    before, behind = exact_tokens(_tokenize, sample, setup)
    assert before == len(["<system>", *SYSTEM.split(), "</>", "<user>"])
    assert behind == len(["</>", "<user>", *["What", "is", "it", "?"], "</>", "<assistant>"])
    flags = serve_arguments([sample], _tokenize, setup)
    config = json.loads(flags[flags.index("--kv-compaction-config") + 1])
    assert config["protected_tokens"] == before and config["recent_tokens"] == behind
    assert config["method"] == "omp"
    threshold = int(flags[flags.index("--kv-compaction-threshold") + 1])
    assert threshold == before + 600
    assert int(flags[flags.index("--max-model-len") + 1]) >= before + 600 + behind + 100
    assert flags[flags.index("--kv-compaction-ratio") + 1] == "0.02"
    assert flags[-2:] == ["--dtype", "float32"]
