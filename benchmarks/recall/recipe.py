"""The models of this folder: what each is made of, and where it lies.

The bundled one shows what compaction does, and defaults were chosen on it, among others. The
validation model had no say in anything: another world of words, another depth, other heads, another
seed. What is measured on it is reported and never tuned on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.recall.harbour import HARBOUR
from benchmarks.recall.observatory import OBSERVATORY
from benchmarks.recall.tokenizer import vocabulary
from benchmarks.recall.world import World

HERE = Path(__file__).parent


@dataclass(frozen=True, eq=False)
class Recipe:
    """One model."""

    name: str
    world: World
    folder: Path
    """Of its tables; the weights are in ``model`` there."""
    seed: int
    tokens: float
    """That it is trained on."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Of the network, where they are not those of the bundled model."""

    @property
    def model(self) -> Path:
        """Weights, configuration and tokenizer."""
        return self.folder / "model"

    @property
    def vocabulary(self) -> dict[str, int]:
        """Word to id."""
        return vocabulary(self.world)


BUNDLED = Recipe("bundled", HARBOUR, HERE, seed=0, tokens=4.6e6)
VALIDATION = Recipe(
    "validation",
    OBSERVATORY,
    HERE / "validation",
    seed=1,
    tokens=4.6e6,
    sizes={"num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 3},
)
RECIPES = {recipe.name: recipe for recipe in (BUNDLED, VALIDATION)}
