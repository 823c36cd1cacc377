"""The harbour town that the bundled model reads about: its people, facts, votes and weather."""

from benchmarks.recall.world import Attribute, World, pairs, phrases, words

HARBOUR = World(
    name="harbour",
    first_names=words("""
    Alma Anton Arvid Astrid Bertha Bruno Casper Clara Conrad Dagmar Daniel Edgar Edith Esther
    Felix Flora Frieda Gerda Greta Gustav Hanna Hedda Helena Henrik Hugo Ida Ingrid Ivan Jakob
    Jonas Judith Klara Konrad Leo Linus Lotte Ludwig Magnus Marta Matilda Nadia Olga Oscar Otto
    Paula Peter Petra Ruben Sigrid Stefan Svea Thora Tobias Ursula Viktor Wanda
"""),
    surnames=words("""
    Almgren Amsel Arendt Bachman Becker Blom Bodin Brandt Carlsen Dahl Decker Drexler Eklund
    Engel Falk Fischer Forsell Friis Gerber Grimm Hagen Halvorsen Hartman Heller Huber Jansen
    Keller Kessler Kramer Krog Lindgren Lorenz Moller Nagel Nyman Oberg Olsen Palmer Paulsen
    Petrov Quist Rasmus Reuter Richter Sander Schulz Seidel Sommer Strand Thorne Tiller Ulrich
    Vance Vogel Wagner Werner Winkler Zander Zeller Ziegler Zimmer
"""),
    attributes=(
        Attribute(
            "home",
            "{P} lives in {V} .",
            (
                "the home of {P} is in {V} .",
                "for many years {P} has lived in {V} .",
                "{P} rents two rooms in {V} .",
            ),
            (
                "Where does {P} live ?",
                "Where is the home of {P} ?",
                "In which street does {P} live ?",
            ),
            pairs(
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
            phrases("""
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
            (
                "What does {P} work as ?",
                "What is the trade of {P} ?",
                "How does {P} earn a living ?",
            ),
            phrases("""
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
            (
                "What animal does {P} keep ?",
                "Which pet does {P} have ?",
                "What is the pet of {P} ?",
            ),
            pairs("grey black white spotted tame", "parrot cat goose goat pony hound rabbit hen"),
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
            phrases("""
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
            pairs(
                "Silver Golden Merry Northern Lucky Proud Swift",
                "Heron Star Gull Dolphin Maiden Otter",
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
            pairs("dark pale bright deep dull", "green blue red yellow brown purple"),
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
            phrases("""
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
            pairs("old rare tiny foreign", "maps coins stamps shells bottles buttons masks bells"),
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
            phrases("""
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
            phrases("""
            Danish, Greek, Latin, Polish, Turkish, Welsh, Dutch, Arabic, Spanish, Irish, Finnish,
            Russian, Persian, Hebrew
        """),
        ),
    ),
    restate_prefixes=(
        "as was told before ,",
        "everyone in town knows that",
        "the clerk noted once more that",
        "a letter confirmed that",
        "let it be repeated that",
        "",
    ),
    asked=(
        "a visitor asked : {Q} The clerk answered : {A}",
        "somebody at the inn asked : {Q} The answer was : {A}",
        "the tax book asks : {Q} It says : {A}",
    ),
    offices=phrases("""
    treasurer, constable, librarian, secretary, postmaster, overseer, inspector, steward
"""),
    vote_statements=(
        "{W} voted to make {P} the new {V} .",
        "{W} thinks that {P} should become {V} .",
        "{W} would like to see {P} as {V} .",
        "in the opinion of {W} the town needs {P} as {V} .",
    ),
    vote_questions=(
        "What do most people think that {P} should become ?",
        "Which office do most people want for {P} ?",
        "As what would most people like to see {P} ?",
    ),
    vote_answer="most people think that {P} should become {V} .",
    voters=phrases("""
    the mayor, the doctor, the judge, the captain, the priest, the miller, the widow, the
    gardener, the lawyer, the smith, the postman, the painter, the cook, the shepherd, the
    fiddler, the pilot, the butcher, the nurse, the brewer, the hunter, the sexton, the cobbler
"""),
    slots={
        "weather": phrases("fog, rain, wind, snow, mist, sunshine, thunder, frost"),
        "place": phrases("""
        harbour, pier, square, lighthouse, beach, river, quay, market, cliff, churchyard
    """),
        "time": phrases("""
        at dawn, at noon, after supper, before sunrise, late at night, on Sunday, all morning
    """),
        "thing": phrases(
            "barrel, basket, ladder, cart, kettle, bucket, rope, blanket, trunk, bench"
        ),
        "folk": phrases("""
        sailors, children, fishermen, neighbours, travellers, widows, farmers, students
    """),
        "mood": phrases("quiet, cheerful, weary, busy, proud, curious, patient, sleepy"),
        "bird": phrases("gulls, crows, swallows, pigeons, geese, sparrows"),
        "number": phrases("two, three, four, five, six, seven, eight"),
    },
    fillers=(
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
    ),
    person_filler_share=0.15,
)
