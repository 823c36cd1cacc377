"""The mountain observatory that the validation model reads about: entries of a logbook.

Nothing in it is of the harbour town: other names, other relations (some are codes and numbers),
short entries in the style of a register instead of a chronicle's sentences, other votes.
"""

from benchmarks.recall.world import Attribute, World, pairs, phrases, words

OBSERVATORY = World(
    name="observatory",
    first_names=words("""
        Aiko Amara Badr Beatriz Bilal Chen Chidi Dalia Deepa Dinesh Ebele Elif Emre Farah Feng
        Gita Haruto Hiba Imani Ines Isha Joao Jorge Kaito Kamal Kavya Leila Lena Luca Malik Mariam
        Mei Miguel Nadim Naomi Nia Omar Paloma Priya Quan Rafael Rania Ravi Rosa Samir Sana Sofia
        Tariq Tomas Uma Wei Yara Yusuf Zainab Zane Zola
    """),
    surnames=words("""
        Abebe Achebe Aguilar Ahmadi Alvarez Banerjee Barros Bose Castro Chandra Cheng Costa Cruz
        Das Diallo Duarte Eze Farouk Fernandes Fujita Gomes Gupta Haddad Hassan Hayashi Huang Ito
        Iyer Jamal Kapoor Khan Kimura Kone Lopez Mahmoud Mehta Mensah Mori Nakamura Nasser Ndiaye
        Okafor Ortega Osei Pereira Qureshi Ramos Rao Reyes Saito Sharma Silva Singh Suzuki Takeda
        Traore Vega Wang Yamada Zhang Zhou
    """),
    attributes=(
        Attribute(
            "locker",
            "the locker of {P} has the number {V} .",
            (
                "keys : {P} , number {V} .",
                "{P} opens the locker with number {V} .",
                "to {P} was given locker number {V} .",
            ),
            (
                "Which number has the locker of {P} ?",
                "What is the locker number of {P} ?",
                "Number on the locker of {P} ?",
            ),
            pairs("11 12 13 14 15 16", "A B C D E F"),
        ),
        Attribute(
            "call-sign",
            "on the radio {P} answers to {V} .",
            (
                "radio : {P} , sign {V} .",
                "the radio sign of {P} is {V} .",
                "whoever calls {P} by radio says {V} .",
            ),
            (
                "What does {P} answer to on the radio ?",
                "Which radio sign has {P} ?",
                "By what sign is {P} called ?",
            ),
            pairs("alpha bravo delta echo kilo lima tango", "51 62 73"),
        ),
        Attribute(
            "object",
            "the survey of {P} follows the {V} .",
            (
                "plan : {P} , object {V} .",
                "the telescope time of {P} goes to the {V} .",
                "{P} measures night by night the {V} .",
            ),
            (
                "What does the survey of {P} follow ?",
                "Which object does {P} measure ?",
                "Where does the telescope time of {P} go ?",
            ),
            phrases("""
                crab nebula, ring nebula, double cluster, dwarf planet, hot jupiter, red giant,
                white dwarf, binary pulsar, dark cloud, spiral arm, comet tail, solar corona,
                gamma burst, lunar rim, dust disk, radio lobe
            """),
        ),
        Attribute(
            "shift",
            "{P} is on duty every {V} .",
            (
                "roster : {P} , every {V} .",
                "the duty of {P} falls on {V} .",
                "{P} holds the dome each {V} .",
            ),
            (
                "When is {P} on duty ?",
                "On what falls the duty of {P} ?",
                "When does {P} hold the dome ?",
            ),
            pairs("Monday Tuesday Wednesday Thursday Friday Saturday", "evening midnight morning"),
        ),
        Attribute(
            "repair",
            "{P} has to repair the {V} .",
            (
                "workshop : {P} , repair of the {V} .",
                "on the bench of {P} lies the {V} .",
                "{P} was told to mend the {V} .",
            ),
            (
                "What has {P} to repair ?",
                "What lies on the bench of {P} ?",
                "What was {P} told to mend ?",
            ),
            pairs("main spare upper lower", "mirror shutter grating gyroscope pump encoder"),
        ),
        Attribute(
            "thesis",
            "the thesis of {P} was about {V} .",
            (
                "library : {P} , thesis on {V} .",
                "{P} has written at length about {V} .",
                "the book of {P} deals with {V} .",
            ),
            (
                "What was the thesis of {P} about ?",
                "About what has {P} written ?",
                "With what does the book of {P} deal ?",
            ),
            phrases("""
                tidal locking, cosmic rays, star formation, stellar winds, orbital decay, ice cores,
                adaptive optics, plasma waves, gravity lenses, magnetic storms, meteor showers,
                planet rings, zodiacal light, dark matter
            """),
        ),
        Attribute(
            "drink",
            "in the canteen {P} asks for {V} .",
            (
                "canteen : {P} , one cup of {V} .",
                "the usual order of {P} is {V} .",
                "{P} never works without {V} .",
            ),
            (
                "What does {P} ask for in the canteen ?",
                "What is the usual order of {P} ?",
                "Without what does {P} never work ?",
            ),
            pairs("cold hot sweet bitter", "cocoa coffee mate chai lemonade broth"),
        ),
        Attribute(
            "region",
            "the family of {P} is from {V} .",
            (
                "files : {P} , region {V} .",
                "{P} goes home on leave to {V} .",
                "letters for {P} come from {V} .",
            ),
            (
                "From where is the family of {P} ?",
                "Where does {P} go on leave ?",
                "From where come letters for {P} ?",
            ),
            phrases("""
                Accra, Bahia, Cusco, Dakar, Fez, Goa, Hanoi, Izmir, Jaipur, Kyoto, Lagos, Mumbai,
                Nara, Oaxaca, Quito, Recife, Sendai, Tunis, Addis Ababa, Santa Cruz, San Juan,
                Nova Lima, Ras Tanura, Da Lat
            """),
        ),
        Attribute(
            "badge",
            "the badge of {P} shows a {V} .",
            (
                "gate : {P} , badge with a {V} .",
                "{P} is let in with the sign of a {V} .",
                "on the coat of {P} is sewn a {V} .",
            ),
            (
                "What does the badge of {P} show ?",
                "With which sign is {P} let in ?",
                "What is sewn on the coat of {P} ?",
            ),
            pairs("blue green red silver", "falcon lynx condor tortoise ibex"),
        ),
    ),
    restate_prefixes=(
        "noted again :",
        "second hand :",
        "for the record ,",
        "the night watch adds that",
        "checked twice :",
        "",
    ),
    asked=(
        "query of the day : {Q} Reply : {A}",
        "intercom : {Q} Tower : {A}",
        "exam sheet : {Q} Key : {A}",
    ),
    offices=phrases("""
        spectroscopy, photometry, astrometry, calibration, logistics, safety, outreach, computing
    """),
    vote_statements=(
        "ballot of {W} : {P} to lead {V} .",
        "{W} wants {P} at the head of {V} .",
        "by the choice of {W} it is {P} for {V} .",
        "{W} wrote the name of {P} under {V} .",
    ),
    vote_questions=(
        "What do most of the staff want {P} to lead ?",
        "Under what is the name of {P} written most often ?",
        "For what is {P} the choice of most ?",
    ),
    vote_answer="most of the staff want {P} to lead {V} .",
    voters=phrases("""
        desk 1, desk 2, desk 3, desk 4, desk 5, desk 6, desk 7, desk 8, desk 9, dome east, dome
        west, dome north, dome south, the archive, the kitchen, the garage, the clinic, the tower,
        the cistern, the smithy
    """),
    slots={
        "sky": phrases("seeing, haze, aurora, moonlight, drizzle, sleet, airglow"),
        "spot": phrases("ridge, cable car, terrace, antenna field, tunnel, helipad, saddle, hut"),
        "hour": phrases("at 01 h, at 02 h, at 03 h, at 04 h, at 22 h, at 23 h"),
        "part": phrases("fuse, hatch, relay, valve, lens cap, battery, hinge, cable"),
        "crew": phrases("drivers, guests, technicians, porters, students, surveyors"),
        "state": phrases("nominal, erratic, stable, silent, overdue, unclear"),
        "unit": phrases("percent, degrees, knots, volts"),
        "count": phrases("21, 34, 47, 58, 63, 72, 86, 95"),
    },
    fillers=(
        "{hour} : {sky} over the {spot} .",
        "{hour} : {count} {unit} , trend {state} .",
        "status of the {part} : {state} .",
        "{crew} seen at the {spot} , nothing to report .",
        "replaced one {part} near the {spot} .",
        "the {part} by the {spot} reads {count} {unit} .",
        "{sky} until dawn , domes closed .",
        "delivery : {count} crates , one {part} missing .",
        "the {crew} left by the {spot} {hour} .",
        "alarm {hour} , cause {state} .",
        "exposure {count} aborted because of {sky} .",
        "link to the valley {state} {hour} .",
        "{P} signed the book {hour} .",
        "{P} returned from the {spot} with one {part} .",
        "{P} reported {sky} .",
    ),
    person_filler_share=0.2,
)
