"""The command line, through vLLM's own parser."""

from __future__ import annotations

import pytest

from vllm_am.config import CompactionConfig

ON = ["--kv-compaction", "attention-matching"]


@pytest.fixture(scope="module")
def parser(plugin):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))


@pytest.fixture
def options(parser):
    """From command-line words to what reaches ``additional_config``."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    def parse(*words: str):
        return AsyncEngineArgs.from_cli_args(parser.parse_args(list(words))).additional_config

    return parse


@pytest.fixture
def refusal(parser, capsys):
    """The one line, below the usage, with which words are refused."""

    def parse(*words: str) -> str:
        with pytest.raises(SystemExit) as exit_status:
            parser.parse_args(list(words))
        assert exit_status.value.code == 2
        *usage, message = capsys.readouterr().err.strip().splitlines()
        assert usage[0].startswith("usage: vllm serve")
        return message.removeprefix("vllm serve: error: ")

    return parse


def test_flags_are_a_group_of_their_own_with_help(parser):
    groups = [g for g in parser._action_groups if "KV compaction" in (g.title or "")]
    assert len(groups) == 1
    actions = {a.option_strings[0]: a for a in groups[0]._group_actions}
    assert set(actions) == {
        "--kv-compaction",
        "--kv-compaction-ratio",
        "--kv-compaction-threshold",
        "--kv-compaction-cache",
        "--kv-compaction-preload",
        "--kv-compaction-config",
    }
    help_of = {flag: action.help % vars(action) for flag, action in actions.items()}
    ratio, threshold = help_of["--kv-compaction-ratio"], help_of["--kv-compaction-threshold"]
    assert "KEPT" in ratio and "50x" in ratio and "0.02" in ratio and "Default: 0.1" in ratio
    assert "4096" in threshold and "80%" in threshold and "--max-model-len" in threshold
    assert "JSON" in help_of["--kv-compaction-config"]


@pytest.mark.parametrize("words", [(), ("--kv-compaction", "none")], ids=["absent", "none"])
def test_off_leaves_additional_config_alone(options, words):
    assert not options(*words)
    assert options(*words, "--additional-config", '{"mine": 1}') == {"mine": 1}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--kv-compaction-ratio", "50x"], {"ratio": 0.02}),
        (["--kv-compaction-ratio=0.02"], {"ratio": 0.02}),
        (["--kv_compaction_ratio", "0.02"], {"ratio": 0.02}),
        (["--kv-compaction-threshold", "2048"], {"threshold": 2048}),
        (["--kv-compaction-threshold", "80%"], {"threshold": "80%"}),
        (["--kv-compaction-cache", "on"], {"cache": "on"}),
        (["--kv-compaction-preload", "a.kv", "b.kv"], {"preload": ("a.kv", "b.kv")}),
        (["--kv-compaction-config", '{"recent_tokens": 128}'], {"recent_tokens": 128}),
        (["--kv-compaction-config.recent_tokens", "128"], {"recent_tokens": 128}),
        (
            ["--kv-compaction-ratio", "5x", "--kv-compaction-config", '{"threshold": "50%"}'],
            {"ratio": 0.2, "threshold": "50%"},
        ),
    ],
    ids=" ".join,
)
def test_values_arrive_normalised(options, words, expected):
    want = {**CompactionConfig().to_dict(), **expected}
    assert options(*ON, *words) == {"kv_compaction": want}


def test_other_additional_config_is_kept(options):
    given = options(*ON, "--additional-config", '{"mine": 1}')
    assert given == {"mine": 1, "kv_compaction": CompactionConfig().to_dict()}


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--kv-compaction-ratio", "0.1"], "--kv-compaction-ratio"),
        (["--kv-compaction-threshold", "80%"], "--kv-compaction-threshold"),
        (["--kv-compaction-config", "{}"], "--kv-compaction-config"),
        (["--kv-compaction", "none", "--kv-compaction-ratio", "0.1"], "--kv-compaction-ratio"),
    ],
    ids=" ".join,
)
def test_companion_without_the_switch_is_refused(refusal, words, flag):
    assert refusal(*words) == (
        f"{flag} has no effect without --kv-compaction attention-matching; add it"
    )


@pytest.mark.parametrize(
    ("name", "value", "inside"), [("ratio", "0.1", "0.2"), ("threshold", "80%", "4096")]
)
def test_given_twice_is_refused(refusal, name, value, inside):
    words = [f"--kv-compaction-{name}", value, "--kv-compaction-config", f'{{"{name}": {inside}}}']
    assert refusal(*ON, *words) == (
        f"--kv-compaction-{name} is also given in --kv-compaction-config; drop one"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kv-compaction", "attention"], "attention-matching"),
        (["--kv-compaction-ratio", "10"], "--kv-compaction-ratio='10': expected the fraction"),
        (["--kv-compaction-threshold", "4k"], "--kv-compaction-threshold='4k': expected"),
        (["--kv-compaction-config", "{"], "--kv-compaction-config: not valid JSON"),
        (["--kv-compaction-config", "[1]"], "--kv-compaction-config: expected a JSON object"),
        (
            ["--kv-compaction-config", '{"recent_tokens": 1, "recent_tokens": 2}'],
            "'recent_tokens' is there twice; drop one",
        ),
        (["--kv-compaction-config", "[" * 100_000], "nested too deeply"),
    ],
    ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "",
)
def test_bad_value_ends_with_usage_and_message(parser, capsys, words, message):
    with pytest.raises(SystemExit) as exit_status:
        parser.parse_args(ON + words)
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_option_inside_the_json_names_the_option(refusal):
    message = refusal(*ON, "--kv-compaction-config", '{"recent_tokens": 0}')
    assert message.startswith("--kv-compaction-config recent_tokens=0")


def test_a_process_that_has_not_loaded_the_plugin_gets_the_options(parser):
    """What vLLM pickles to the API servers that it spawns are the parsed arguments."""
    import pickle

    args = parser.parse_args([*ON, "--kv-compaction-ratio", "5x"])
    received = pickle.loads(pickle.dumps(args))
    assert received.additional_config["kv_compaction"]["ratio"] == 0.2
