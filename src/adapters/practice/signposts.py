"""Points to the professional whose matter it is. One sentence, said once in a conversation; never a diagnosis."""

import re

from adapters.practice.language import plain_words

HELP_FIRST = frozenset({"control", "emergency", "eating", "medication"})
"""Kinds where getting that help comes before any other goal."""

_SIGNPOSTS: tuple[tuple[str, str, str], ...] = (
    (
        "control",
        (
            r"\b(checks|tracks|controls|monitors|takes) my (phone|messages|location|money|every|salary)\b|"
            r"\b(controlling|controls me|isolates me|not allowed to (see|go|leave)|walking on eggshells|wont "
            r"let me (see|work|go))\b"
        ),
        (
            "What you describe can be a sign of control, and that deserves more than coaching: a domestic "
            "abuse service listens for free and in confidence, and findahelpline.com lists them."
        ),
    ),
    (
        "emergency",
        (
            r"\b(chest (pain|pains|pressure)|cant breathe|short(ness)? of breath|coughing up blood|passed out|"
            r"fainted|seizures?|numb (arm|face|leg))\b"
        ),
        "A symptom like that belongs to a doctor, and if it is happening now, to the emergency number.",
    ),
    (
        "eating",
        (
            r"\b(anorexi\w+|bulimi\w+|purg(e|es|ed|ing)|bing(e|es|ed|ing|eing)( eating)?|laxatives?|throw(ing)? "
            r"up after|make myself (throw up|sick|vomit)|starv(e|ing) to)\b"
        ),
        "With food, a doctor or an eating-disorder service can do far more for you than I can.",
    ),
    (
        "medication",
        (
            r"\b(medications?|meds|antidepressants?|insulin|prescriptions?|dos(e|es|age)|painkillers?|sleeping "
            r"pills|statins?|chemo\w*|pregnan\w+)\b"
        ),
        (
            "Anything about medicines or treatment is for your doctor or pharmacist, so please change nothing "
            "on my word."
        ),
    ),
    (
        "symptoms",
        (
            r"\b(lump|blood in my|bleeding|migraines?|dizz\w+|palpitations|fever|diabet\w+|high blood pressure|"
            r"injur\w+|pain in my|my (back|knee|knees|shoulder|neck) hurts?)\b"
        ),
        "What the symptom means is for a doctor to say; we can look at the part that is yours.",
    ),
    (
        "mood",
        (
            r"\b(depress\w+|panic attacks?|anxiety attacks?|worthless|hopeless|burn(t|ed)? ?out|burnout|havent "
            r"slept in|cant get out of bed|cry(ing)? every|trauma\w*|ptsd)\b"
        ),
        "If this has lasted for weeks, a doctor or therapist is the right person to look at it with you.",
    ),
    (
        "addiction",
        r"\b(alcoholi\w+|drinking (too much|every|problem)|gambl\w+|addict\w*|cocaine|heroin|relaps\w+)\b",
        "A doctor or an addiction service can help with that far better than I can.",
    ),
    (
        "work law",
        (
            r"\b(harass\w*|discriminat\w+|bull(y|ied|ying|ies)|whistleblow\w*|lawsuit|sue|suing|illegal\w*|"
            r"unlawful\w*|dismiss(ed|al)|wrongfully|unpaid (wages|overtime|hours)|severance|redundan\w+)\b"
        ),
        (
            "For your rights in this, a union, an advice service or an employment lawyer is the right address, "
            "better early than late."
        ),
    ),
    (
        "family law",
        r"\b(divorc\w+|custody|alimony|child support|restraining order|prenup\w*)\b",
        "For the legal side, a family lawyer or a mediator is the right address.",
    ),
    (
        "money",
        r"\b(debts?|bankrupt\w*|evict\w+|loan sharks?|cant pay (the |my )?(rent|bills|mortgage)|foreclosure)\b",
        "For the money side, a free debt or advice service can do more than I can.",
    ),
)

_PATTERNS = tuple((kind, re.compile(pattern), sentence) for kind, pattern, sentence in _SIGNPOSTS)


def signpost(text: str, given: frozenset[str]) -> tuple[str, str] | None:
    """The first signpost that a message calls for and that was not given before: its kind and its sentence."""
    plain = " ".join(plain_words(text[:4000]))
    for kind, pattern, sentence in _PATTERNS:
        if kind not in given and pattern.search(plain):
            return kind, sentence
    return None
