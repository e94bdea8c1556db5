"""What the coach says besides its questions. Banks of sentences, used in turn."""

from collections.abc import Mapping

from adapters.practice.intents import Intent
from adapters.practice.language import Language
from core.model.agent import Domain

_TOPIC: Mapping[Domain, str] = {
    Domain.CAREER: " for work and career",
    Domain.HEALTH: " for health and habits",
    Domain.RELATIONSHIP: " for relationships",
    Domain.GENERAL: "",
}

INTRODUCTION: Mapping[Domain, str] = {
    domain: f"I'm the built-in practice coach{topic}: prepared questions and a few rules, no AI model."
    for domain, topic in _TOPIC.items()
}
"""Said once, in the first reply."""

HELLO = "Hello, "

# How the person's own words are given back.

REFLECT = (
    "So {0}.",
    "What I hear is that {0}.",
    "{1}.",
    "If I follow you, {0}.",
    "I hear you: {0}.",
    "You tell me that {0}.",
)
REFLECT_QUOTED = (
    "{0}: I'll stay with your words.",
    "You say {0}.",
    "{0}, I hear.",
    "{0}: that is worth a closer look.",
    "{0} is how you put it.",
)
WANT = (
    "So you want {0}.",
    "You want {0}: that gives us a direction.",
    "You want {0}; let's take that as our direction.",
)
WANT_QUOTED = (
    "{0}: that gives us a direction.",
    "{0}; let's take that as our direction.",
)
QUOTING: Mapping[str, tuple[str, ...]] = {
    "goal": (
        "{0}: let's take that as our direction.",
        "{0}: that gives us something to aim for.",
        "{0} it is.",
    ),
    "several": (
        "{0}: there is more than one way, then.",
        "{0}: that is already a choice of ways.",
        "{0}: good to have them side by side.",
    ),
    "option": (
        "{0}: that is one way.",
        "{0} goes on the list.",
        "{0}: noted.",
    ),
    "choice": (
        "{0}: that is your pick, then.",
        "{0} it is, then.",
        "{0}: good, you know which.",
    ),
    "step": (
        "{0}: that is something one can see happen.",
        "{0}: clear enough to do.",
        "{0}: that sounds like you mean it.",
    ),
    "when": (
        "{0}: now it has its place.",
        "{0}, then.",
        "{0}: that is a date.",
    ),
    "keep": (
        "{0}: that is worth keeping.",
        "{0}: hold on to that.",
        "{0}: a good thing to take along.",
    ),
}

# Between the stages.

TO_NOW = (
    "Before we look for ways, let's look at where you start from.",
    "Let's see where you are today.",
    "Before any plans, a look around.",
)
TO_OPTIONS = (
    "Now for possibilities; we can judge them later.",
    "Let's collect some ways before we weigh them.",
    "Let's see what is possible.",
)
TO_STEP = (
    "Now let's make it concrete.",
    "Let's bring it down to something you can do.",
    "Time to turn it into a step.",
)
WHAT_ABOUT_IT = (
    "What about it would you like to be different?",
    "What would you like to happen there?",
    "How would you wish it to be?",
)
INSTEAD = (
    "What would you like to have instead?",
    "If you could turn that round, how would it be?",
    "What do you wish for in its place?",
)
NEXT = (
    "What would you like to look at next?",
    "Is there something else that you would like to think through?",
    "What would be good to turn to now?",
)

# The step, and how it went.

SAVED = (
    "I have saved it together with your goal.",
    "It is saved with your goal now.",
    "Goal and step are saved.",
)
NOT_SAVED = (
    "I could not save it just now, so please keep a note of it yourself.",
    "Saving it did not work, so a note of your own would be wise.",
    "It could not be saved this time; best write it down.",
)
NOT_READ = "I could not read your saved goals just now."
NUMBER_HIGH = (
    "{0}: that stands on firm ground.",
    "{0} is a good deal of confidence.",
    "{0}: then there is not much in its way.",
)
NUMBER_LOW = (
    "{0}: thank you for being frank about it.",
    "{0} tells us that something about it is still too big.",
    "{0}: then let's see what is missing.",
)
SURE = (
    "That sounds settled.",
    "Good, then it has every chance.",
    "Then you are as good as under way.",
)
HONEST = (
    "Good to be honest about that.",
    "A doubt is useful: it knows something.",
    "Then let's listen to the doubt.",
)
AS_IT_IS = (
    "Then we leave the step as it is.",
    "All right, the step can stay as it is.",
    "Then it stays the way you said.",
)
NO_STEP = (
    "Not to decide on a step today is a decision too.",
    "Then there is no step for today, and that is fine.",
)
FAREWELL = (
    "Go well with it; when you are back, tell me how it went or bring something new.",
    "I wish you well with it; come back any time, with news or with something else.",
    "Take it at your own pace, and come back whenever you like.",
)
WELL_DONE = (
    "Well done: that was your own doing.",
    "You did what you set out to do.",
    "That is a step taken, and it was yours.",
)
NOT_DONE = (
    "That happens, and it tells us something.",
    "Not yet, then; no harm done.",
    "Good that you say so; a step not taken is news too.",
)

WHAT_HAPPENED = (
    "What got in the way?",
    "What happened instead?",
    "What made it hard?",
)

# Short answers.

YES = (
    "Good; a few words more would help me to follow.",
    "Yes, and I'd like to hear a little more.",
    "All right; tell me a little more about it.",
)
UNSURE = (
    "That's all right, not knowing is a fair place to start.",
    "No hurry; let's come at it from another side.",
    "It need not be clear yet.",
)
NO_IS_FINE = (
    "No is an answer too.",
    "That's fine; let me try another door.",
    "All right, then differently.",
)
LEAVE_OPEN = (
    "We can leave that open and go on.",
    "Then that may stay open for now.",
    "Let's let that rest.",
)
NOTHING = (
    "Nothing so far: then the field is open.",
    "Good to know that there is nothing yet.",
    "Then we can begin with a clean page.",
)
ENOUGH = (
    "That is enough to work with.",
    "Good, then we have what we need.",
    "Then let's take what is there.",
)
FINE = (
    "All right.",
    "That's fine.",
    "Good.",
)
GLADLY = (
    "Gladly.",
    "Let's go.",
    "All right, let's begin.",
)
WORDLESS = (
    "I can only read words, so please put it into a few.",
    "I did not find any words in that.",
    "That went past me, since I read words only.",
)
CANT_SEE = "I can't see pictures or read files, so please tell me in words what matters to you in it."

# Turning to the coach.

HELLO_AGAIN = (
    "Hello again.",
    "Good to see you back.",
    "Hello, here we are again.",
)
WELCOME = (
    "You're welcome.",
    "Gladly.",
    "It was your thinking; I only asked.",
)
BYE = (
    "Goodbye, and take care.",
    "Take care of yourself.",
    "Until another time.",
)
KEEP_PLACE = (
    "When you write again, we go on from where we are.",
    "Our place is kept; just write when you like.",
)
AGAIN = (
    "Let me put it in other words.",
    "Here is the same question from another side.",
    "Let me ask it differently.",
)
AFRESH = (
    "A fresh start, then.",
    "All right, we begin anew.",
    "Good, something new.",
)
ANNOYED = (
    "That's fair, I only have prepared questions and some of them miss.",
    "I hear that this is not helping, and I am a simple program.",
    "You are right to say so.",
)
ADVICE = (
    "I have no advice to give, only questions; your own ideas will fit your life better.",
    "That I can't judge for you, and you know far more about it than I do.",
    "I leave the deciding to you, and help you think.",
)
GENTLY = (
    "If you would like to go on, we can do so slowly.",
    "There is no hurry with anything else; if you want to go on, here is where we were.",
    "Only if you feel like it, we can go on where we were.",
)
GENTLY_BEGIN = (
    "If you would like to, we can begin slowly.",
    "There is no hurry; if you want to begin, here is a first question.",
)
TOWARDS_HELP = (
    "Who could you turn to with this?",
    "What would make it easier for you to ask for that help?",
    "What would be a first move towards that help?",
)
ABOUT: Mapping[Intent, tuple[str, ...]] = {
    Intent.HUMAN: (
        (
            "I'm not a human, and not an AI model either: I'm the built-in practice coach, a program with "
            "prepared questions that works by fixed rules."
        ),
        "No human here, just a small program with prepared questions.",
    ),
    Intent.PROFESSION: (
        (
            "No, I'm a program without any qualification: I ask coaching questions, and for medical, legal or "
            "psychological matters a professional is the right person."
        ),
        "I'm none of that, only a program that asks coaching questions.",
    ),
    Intent.WHO: (
        (
            "I'm the built-in practice coach: a program with prepared questions and fixed rules, no AI model "
            "and no human."
        ),
        "As I said, the practice coach: a small program that asks questions.",
    ),
    Intent.ABILITIES: (
        (
            "I'm the built-in practice coach, a program without an AI model: I ask you questions, one at a time,"
            " from what you want to a step that you choose. Say \u201cmy goals\u201d to see what is saved, or"
            " \u201cstart over\u201d for a new topic."
        ),
        "I ask, you think: first the goal, then how things stand, then what is possible, then a step.",
    ),
    Intent.PRIVACY: (
        (
            "This conversation is stored by the service that you are using, so that we can go on another time; "
            "I send it to no AI provider. Its operator can tell you who may read it."
        ),
        "It is stored by this service and goes to no AI provider; the operator knows the rest.",
    ),
}

ENGLISH_ONLY: Mapping[Language | None, str] = {
    Language.SPANISH: (
        "Hola, soy el coach de práctica incorporado: un programa con preguntas preparadas, sin modelo de "
        "IA, y por desgracia solo hablo inglés. Las palabras de emergencia sí las entiendo en español. Si "
        "te va bien, escribe en inglés y seguimos. (I'm the practice coach and speak English only.)"
    ),
    Language.GERMAN: (
        "Hallo, ich bin der eingebaute Übungscoach: ein Programm mit vorbereiteten Fragen, ohne KI-Modell, "
        "und ich spreche leider nur Englisch. Worte in Not verstehe ich auch auf Deutsch. Wenn es für dich "
        "geht, schreib auf Englisch, dann machen wir weiter. (I'm the practice coach and speak English "
        "only.)"
    ),
    Language.FRENCH: (
        "Bonjour, je suis le coach d'exercice intégré : un programme avec des questions préparées, sans "
        "modèle d'IA, et je ne parle malheureusement que l'anglais. Les mots de détresse, je les comprends "
        "aussi en français. Si cela te va, écris en anglais et nous continuons. (I'm the practice coach "
        "and speak English only.)"
    ),
    Language.PORTUGUESE: (
        "Olá, sou o coach de prática embutido: um programa com perguntas preparadas, sem modelo de IA, e "
        "infelizmente só falo inglês. Palavras de emergência eu entendo também em português. Se puder, "
        "escreva em inglês e seguimos. (I'm the practice coach and speak English only.)"
    ),
    None: (
        "I'm the built-in practice coach: prepared questions, no AI model, and I'm sorry to say that I "
        "speak English only. Words of crisis I also understand in Spanish, German, French and Portuguese. "
        "If English works for you, please write in English and we go on. For urgent help in your language, "
        "findahelpline.com lists where to call."
    ),
}
