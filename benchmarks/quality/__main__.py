"""``python -m benchmarks.quality COMMAND``."""

from __future__ import annotations

import typer

from benchmarks.quality import question_answering, recall, rounds, samples, text

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command("recall")(recall.main)
app.command("rounds")(rounds.main)
app.command("samples")(samples.main)
app.command("text")(text.main)
app.command("quality")(question_answering.quality)
app.command("longhealth")(question_answering.longhealth)
app.command("ruler")(question_answering.ruler)


@app.callback()
def callback() -> None:
    """What compaction does to answers."""


if __name__ == "__main__":
    app()
