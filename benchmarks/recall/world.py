"""The harbour town the documents describe: its people, their facts, its votes and its weather.

Templates are written as space-separated words, which is also how the tokenizer splits them.
``{P}`` stands for a person, ``{V}`` for a value, ``{W}`` for somebody who votes; any other
``{name}`` is drawn from `SLOTS`. In every template the person and the relation stand before the
value: a reader can then predict the value when the fact has been told before, and the model looks
back in the same way while it reads and while it answers.
"""

from dataclasses import dataclass
from itertools import product


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _pairs(first: str, second: str) -> tuple[str, ...]:
    return tuple(f"{a} {b}" for a, b in product(first.split(), second.split()))


FIRST_NAMES = _words("""
    Alma Anton Arvid Astrid Bertha Bruno Casper Clara Conrad Dagmar Daniel Edgar Edith Esther
    Felix Flora Frieda Gerda Greta Gustav Hanna Hedda Helena Henrik Hugo Ida Ingrid Ivan Jakob
    Jonas Judith Klara Konrad Leo Linus Lotte Ludwig Magnus Marta Matilda Nadia Olga Oscar Otto
    Paula Peter Petra Ruben Sigrid Stefan Svea Thora Tobias Ursula Viktor Wanda
""")

SURNAMES = _words("""
    Almgren Amsel Arendt Bachman Becker Blom Bodin Brandt Carlsen Dahl Decker Drexler Eklund
    Engel Falk Fischer Forsell Friis Gerber Grimm Hagen Halvorsen Hartman Heller Huber Jansen
    Keller Kessler Kramer Krog Lindgren Lorenz Moller Nagel Nyman Oberg Olsen Palmer Paulsen
    Petrov Quist Rasmus Reuter Richter Sander Schulz Seidel Sommer Strand Thorne Tiller Ulrich
    Vance Vogel Wagner Werner Winkler Zander Zeller Ziegler Zimmer
""")


@dataclass(frozen=True)
class Attribute:
    """One kind of fact about a person.

    `answer` is the sentence the assistant gives and also one of the ways the text may tell the
    fact; at least four words stand in it before the value.
    """

    name: str
    answer: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...]


ATTRIBUTES = (
    Attribute(
        "home",
        "{P} lives in {V} .",
        (
            "the home of {P} is in {V} .",
            "for many years {P} has lived in {V} .",
            "{P} rents two rooms in {V} .",
        ),
        ("Where does {P} live ?", "Where is the home of {P} ?", "In which street does {P} live ?"),
        _pairs(
            "Anchor Mill Chapel Willow Orchard Lantern Cooper Tanner Garden Bishop",
            "Lane Street Row Court Hill",
        ),
    ),
    Attribute(
        "birthplace",
        "{P} was born in {V} .",
        (
            "the birthplace of {P} is {V} .",
            "{P} grew up far away in {V} .",
            "by birth {P} comes from {V} .",
        ),
        ("Where was {P} born ?", "What is the birthplace of {P} ?", "Where did {P} grow up ?"),
        _phrases("""
            Lisbon, Bergen, Trieste, Cadiz, Antwerp, Riga, Genoa, Dublin, Malta, Hamburg, Corfu,
            Bristol, Naples, Tangier, Odessa, Bordeaux, Venice, Porto, Stockholm, New Haven,
            San Remo, Port Said, Le Havre, Cape Town
        """),
    ),
    Attribute(
        "trade",
        "{P} works as a {V} .",
        (
            "{P} earns a living as a {V} .",
            "the trade of {P} is that of a {V} .",
            "by trade {P} is a {V} .",
        ),
        ("What does {P} work as ?", "What is the trade of {P} ?", "How does {P} earn a living ?"),
        _phrases("""
            baker, rope maker, sail maker, net mender, clock maker, boat builder, glass blower,
            teacher, ferry pilot, lamp lighter, stone cutter, book binder, wine merchant, tailor,
            fish trader, barber, midwife, printer, cheese maker, gold smith
        """),
    ),
    Attribute(
        "pet",
        "{P} keeps a {V} .",
        (
            "at home {P} looks after a {V} .",
            "the pet of {P} is a {V} .",
            "{P} is often seen with a {V} .",
        ),
        ("What animal does {P} keep ?", "Which pet does {P} have ?", "What is the pet of {P} ?"),
        _pairs("grey black white spotted tame", "parrot cat goose goat pony hound rabbit hen"),
    ),
    Attribute(
        "instrument",
        "{P} plays the {V} .",
        (
            "in the evening {P} practises the {V} .",
            "the instrument of {P} is the {V} .",
            "{P} makes music on the {V} .",
        ),
        (
            "What does {P} play ?",
            "Which instrument does {P} play ?",
            "What is the instrument of {P} ?",
        ),
        _phrases("""
            violin, cello, flute, harp, accordion, tin whistle, church organ, trumpet, zither, oboe,
            hand drum, bass guitar, bag pipe, clarinet, banjo, fiddle
        """),
    ),
    Attribute(
        "ship",
        "{P} sails on the {V} .",
        (
            "the ship of {P} is the {V} .",
            "{P} belongs to the crew of the {V} .",
            "when {P} goes to sea it is on board the {V} .",
        ),
        (
            "On which ship does {P} sail ?",
            "What is the ship of {P} ?",
            "To which crew does {P} belong ?",
        ),
        _pairs(
            "Silver Golden Merry Northern Lucky Proud Swift", "Heron Star Gull Dolphin Maiden Otter"
        ),
    ),
    Attribute(
        "door",
        "{P} painted the front door {V} .",
        (
            "the front door of {P} is {V} .",
            "this spring {P} gave the door a coat of {V} .",
            "the colour on the door of {P} is {V} .",
        ),
        (
            "What colour did {P} paint the front door ?",
            "Which colour is the door of {P} ?",
            "How did {P} paint the door ?",
        ),
        _pairs("dark pale bright deep dull", "green blue red yellow brown purple"),
    ),
    Attribute(
        "dish",
        "{P} likes to eat {V} .",
        (
            "the favourite dish of {P} is {V} .",
            "on feast days {P} always orders {V} .",
            "nothing tastes better to {P} than {V} .",
        ),
        (
            "What does {P} like to eat ?",
            "What is the favourite dish of {P} ?",
            "Which dish does {P} like best ?",
        ),
        _phrases("""
            smoked eel, smoked herring, fried herring, fried potatoes, plum cake, plum pudding,
            onion soup, pea soup, fish stew, lamb stew, roast duck, roast pork, baked apples,
            baked beans, pickled beets, pickled cabbage, oat porridge, rye bread, honey bread,
            cherry pie
        """),
    ),
    Attribute(
        "collection",
        "{P} has a collection of {V} .",
        (
            "over the years {P} has gathered many {V} .",
            "the shelves of {P} are full of {V} .",
            "{P} is known to collect {V} .",
        ),
        (
            "What does {P} collect ?",
            "What is in the collection of {P} ?",
            "What are the shelves of {P} full of ?",
        ),
        _pairs("old rare tiny foreign", "maps coins stamps shells bottles buttons masks bells"),
    ),
    Attribute(
        "arrival",
        "{P} came to town in {V} .",
        (
            "{P} first arrived here in {V} .",
            "the arrival of {P} fell in {V} .",
            "{P} has been in town since {V} .",
        ),
        (
            "When did {P} come to town ?",
            "In which month did {P} arrive ?",
            "Since when has {P} been in town ?",
        ),
        _phrases("""
            January, February, March, April, May, June, July, August, September, October, November,
            December
        """),
    ),
    Attribute(
        "language",
        "{P} is learning to speak {V} .",
        (
            "twice a week {P} takes lessons in {V} .",
            "the language that {P} studies is {V} .",
            "{P} reads every evening from a grammar of {V} .",
        ),
        (
            "Which language is {P} learning ?",
            "What language does {P} study ?",
            "In what does {P} take lessons ?",
        ),
        _phrases("""
            Danish, Greek, Latin, Polish, Turkish, Welsh, Dutch, Arabic, Spanish, Irish, Finnish,
            Russian, Persian, Hebrew
        """),
    ),
)

RESTATE_PREFIXES = (
    "as was told before ,",
    "everyone in town knows that",
    "the clerk noted once more that",
    "a letter confirmed that",
    "let it be repeated that",
    "",
)

ASKED = (
    "a visitor asked : {Q} The clerk answered : {A}",
    "somebody at the inn asked : {Q} The answer was : {A}",
    "the tax book asks : {Q} It says : {A}",
)


OFFICES = _phrases("""
    treasurer, constable, librarian, secretary, postmaster, overseer, inspector, steward
""")
VOTE_STATEMENTS = (
    "{W} voted to make {P} the new {V} .",
    "{W} thinks that {P} should become {V} .",
    "{W} would like to see {P} as {V} .",
    "in the opinion of {W} the town needs {P} as {V} .",
)
VOTE_QUESTIONS = (
    "What do most people think that {P} should become ?",
    "Which office do most people want for {P} ?",
    "As what would most people like to see {P} ?",
)
VOTE_ANSWER = "most people think that {P} should become {V} ."
VOTERS = _phrases("""
    the mayor, the doctor, the judge, the captain, the priest, the miller, the widow, the
    gardener, the lawyer, the smith, the postman, the painter, the cook, the shepherd, the
    fiddler, the pilot, the butcher, the nurse, the brewer, the hunter, the sexton, the cobbler
""")

SLOTS = {
    "weather": _phrases("fog, rain, wind, snow, mist, sunshine, thunder, frost"),
    "place": _phrases("""
        harbour, pier, square, lighthouse, beach, river, quay, market, cliff, churchyard
    """),
    "time": _phrases("""
        at dawn, at noon, after supper, before sunrise, late at night, on Sunday, all morning
    """),
    "thing": _phrases("barrel, basket, ladder, cart, kettle, bucket, rope, blanket, trunk, bench"),
    "folk": _phrases("""
        sailors, children, fishermen, neighbours, travellers, widows, farmers, students
    """),
    "mood": _phrases("quiet, cheerful, weary, busy, proud, curious, patient, sleepy"),
    "bird": _phrases("gulls, crows, swallows, pigeons, geese, sparrows"),
    "number": _phrases("two, three, four, five, six, seven, eight"),
}

FILLERS = (
    "the {weather} lay over the {place} {time} .",
    "{time} the {folk} gathered near the {place} .",
    "nobody could say who had left the {thing} by the {place} .",
    "the {bird} circled above the {place} and made a great noise .",
    "there was a smell of tar and {weather} in the air .",
    "{number} {folk} carried a {thing} down to the {place} .",
    "the {place} was {mood} {time} .",
    "a {mood} stranger sat on a {thing} and watched the {bird} .",
    "the tide turned and the {folk} went back to the {place} .",
    "prices at the market rose again because of the {weather} .",
    "the old clock struck {number} and the {folk} hurried home .",
    "{time} there was {weather} and then a long silence .",
    "the roof of the inn was mended with a {thing} and some tar .",
    "letters came {time} but there was little news .",
    "the {folk} told each other stories about the {weather} .",
    "{P} walked along the {place} {time} .",
    "{P} met some {mood} {folk} near the {place} .",
    "{P} lost a {thing} in the {weather} .",
)
PERSON_FILLER_SHARE = 0.15

CHAT_WORDS = _words("user assistant system")
PUNCTUATION = _words(". , ? ! : ; ' \" ( ) -")
