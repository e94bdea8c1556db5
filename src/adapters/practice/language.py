"""Plain words of a text, and a guess at which language it is in."""

import re
import unicodedata
from collections.abc import Mapping
from enum import StrEnum

_APOSTROPHES = re.compile(r"['`\u00b4\u02bc\u2018\u2019\uff07]")
_WORD = re.compile(r"[^\W_]+")


class Language(StrEnum):
    """The languages in which words of crisis are known."""

    ENGLISH = "en"
    SPANISH = "es"
    GERMAN = "de"
    FRENCH = "fr"
    PORTUGUESE = "pt"


def plain_words(text: str) -> list[str]:
    """The words of a text without case, accents, apostrophes, punctuation and invisible characters."""
    folded = unicodedata.normalize("NFKD", _APOSTROPHES.sub("", text).casefold())
    if not folded.isascii():
        # Accents have come apart from their letters; format characters can be put inside a word to hide it.
        folded = "".join(char for char in folded if unicodedata.category(char) not in {"Mn", "Me", "Cf"})
        folded = _APOSTROPHES.sub("", folded)
    return _WORD.findall(folded)


# Common words of each language that mean nothing, or something rare, in English.
_MARKERS: Mapping[Language | str, str] = {
    Language.ENGLISH: (
        "i im ive id ill the and to my is of that it for with you are have not this do be can what how he she as "
        "they we but at want would feel like just about from there dont cant know yes hello hi hey please thanks "
        "was been so get got really think should could will work job need help who when why your or if in on by a "
        "an me no up out"
    ),
    Language.SPANISH: (
        "el los las una unos y pero porque quiero estoy tengo muy por para mi mis hola gracias esta este esto eso "
        "yo soy puedo hacer como cuando trabajo siento necesito ayuda buenos buenas dias nada tambien mas ahora "
        "donde ser del al lo le ya usted ustedes nosotros jefe se que en"
    ),
    Language.GERMAN: (
        "ich der das und ist nicht mein meine meinem meiner meinen mich mir ein eine einen zu auf fur fuer habe "
        "aber auch wie wenn weil hallo danke guten morgen ja nein kann mochte moechte mochten du sie mit wir dem "
        "von bei sehr mehr nur noch arbeit hilfe leben immer kein keine"
    ),
    Language.FRENCH: (
        "je jai tu toi suis la le une et mais avec dans moi que qui pas ne ce cest cette bonjour salut merci oui "
        "veux peux vous nous il tres travail besoin aide quand parce sur au aux du tout rien bonsoir meme etre "
        "faire"
    ),
    Language.PORTUGUESE: (
        "eu uma e o os ou mas porque quero estou tenho muito por para meu minha meus minhas ola obrigado obrigada "
        "nao sim esta este isso sou se de posso fazer quando trabalho sinto preciso ajuda bom dia tarde noite "
        "voce mais agora onde ser na ao ja tudo nada ele ela que em"
    ),
    "it": (
        "io sono il gli che una mio voglio perche molto quando ciao grazie lavoro sento bisogno aiuto questo "
        "anche della nel vorrei cosa mi"
    ),
    "nl": ("ik het een niet mijn maar ook voor hallo dank je wij heb kan hulp leven omdat naar heel"),
    "pl": ("jestem nie sie chce moj moja praca jak czesc dziekuje bardzo pomoc zycie"),
    "tr": ("bir ve icin merhaba istiyorum degil cok bu nasil yardim evet hayir benim"),
    "sv": ("jag och att det inte mitt hej tack vill kan hur vad mycket jobbet"),
}
_MARKER_SETS = {language: frozenset(words.split()) for language, words in _MARKERS.items()}

_ENOUGH = 4000
"""A language shows within this many characters."""


def markers(text: str) -> dict[Language | str, int]:
    """How many words of a text are typical of each language."""
    words = plain_words(text[:_ENOUGH])
    return {language: sum(word in common for word in words) for language, common in _MARKER_SETS.items()}


def guess_language(text: str) -> Language | None:
    """The language of a text, or None for one that is not on our list. In doubt it is English."""
    letters = [char for char in text[:_ENOUGH] if char.isalpha()]
    latin = sum(1 for char in letters if char.isascii() or "LATIN" in unicodedata.name(char, ""))
    if latin * 2 < len(letters):
        return None
    scores = markers(text)
    best = max(scores, key=lambda language: scores[language])
    words = len(plain_words(text[:_ENOUGH]))
    needed = 1 if words <= 3 else 2
    if scores[best] < needed or scores[best] <= scores[Language.ENGLISH] or scores[best] * 5 < words:
        return Language.ENGLISH
    return best if isinstance(best, Language) else None
