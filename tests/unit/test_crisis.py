"""Words of crisis are heard in five languages, and figures of speech are let pass."""

import pytest

from adapters.practice.crisis import AFTERWARDS, HELP, detect
from adapters.practice.language import Language, guess_language, plain_words

HEARD = {
    Language.ENGLISH: [
        "I want to kill myself",
        "i wanna die",
        "I\u2019m thinking about ending my life.",
        "Lately I've been feeling suicidal",
        "I DON'T WANT TO LIVE ANYMORE",
        "i dont want to be alive",
        "Everyone would be better off without me",
        "I wish I was dead",
        "I wish I had never been born",
        "sometimes I feel like hurting myself",
        "I've been cutting myself again",
        "I am going to hurt myself tonight",
        "there's no reason to live",
        "There is nothing left to live for.",
        "I took too many pills",
        "I might overdose",
        "My husband hits me",
        "he beat me up last night",
        "I'm being abused at home",
        "I was raped",
        "I'm scared of my boyfriend",
        "I don't feel safe at home",
        "she threatened to kill me",
        "my life is in danger",
        "He won't let me leave the house.",
        "my partner is abusive",
        "I want to kill my boss",
        "I'm going to stab him",
        "I am afraid I will hurt my baby",
        "I keep having thoughts of killing someone",
        "I hit my wife yesterday",
        "So anyway, work is fine, but\nhonestly I just want to\ndie.",
        "I want to\u00a0  kill   my self",
        "K\u200bill myself",
        "\N{MATHEMATICAL BOLD CAPITAL I} want to d\N{MATHEMATICAL BOLD SMALL I}e",
        "This deadline is killing me and I want to end it all",
        "I'm not going to hurt him but I want to kill myself",
        "I don't want to kill myself but I can't stop thinking about it",
        "He hit me in the face",
        "My husband beats me at night",
        "my dad hits me with a belt",
        "I beat my wife in front of the kids",
        "I want to take my life in my bathroom tonight",
        "I'm tired of living with this pain",
        "I'm in danger",
    ],
    Language.SPANISH: [
        "Quiero morir",
        "Me quiero morir",
        "No quiero vivir más",
        "ya no quiero vivir",
        "He pensado en suicidarme",
        "Tengo ganas de matarme",
        "quiero quitarme la vida",
        "Estarían mejor sin mí",
        "Quiero hacerme daño",
        "Mi marido me pega",
        "mi novio me ha golpeado",
        "Me maltratan en casa",
        "Estoy en peligro",
        "Sufro violencia doméstica",
        "Voy a matarlo",
        "Quiero matar a mi jefe",
        "Creo que el suicidio es la única salida que tengo",
    ],
    Language.GERMAN: [
        "Ich will mich umbringen",
        "Ich möchte sterben",
        "ich will nicht mehr leben",
        "Ich denke an Selbstmord",
        "Ich habe Suizidgedanken",
        "Ich ritze mich wieder",
        "Ohne mich wären alle besser dran, ich will tot sein",
        "Ich möchte mir das Leben nehmen",
        "Ich habe Angst, mir etwas anzutun",
        "Mein Mann schlägt mich",
        "mein freund schlaegt mich",
        "Er hat mich vergewaltigt",
        "Ich werde zu Hause bedroht",
        "Ich bin in Gefahr",
        "Häusliche Gewalt ist bei uns normal",
        "Ich könnte meinen Chef umbringen",
        "Am liebsten würde ich ihn töten",
    ],
    Language.FRENCH: [
        "Je veux mourir",
        "J'ai envie de mourir",
        "je veux me tuer",
        "Je pense au suicide tous les jours",
        "J\u2019ai des idées suicidaires",
        "Je ne veux plus vivre",
        "Je ne veux plus vivre avec cette douleur",
        "Je n'ai plus envie de vivre",
        "Je veux mettre fin à mes jours",
        "je veux en finir",
        "Je me scarifie",
        "Mon mari me frappe",
        "Il m'a violée",
        "Je suis en danger",
        "J'ai peur de mon copain",
        "Je subis des violences conjugales",
        "Je vais le tuer",
        "J'ai envie de tuer quelqu'un",
    ],
    Language.PORTUGUESE: [
        "Quero morrer",
        "Eu quero me matar",
        "quero matar-me",
        "Não quero mais viver",
        "Estou pensando em suicídio",
        "Tenho vontade de me cortar",
        "Vou acabar com a minha vida",
        "Queria estar morta",
        "Não aguento mais viver",
        "Meu marido me bate",
        "ele bateu em mim",
        "Fui estuprada",
        "Estou em perigo",
        "Tenho medo do meu namorado",
        "Sofro violência doméstica em casa",
        "Vou matar ele",
        "Quero matar meu chefe",
    ],
}

LET_PASS = [
    "This deadline is killing me",
    "I'm dying to know what they think",
    "I'd like to kill two birds with one stone",
    "My feet are killing me after the run",
    "I killed it in the interview",
    "I want to kill it at the presentation",
    "I nearly died of embarrassment",
    "I could die laughing",
    "He beat me to the promotion",
    "She beat me at chess",
    "It hit me that I never asked",
    "They hit me with another deadline",
    "It hits me when I am alone",
    "Hit me up on Monday",
    "I keep shooting myself in the foot",
    "I'm drowning myself in work",
    "I cut myself shaving",
    "I hurt myself at the gym last week",
    "I don't want to hurt her feelings",
    "I never want to hurt him again by being careless",
    "My job is in danger",
    "I am in danger of losing my job",
    "I want to take my life in a new direction",
    "I want to take my life back",
    "It would be career suicide",
    "I want to end this relationship",
    "I'm thinking about ending it with my boyfriend",
    "I don't want to live in London any longer",
    "I'm tired of being overlooked",
    "I'm tired of living with my parents",
    "I take all my meds in the morning",
    "a dessert to die for",
    "My manager kicked me off the project",
    "I'm scared of her reaction",
    "I want to beat my own record",
    "I overdosed on coffee",
    "dead tired, dead end job, deadline",
    "This skill is not worth it, living costs are high",
    "Me muero de hambre",
    "Quiero morirme de risa",
    "Este trabajo me mata",
    "Quiero matar el tiempo",
    "Quiero cortarme el pelo",
    "Der Stress bringt mich um",
    "Das macht mir das Leben schwer",
    "Mein Job ist in Gefahr",
    "Ich lache mich tot",
    "Ich will leben und gesund bleiben",
    "Je veux vivre à Paris",
    "Je ne veux plus vivre à Paris",
    "Je meurs de faim",
    "J'ai peur de lui dire",
    "Je me suis battue pour ce poste",
    "Mon poste est en danger",
    "Je veux en finir avec ce projet",
    "Estou morrendo de fome",
    "Vou matar a saudade da minha mãe",
    "Quero viver em Lisboa",
    "Corro todos os dias",
    "",
    "🙂 ... 123",
]


@pytest.mark.parametrize(
    ("language", "text"), [(language, text) for language, texts in HEARD.items() for text in texts]
)
def test_words_of_crisis_are_heard(language: Language, text: str) -> None:
    assert detect(text) is language


@pytest.mark.parametrize("text", LET_PASS)
def test_figures_of_speech_are_let_pass(text: str) -> None:
    assert detect(text) is None


@pytest.mark.parametrize("language", list(Language))
def test_every_language_has_at_least_eight_examples_here(language: Language) -> None:
    assert len(HEARD[language]) >= 8


def test_words_are_found_whole_only() -> None:
    assert detect("the suicidalist band") is None
    assert detect("suicidal") is Language.ENGLISH


def test_words_are_found_deep_in_a_long_text() -> None:
    assert detect("all is well. " * 4000 + "I want to die. " + "all is well. " * 1000) is Language.ENGLISH


@pytest.mark.parametrize("language", list(Language))
@pytest.mark.parametrize(
    "number",
    ["112", "988", "116 123", "024", "0800 111 0 111", "3114", "808 24 24 24", "188", "findahelpline.com"],
)
def test_every_help_text_says_where_to_find_help_everywhere(language: Language, number: str) -> None:
    assert number in HELP[language]


@pytest.mark.parametrize("language", list(Language))
def test_help_is_in_its_own_language_and_asks_nothing(language: Language) -> None:
    assert guess_language(HELP[language]) is language
    assert guess_language(AFTERWARDS[language]) is language
    assert "?" not in HELP[language] + AFTERWARDS[language]
    assert "findahelpline.com" in AFTERWARDS[language]
    assert AFTERWARDS[language].count(". ") == 0, "one sentence"


def test_english_help_names_the_emergency_numbers() -> None:
    for number in ("112", "911", "999"):
        assert number in HELP[Language.ENGLISH]


def test_plain_words() -> None:
    assert plain_words("Don\u2019t  CAFÉ—straße, l'été!\n1") == ["dont", "cafe", "strasse", "lete", "1"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("I want a better job", Language.ENGLISH),
        ("better work-life balance", Language.ENGLISH),
        ("as soon as possible", Language.ENGLISH),
        ("Quiero un trabajo mejor y más tiempo", Language.SPANISH),
        ("hola", Language.SPANISH),
        ("Ich möchte mehr Zeit für mich", Language.GERMAN),
        ("Je voudrais changer de travail", Language.FRENCH),
        ("Eu preciso de ajuda com o meu trabalho", Language.PORTUGUESE),
        ("Vorrei un lavoro che mi piace di più, ma non so quale voglio", None),
        ("Я хочу новую работу", None),
        ("仕事を変えたい", None),
        ("7", Language.ENGLISH),
        ("🙂", Language.ENGLISH),
    ],
)
def test_the_language_of_a_text_is_guessed(text: str, language: Language | None) -> None:
    assert guess_language(text) is language


@pytest.mark.parametrize(
    "text",
    [
        "I don't want to live",
        "I don\N{ACUTE ACCENT}t want to live",
        "I do not want to live",
        "I wish I wouldn't wake up tomorrow",
        "I hurt myself yesterday",
        "I have a gun and I want to use it on myself",
        "I want to be dead",
        "no one would miss me if I were gone",
        "i want 2 die",
        "thinking of sucide",
        "no quiero vivir",
        "no hay motivo para vivir",
        "quiero desaparecer",
        "ich will nicht leben",
        "ich wünschte ich wäre tot",
        "mein Leben hat keinen Sinn mehr",
        "ich halte das Leben nicht mehr aus",
        "ich habe keinen Lebenswillen mehr",
        "ich will mich verletzen",
        "ich will Schluss machen mit dem Leben",
        "ich will, dass alles vorbei ist",
        "je ne veux pas vivre",
        "je voudrais être mort",
        "je veux disparaître",
        "não quero viver",
        "quero sumir",
        "quero desaparecer",
        "não vejo sentido em viver",
        "I took a whole bottle of pills",
        "I'm afraid he will hurt me",
        "I feel like dying",
        "I might hurt myself tonight",
    ],
)
def test_plain_words_are_heard(text: str) -> None:
    assert detect(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "I don't want to live with my parents",
        "I don't want to live in this city",
        "no quiero vivir en Madrid",
        "ich will nicht leben wie meine Eltern",
        "je ne veux pas vivre ici",
        "não quero viver com a minha sogra",
        "I work in suicide prevention",
        "this job is suicide for my career",
    ],
)
def test_where_and_with_whom_to_live_is_no_crisis(text: str) -> None:
    assert detect(text) is None
