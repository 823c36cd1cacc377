"""Train the recall model from scratch and export it.

Each step reads one batch of chats: a fresh document, then questions and answers until the sequence
is full. The sequences grow longer when the answers are accurate enough, or late enough in the run;
most steps (`REHEARSAL`) revisit a shorter length. Matrices are trained by Muon, the rest by
AdamW, with a linear cool-down. The budget is in tokens; an interrupted run resumes from its
checkpoint. The bundled model is replaced with ``--record`` only.
"""

import argparse
import csv
import functools
import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from benchmarks.folders import BENCHMARKS, result_path, written
from benchmarks.recall.documents import Role, chat_words, generate, training_density
from benchmarks.recall.init import initialise
from benchmarks.recall.model import ModelConfig, RecallModel, export
from benchmarks.recall.recipe import BUNDLED, RECIPES, Recipe
from benchmarks.recall.tokenizer import END_ID, build_tokenizer, vocabulary
from benchmarks.recall.world import World

# Length in tokens, the accuracy that ends the stage, and the share of the run that ends it anyway.
STAGES = (
    (128, 0.85, 0.1),
    (256, 0.93, 0.2),
    (512, 0.95, 0.35),
    (1024, 0.96, 0.5),
    (1536, 0.97, 0.65),
    (2048, 2.0, 2.0),
)
REHEARSAL = 0.8
TOKENS_PER_STEP = 6144
MUON_RATE, ADAM_RATE, WARMUP_STEPS = 8e-3, 1.5e-3, 30
COOLDOWN, LAST_RATE = 0.5, 0.02  # share of the run, final learning rate relative to the first
TALLY_FIRST = 0.5  # share of chats that begin with the questions about votes
PLAIN_SHARE = 0.3  # of ordinary words that are scored

# The weight of each role's mean loss. FIRST cannot be known.
WEIGHTS = {
    Role.PLAIN: 0.2,
    Role.FIRST: 0.02,
    Role.AGAIN: 1.0,
    Role.VOTE: 0.5,
    Role.ANSWER: 0.4,
    Role.RECALL: 1.0,
    Role.TALLY: 1.0,
}
MEASURES = ("loss", "plain_loss", "recall", "again", "tally", "answer")
COLUMNS = ("step", "tokens", "minutes", "length", *MEASURES)


@dataclass
class Batch:
    """Token ids and roles, both [B, T] int64."""

    ids: Tensor
    roles: Tensor


@functools.cache
def multiplies_in_bfloat16() -> bool:
    """Whether this CPU has instructions for it; without them it takes twenty times as long."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def sample_batch(rng: random.Random, world: World, length: int, size: int) -> Batch:
    """`size` chats, cut to exactly `length` tokens."""
    vocab = vocabulary(world)
    rows = []
    for _ in range(size):
        share = rng.choice((0.5, 0.65, 0.8) if length <= 512 else (0.75, 0.85, 0.92))
        density = training_density(rng, world)
        document = generate(rng, max(40, round(share * length)), density, world)
        questions = document.questions
        if rng.random() < TALLY_FIRST:
            questions = sorted(questions, key=lambda question: question.kind == "recall")
        questions = questions * (1 + length // 64)  # enough to fill the sequence
        words = islice(chat_words(document, questions), length)
        rows.append([(vocab[word], int(role)) for word, role in words])
    both = torch.tensor(rows)
    return Batch(both[..., 0], both[..., 1])


def losses(model: RecallModel, batch: Batch) -> tuple[dict[Role, Tensor], dict[Role, float]]:
    """Mean cross-entropy and next-word accuracy for each role that occurs."""
    targets, roles = batch.ids[:, 1:], batch.roles[:, 1:]
    scored = (roles != Role.PLAIN) | (torch.rand(roles.shape) < PLAIN_SHARE)
    with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_in_bfloat16()):
        logits = model.logits(model(batch.ids)[:, :-1][scored]).float()
    targets, roles = targets[scored], roles[scored]
    each = F.cross_entropy(logits, targets, reduction="none")
    right = (logits.argmax(-1) == targets).float()
    loss, accuracy = {}, {}
    for role in Role:
        chosen = roles == role
        if chosen.any():
            loss[role], accuracy[role] = each[chosen].mean(), right[chosen].mean().item()
    return loss, accuracy


def optimizers(model: RecallModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and gains."""
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [muon, adam]


def learning_rate(step: int, progress: float) -> float:
    """Relative learning rate: a short warm-up, constant, then linear down to `LAST_RATE`."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(LAST_RATE, (1 - progress) / COOLDOWN))


class Trainer:
    """State of a run: weights, optimisers, random streams, curriculum and history."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.world = recipe.world
        words = vocabulary(self.world)
        self.model = RecallModel(ModelConfig(vocab_size=len(words), **recipe.sizes))
        initialise(self.model, self.world, words, torch.Generator().manual_seed(seed))
        self.optimizers = optimizers(self.model)
        self.step = self.tokens = self.stage = 0
        self.seconds = 0.0
        self.smooth: dict[str, float] = {}
        self.history: list[dict[str, float]] = []

    def train_step(self, budget: int) -> None:
        """One batch at this stage's length, or at an earlier one."""
        start = time.monotonic()
        place = "" if self.world is BUNDLED.world else f"{self.world.name}-"
        rng = random.Random(f"train-{place}{self.seed}-{self.step}")
        length = STAGES[self.stage][0]
        if self.stage and rng.random() < REHEARSAL:
            length = STAGES[rng.randrange(self.stage)][0]
        batch = sample_batch(rng, self.world, length, max(2, TOKENS_PER_STEP // length))
        loss, accuracy = losses(self.model, batch)
        total = torch.stack([WEIGHTS[role] * value for role, value in loss.items()]).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = learning_rate(self.step, self.tokens / budget)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += batch.ids.numel()
        self.seconds += time.monotonic() - start
        if length == STAGES[self.stage][0]:
            self._follow(total.item(), loss, accuracy, self.tokens / budget)

    def _follow(
        self, total: float, loss: dict[Role, Tensor], accuracy: dict[Role, float], progress: float
    ) -> None:
        """Running means of the measures, and the next stage when it is due."""
        now = {"loss": total, "plain_loss": loss[Role.PLAIN].item()}
        now |= {role.name.lower(): value for role, value in accuracy.items()}
        for name, value in now.items():
            self.smooth[name] = 0.9 * self.smooth.get(name, value) + 0.1 * value
        _, gate, latest = STAGES[self.stage]
        if self.smooth.get("recall", 0.0) > gate or progress > latest:
            self.record()
            self.stage += 1
            self.smooth = {}

    def record(self) -> None:
        """Append the running means to the history."""
        row = {"step": self.step, "tokens": self.tokens, "minutes": self.seconds / 60}
        row |= {"length": STAGES[self.stage][0], **self.smooth}
        self.history.append({name: round(row.get(name, float("nan")), 4) for name in COLUMNS})

    def state(self) -> dict:
        """Everything a resumed run needs."""
        plain = ("seed", "step", "tokens", "stage", "seconds", "smooth", "history")
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            **{name: getattr(self, name) for name in plain},
        }

    def restore(self, state: dict) -> None:
        """Continue from `state`."""
        self.model.load_state_dict(state.pop("model"))
        for optimizer, saved in zip(self.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        self.__dict__.update(state)


def write_history(history: Sequence[dict[str, float]], folder: Path) -> None:
    """training.csv and training.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with (folder / "training.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(history)
    columns = defaultdict(list)
    for row in history:
        for name, value in row.items():
            columns[name].append(value)
    millions = [tokens / 1e6 for tokens in columns["tokens"]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(millions, columns["loss"], label="weighted loss")
    left.plot(millions, columns["plain_loss"], label="ordinary words")
    left.set(xlabel="million tokens", ylabel="cross-entropy", yscale="log")
    labels = {"recall": "answers: facts", "tally": "answers: votes", "again": "retold in the text"}
    for name, label in labels.items():
        right.plot(millions, columns[name], label=label)
    right.set(xlabel="million tokens", ylabel="next-word accuracy", ylim=(0, 1.02))
    lengths = columns["length"]
    for i in range(1, len(lengths)):
        if lengths[i] != lengths[i - 1]:
            for axis in (left, right):
                axis.axvline(millions[i], color="0.85", zorder=0)
            right.text(millions[i], 0.02, f"{lengths[i]:.0f}", rotation=90, fontsize=7, color="0.4")
    for axis in (left, right):
        axis.legend()
    figure.savefig(folder / "training.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=list(RECIPES), default=BUNDLED.name)
    parser.add_argument("--tokens", type=float, help="tokens to train on; default: the recipe's")
    parser.add_argument("--seed", type=int, help="default: the recipe's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--checkpoint", type=Path, help="default: checkpoint.pt beside training.csv"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--model", type=Path, help="folder to export to; default: benchmarks/out/recall/model"
    )
    where.add_argument(
        "--record", action="store_true", help="replace the committed model and training.* instead"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    place = str(recipe.folder.relative_to(BENCHMARKS))
    model = result_path(args.model, args.record, f"{place}/model", recorded=BENCHMARKS)
    folder = result_path(None, args.record, place, recorded=BENCHMARKS)
    checkpoint = args.checkpoint or folder / "checkpoint.pt"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    budget = int(args.tokens or recipe.tokens)

    trainer = Trainer(recipe, recipe.seed if args.seed is None else args.seed)
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint))
    columns = ("{task.description}", BarColumn(), TextColumn("{task.completed:.2f} M"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=budget / 1e6)
        while trainer.tokens < budget:
            trainer.train_step(budget)
            if trainer.step % 20 == 0:
                trainer.record()
                row = trainer.history[-1]
                text = " ".join(f"{name} {row[name]:.3g}" for name in COLUMNS[2:])
                progress.update(task, completed=trainer.tokens / 1e6, description=text)
                if not progress.console.is_terminal:
                    print(f"{trainer.tokens / 1e6:.2f}M {text}", flush=True)
            if trainer.step % 100 == 0 or trainer.tokens >= budget:
                torch.save(trainer.state(), checkpoint)
                write_history(trainer.history, folder)
    export(trainer.model, model, getattr(torch, args.dtype), eos=END_ID, pad=0)
    build_tokenizer(recipe.world).save_pretrained(model)
    print(f"{written(folder, 'training.csv', 'training.png')} The model: {os.path.relpath(model)}.")


if __name__ == "__main__":
    main()
