"""Each example as it stands, against a real engine; and what ``deploy/`` asks a running server.

Documents and questions are those of the bundled model, whose answers can be told right from wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoConfig

from benchmarks.demo import Density, make_tasks
from benchmarks.serving import Server, free_port
from tests.docs.deployed import metrics_queried
from tests.docs.pages import ROOT, blocks
from tests.engine.driver import environment_of_servers

pytestmark = [pytest.mark.engine, pytest.mark.slow]

EXAMPLES = ROOT / "examples"
MODEL = ROOT / "benchmarks" / "recall" / "model"
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "vllm_am"}
ENGINE = [
    *("--max-model-len", "4096"),
    *("--block-size", "32"),
    *("--dtype", "float32"),
    "--enforce-eager",
]
TASKS = make_tasks(1, 2000, Density.SPARSE, 6)
DOCUMENT = TASKS[0].document.text
#: Facts: their answers are the values themselves.
FACTS = [task.question for task in TASKS if task.question.kind == "recall"][:4]


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("document") / "document.txt"
    path.write_text(DOCUMENT)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    options = {"step_ms": 1000, "prefix_folder": str(folder)}
    flags = [
        *("--kv-compaction", "attention-matching"),
        *("--kv-compaction-ratio", "10x"),
        *("--kv-compaction-threshold", "1000"),
        *("--kv-compaction-config", json.dumps(options)),
        *("--num-gpu-blocks-override", "401"),
        "--enable-prompt-tokens-details",
        *ENGINE,
    ]
    with Server(str(MODEL), flags, folder / "log", ENVIRONMENT) as running:
        running.wait_until_ready()
        yield running


def run(*words: str | Path, url: str = "", cwd: Path = ROOT, text: str = "", **more: str) -> str:
    """Output of an example, which must succeed."""
    environment = environment_of_servers()
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= {"URL": url, **more}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def url_of(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def compactions(server: Server) -> int:
    return int(server.metrics().total("vllm:kv_compaction_compactions_total"))


def test_every_example_has_a_test():
    tested = Path(__file__).read_text()
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")]
    assert len(files) == 9
    assert [name for name in files if f'"{name}"' not in tested] == []


def test_one_request(server, document):
    before = compactions(server)
    answer = json.loads(
        run(EXAMPLES / "one_request.sh", document, FACTS[0].text, url=url_of(server))
    )
    assert FACTS[0].value in answer["choices"][0]["message"]["content"]
    assert compactions(server) == before + 1


def test_readme_shows_a_request_that_works(server):
    [block] = blocks("bash")
    answer = run("bash", "-ec", block.text.replace("localhost:8000", f"127.0.0.1:{server.port}"))
    assert json.loads(answer)["choices"]


def test_openai_client(server, document):
    words = ("--url", url_of(server), "--document", document, FACTS[1].text)
    assert FACTS[1].value in run(sys.executable, EXAMPLES / "openai_client.py", *words)


def test_many_questions(server, document):
    before = compactions(server)
    words = ("--url", url_of(server), "--document", document)
    asked = [question.text for question in FACTS]
    answers = run(sys.executable, EXAMPLES / "many_questions.py", *words, *asked).splitlines()
    assert len(answers) == 2 * len(FACTS)
    cached = [int(line.rpartition("[")[2].split()[0].replace(",", "")) for line in answers[::2]]
    assert all(tokens > 1500 for tokens in cached[1:]), cached
    assert compactions(server) == before + 1


def test_endless_chat(server):
    """Turns of 600 tokens: the threshold is crossed by the history alone."""
    words = DOCUMENT.split()
    turns = [" ".join(words[i : i + 400]) for i in range(0, 1600, 400)]
    before = compactions(server)
    said = run(
        *(sys.executable, EXAMPLES / "endless_chat.py", "--url", url_of(server)),
        text="\n".join(turns),
    )
    assert said.count("tokens of history") == len(turns)
    assert compactions(server) > before


def test_named_prefixes(server, document):
    *_, listed, saved, dropped, loaded = run(
        EXAMPLES / "named_prefixes.sh", document, url=url_of(server)
    ).splitlines()
    assert "contract" in listed and "contract" in saved and "contract" in loaded, dropped
    httpx.delete(f"{url_of(server)}/v1/kv_compaction/prefixes/contract")


def test_save_and_preload(document, tmp_path):
    """``vllm-am compact``, then a server that loads the file before it is ready."""
    said = run(
        *(EXAMPLES / "save_and_preload.sh", MODEL, document, FACTS[2].text),
        cwd=tmp_path,
        PORT=str(free_port()),
        FLAGS=" ".join(ENGINE),
        **ENVIRONMENT,
    ).splitlines()
    assert any("tokens in 128 slots per head" in line for line in said)
    [answer] = [json.loads(line) for line in said if line.startswith("{")]
    assert FACTS[2].value in answer["choices"][0]["message"]["content"]
    counted = {
        line.split("{")[0]: float(line.split()[-1]) for line in said if line.startswith("vllm:")
    }
    assert counted["vllm:kv_compaction_cache_loads_total"] == 1
    assert counted["vllm:kv_compaction_cache_hit_tokens_total"] == 1952
    assert counted["vllm:kv_compaction_cache_blocks_pinned"] == 5
    # The ratio of the request is that of the file.
    assert counted["vllm:kv_compaction_compactions_total"] == 0


def test_offline_batch(document):
    words = (MODEL, document, "--question", FACTS[3].text)
    flags = ("--max-model-len", "4096", "--enforce-eager")
    said = run(sys.executable, EXAMPLES / "offline_batch.py", *words, *flags, **ENVIRONMENT)
    assert FACTS[3].value in said


def test_own_budgets(tmp_path):
    """The measurement, and a ``vllm`` that says what it was asked; servers with a file of budgets
    are in ``tests/engine/test_budgets.py``."""
    cut = " ".join(DOCUMENT.split()[:120])
    lines = [{"context": cut, "question": FACTS[0].text, "answer": FACTS[0].answer}]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "vllm").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    (programs / "vllm").chmod(0o755)
    (programs / "vllm-am").symlink_to(Path(sys.executable).parent / "vllm-am")
    said = run(
        *(EXAMPLES / "own_budgets.sh", MODEL, "documents.jsonl"),
        cwd=tmp_path,
        FLAGS="--block-size 32",
        PATH=f"{programs}:{os.environ['PATH']}",
    ).splitlines()
    model = AutoConfig.from_pretrained(MODEL)
    heads = model.num_hidden_layers * model.num_key_value_heads
    shares = json.loads((tmp_path / "budgets.json").read_text())
    assert len(shares) == heads and sum(shares.values()) == pytest.approx(1, rel=1e-3)
    assert said[said.index("serve") :] == [
        *("serve", str(MODEL), "--kv-compaction", "attention-matching"),
        *("--kv-compaction-config", '{"budgets": "budgets.json"}', "--block-size", "32"),
    ]


def test_plain_tensors():
    assert "1024 keys -> 52 per head" in run(sys.executable, EXAMPLES / "plain_tensors.py")


def test_series_of_the_dashboard_and_the_alerts_exist(server):
    """As a running server's ``/metrics`` has them."""
    text = httpx.get(f"{url_of(server)}/metrics").text
    families = list(text_string_to_metric_families(text))
    there = {sample.name for family in families for sample in family.samples}
    assert len(metrics_queried()) > 20
    assert metrics_queried() - there == set()


def test_described_metrics_are_the_server_s(server):
    from vllm_am.engine.frontend.metrics import described

    text = httpx.get(f"{url_of(server)}/metrics").text
    found = {
        (f.name + ("_total" if f.type == "counter" else ""), f.type, f.documentation)
        for f in text_string_to_metric_families(text)
        if f.name.startswith("vllm:kv_compaction_") and not f.name.endswith("_created")
    }
    assert set(described()) == found
