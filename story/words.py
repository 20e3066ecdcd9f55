"""The small world of the story: colours, forms, things and countries, and which of them are kept for the exam."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 133, 20),
    "yellow": (250, 212, 30),
    "green": (45, 150, 60),
    "blue": (35, 90, 205),
    "purple": (125, 50, 165),
    "pink": (250, 140, 185),
    "brown": (125, 75, 35),
    "black": (22, 22, 24),
    "white": (248, 248, 248),
    "grey": (140, 142, 146),
}
FORMS = ("circle", "square", "triangle", "star", "cross", "ring")

KEPT_PAIRS = frozenset(
    {
        ("circle", "purple"), ("circle", "yellow"), ("square", "red"), ("square", "green"), ("triangle", "blue"), ("triangle", "orange"),
        ("star", "pink"), ("star", "black"), ("cross", "brown"), ("cross", "white"), ("ring", "grey"), ("ring", "red"),
    }
)  # fmt: skip
"""Form and colour that no picture of the training has together; each of them is there with others."""

# What the drawings call a thing (common to all five sets), and what it is called here where that differs.
_THINGS = {
    "animal": "crab chicken duck elephant fox lady-beetle=ladybird octopus penguin pig-face=pig turtle whale",
    "fruit": "red-apple=apple avocado banana grapes lemon strawberry watermelon",
    "vegetable": "carrot ear-of-corn=corn eggplant tomato",
    "food": "bread doughnut hamburger ice-cream",
    "plant": "cactus evergreen-tree=fir rose sunflower",
    "vehicle": "bus fire-engine rocket sailboat train",
    "tool": "key scissors umbrella",
    "garment": "jeans necktie crown",
}
THINGS: dict[str, tuple[str, str]] = {
    (entry.partition("=")[2] or entry.replace("-", " ")): (entry.partition("=")[0], kind)
    for kind, entries in _THINGS.items()
    for entry in entries.split()
}
"""Name -> name in the sets of drawings, and what kind of thing it is."""
PLURAL = frozenset({"grapes", "scissors", "jeans"})
UNCOUNTED = frozenset({"bread", "corn"})

COUNTRIES: dict[str, str] = {
    "ar": "Argentina", "at": "Austria", "au": "Australia", "be": "Belgium", "br": "Brazil", "ca": "Canada", "ch": "Switzerland",
    "cl": "Chile", "cn": "China", "co": "Colombia", "cu": "Cuba", "cz": "Czechia", "de": "Germany", "dk": "Denmark", "eg": "Egypt",
    "es": "Spain", "fi": "Finland", "fr": "France", "gb": "the United Kingdom", "gr": "Greece", "hu": "Hungary", "id": "Indonesia",
    "ie": "Ireland", "il": "Israel", "in": "India", "is": "Iceland", "it": "Italy", "jm": "Jamaica", "jp": "Japan", "ke": "Kenya",
    "kr": "South Korea", "ma": "Morocco", "mx": "Mexico", "nl": "the Netherlands", "no": "Norway", "np": "Nepal", "nz": "New Zealand",
    "pe": "Peru", "pl": "Poland", "pt": "Portugal", "ru": "Russia", "sa": "Saudi Arabia", "se": "Sweden", "th": "Thailand",
    "tr": "Turkey", "ua": "Ukraine", "us": "the United States", "vn": "Vietnam", "za": "South Africa",
}  # fmt: skip
KEPT_COUNTRIES: dict[str, str] = {
    "bd": "Bangladesh", "ee": "Estonia", "gn": "Guinea", "lt": "Lithuania", "lu": "Luxembourg", "mg": "Madagascar", "ng": "Nigeria",
    "ph": "the Philippines", "pk": "Pakistan", "ro": "Romania", "sn": "Senegal", "tn": "Tunisia",
}  # fmt: skip
"""Countries whose flags no picture of the training shows: the exam asks for their colours alone."""


def article(name: str) -> str:
    """A name with its indefinite article, where it takes one."""
    if name in PLURAL or name in UNCOUNTED:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def verb(name: str) -> str:
    """is or are."""
    return "are" if name in PLURAL else "is"


def plural(form: str, count: int) -> str:
    """The name of a form for so many of it."""
    return form if count == 1 else f"{form}{'es' if form.endswith('s') else 's'}"


def listed(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
