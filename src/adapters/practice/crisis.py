"""Hears words of self-harm, suicide, danger, abuse and violence, and answers them with where to find help.

A static list of phrases, not a judgement: it knows what people often say, in five languages, and misses what
they say otherwise. In doubt it answers, because a false alarm costs one reply.

The lists are in `crisis_phrases/`, a file a language. Phrases are written as `plain_words` sees them: lower
case, without accents, apostrophes and punctuation. `a|b` stands for either word, `word?` for a word that may
be left out, and `@name` for the words that an earlier line `@name = …` gave.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product, zip_longest
from operator import contains
from pathlib import Path

from adapters.practice.language import Language, markers, plain_words

_LISTS = Path(__file__).parent / "crisis_phrases"

_Words = frozenset[str]
_Phrase = tuple[tuple[_Words, ...], Language | None]
"""The words from the third on, and the language."""
_Index = dict[str, dict[str, list[_Phrase]]]
"""Phrases by their first and second word, so that no text makes the search slow. A lone word has the second ""."""


def detect(text: str) -> Language | None:
    """The language in which a text speaks of a crisis, or None."""
    words = plain_words(text)
    harmless: set[int] = set()
    for start, end, _ in _matches(words, _harmless()):
        harmless.update(range(start, end))
    votes = Counter(
        language
        for start, end, language in _matches(words, _crisis())
        if language is not None and harmless.isdisjoint(range(start, end))
    )
    if not votes:
        return None
    most = max(votes.values())
    likely = [language for language in Language if votes[language] == most]
    # A word such as "suicidio" belongs to more than one language: the words around it decide.
    around = markers(text) if len(likely) > 1 else {}
    return max(likely, key=lambda language: around.get(language, 0))


def _matches(words: list[str], index: _Index) -> Iterator[tuple[int, int, Language | None]]:
    """Where phrases begin and end."""
    for start, (word, following) in enumerate(zip_longest(words, words[1:], fillvalue="")):
        seconds = index.get(word)
        if seconds is None:
            continue
        for _, language in seconds.get("", ()):
            yield start, start + 1, language
        for rest, language in seconds.get(following, ()) if following else ():
            end = start + 2 + len(rest)
            if end <= len(words) and all(map(contains, rest, words[start + 2 : end])):
                yield start, end, language


@cache
def _crisis() -> _Index:
    return _indexed({language: _LISTS / f"{language}.txt" for language in Language})


@cache
def _harmless() -> _Index:
    """Phrases of any language that turn a match which they touch into no match."""
    return _indexed({None: _LISTS / "harmless.txt"})


def _indexed(files: Mapping[Language, Path] | Mapping[None, Path]) -> _Index:
    index: _Index = {}
    for language, file in files.items():
        for phrase in _phrases(file.read_text(encoding="utf-8")):
            rest = tuple(map(frozenset, phrase[2:]))
            for first, second in product(phrase[0], phrase[1] if len(phrase) > 1 else ("",)):
                index.setdefault(first, {}).setdefault(second, []).append((rest, language))
    return index


def _phrases(text: str) -> Iterator[list[tuple[str, ...]]]:
    """The phrases of a list, each as its words with their alternatives."""
    names: dict[str, str] = {}
    for line in text.splitlines():
        for name in sorted(names, key=len, reverse=True):
            line = line.replace(name, names[name])
        if line.startswith("@"):
            name, _, words = line.partition(" = ")
            names[name] = words
            continue
        choices = [
            ((tuple(word[:-1].split("|")),), ()) if word.endswith("?") else ((tuple(word.split("|")),),)
            for word in line.split()
        ]
        for chosen in product(*choices):
            phrase = [words for part in chosen for words in part]
            if phrase:
                yield phrase


HELP: Mapping[Language, str] = {
    Language.ENGLISH: """\
I'm glad you wrote this, and it comes before any goal. If you or someone else could be in danger, please call \
your local emergency number now: 112 in Europe, 911 in the US and Canada, 999 in the UK.

People who listen, day and night, free of charge:
- US and Canada: call or text 988
- UK and Ireland: Samaritans, 116 123
- If someone hurts or threatens you: US 1-800-799-7233, UK 0808 2000 247
- Spain 024, Germany 0800 111 0 111, France 3114, Portugal 808 24 24 24, Brazil 188
- Everywhere else: findahelpline.com

If you can, go to someone you trust or call them now, so that you are not alone with this. I am only a program \
and can't give you the help that a person can, and you deserve that help.""",
    Language.SPANISH: """\
Me alegra que lo hayas escrito, y esto va antes que cualquier objetivo. Si tú u otra persona podéis estar en \
peligro, llama ahora al número de emergencias: 112 en Europa, 911 en gran parte de América.

Personas que escuchan, de día y de noche, gratis:
- España: 024 (conducta suicida), 016 (violencia de género)
- Estados Unidos: 988, también en español
- En los demás países: findahelpline.com
- Alemania 0800 111 0 111, Francia 3114, Portugal 808 24 24 24, Brasil 188, Reino Unido e Irlanda 116 123

Si puedes, acércate ahora a alguien de confianza o llámale, para no estar a solas con esto. Soy solo un programa \
y no puedo darte la ayuda que puede darte una persona, y tú mereces esa ayuda.""",
    Language.GERMAN: """\
Gut, dass du das geschrieben hast; es geht jedem Ziel vor. Wenn du oder jemand anderes in Gefahr sein könnte, \
rufe bitte jetzt den Notruf: 112.

Menschen, die zuhören, Tag und Nacht, kostenlos:
- Deutschland: TelefonSeelsorge, 0800 111 0 111 oder 116 123
- Österreich: 142, Schweiz: 143
- Wenn dir jemand Gewalt antut oder droht: 116 016 (Deutschland)
- Überall sonst: findahelpline.com
- Frankreich 3114, Spanien 024, Portugal 808 24 24 24, Brasilien 188, USA und Kanada 988

Geh jetzt, wenn du kannst, zu jemandem, dem du vertraust, oder rufe dort an, damit du nicht allein damit bist. \
Ich bin nur ein Programm und kann dir nicht so helfen wie ein Mensch, und diese Hilfe steht dir zu.""",
    Language.FRENCH: """\
Tu as bien fait de l'écrire, et cela passe avant tout objectif. Si toi ou quelqu'un d'autre êtes peut-être en \
danger, appelle tout de suite les urgences : 112 en Europe (15 ou 17 en France), 911 au Canada.

Des personnes qui écoutent, jour et nuit, gratuitement :
- France : 3114 (prévention du suicide), 3919 (violences faites aux femmes)
- Canada : 988 ; Belgique : 0800 32 123 ; Suisse : 143
- Partout ailleurs : findahelpline.com
- Espagne 024, Allemagne 0800 111 0 111, Portugal 808 24 24 24, Brésil 188, Royaume-Uni et Irlande 116 123

Si tu peux, va maintenant vers quelqu'un de confiance ou appelle cette personne, pour ne pas rester sans \
personne avec cela. Je ne suis qu'un programme et je ne peux pas t'aider comme le ferait un être humain, et tu \
mérites cette aide.""",
    Language.PORTUGUESE: """\
Ainda bem que você escreveu isso; vem antes de qualquer objetivo. Se você ou outra pessoa pode estar em perigo, \
ligue agora para a emergência: 112 em Portugal, 192 ou 190 no Brasil.

Pessoas que escutam:
- Brasil: CVV, 188, dia e noite, gratuito; violência contra a mulher: 180
- Portugal: SNS 24, 808 24 24 24; violência doméstica: 800 202 148
- Nos outros países: findahelpline.com
- Espanha 024, França 3114, Alemanha 0800 111 0 111, Estados Unidos e Canadá 988, Reino Unido e Irlanda 116 123

Se puder, vá agora até alguém de confiança ou telefone, para não ficar sem companhia com isso. Sou apenas um \
programa e não posso dar a ajuda que uma pessoa pode dar, e você merece essa ajuda.""",
}
"""The one answer to a crisis, in each language."""

AFTERWARDS: Mapping[Language, str] = {
    Language.ENGLISH: (
        "Thank you for writing again after what you shared; if any of it is close, 112, 911 or 999, 988,"
        " Samaritans on 116 123 and findahelpline.com are there at any hour."
    ),
    Language.SPANISH: (
        "Gracias por volver a escribir después de lo que contaste; si algo de eso sigue cerca, el 112 o el 911,"
        " el 024 en España y findahelpline.com están ahí a cualquier hora."
    ),
    Language.GERMAN: (
        "Danke, dass du nach dem, was du geschrieben hast, wieder schreibst; wenn es noch nah ist, sind 112,"
        " 0800 111 0 111 und findahelpline.com zu jeder Stunde da."
    ),
    Language.FRENCH: (
        "Merci d'écrire à nouveau après ce que tu as confié ; si c'est encore là, le 112, le 3114 en France et"
        " findahelpline.com répondent à toute heure."
    ),
    Language.PORTUGUESE: (
        "Obrigado por escrever de novo depois do que você contou; se isso ainda estiver por perto, o 112 ou o 192,"
        " o 188 no Brasil, o 808 24 24 24 em Portugal e findahelpline.com estão à disposição a qualquer hora."
    ),
}
"""One sentence before the conversation goes on."""
