"""The parser of ``vllm serve``, with our flags."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def serve_parser(plugin: None) -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
