"""The questions: several of each kind, in the words of each domain. Every one ends in its only question mark."""

from collections.abc import Mapping

from adapters.practice.steps import Step
from core.model.agent import Domain

QUESTIONS: Mapping[Domain, Mapping[Step, tuple[str, ...]]] = {
    Domain.CAREER: {
        Step.GOAL: (
            "What would you like to be different about your work?",
            "If this talk turns out to be useful, what will you know or have decided about your work at its end?",
            (
                "Think of a working week half a year from now that you would be glad to have: what is in it that "
                "isn't there today?"
            ),
        ),
        Step.SIGN: (
            "How would you notice, on an ordinary working day, that you had got there?",
            "What would a colleague see you doing differently once this has worked out?",
            "What would it give you that you don't have now?",
        ),
        Step.NOW: (
            "How do things stand at the moment?",
            "What does a typical working day look like right now, as far as this is concerned?",
            "What has already happened in this direction, however little?",
        ),
        Step.OBSTACLE: (
            "What have you tried so far, and what came of it?",
            "What gets in the way most often?",
            "Which part of this is in your own hands?",
        ),
        Step.OPTIONS: (
            "Leaving aside what is realistic for a moment, which two or three things could you do?",
            "If nobody's opinion counted but yours, what could you try?",
            "Think of someone who has managed something like this: what could you take from how they did it?",
        ),
        Step.CHOICE: (
            "Which of these would move you furthest for the effort it takes?",
            "Which one do you feel some energy for, and not just duty?",
            "If you did only one of them this month, which should it be?",
        ),
        Step.STEP: (
            "What exactly will you do first, and on which day?",
            "What is the smallest step that would count as a real start, and when will you take it?",
            "What will you have done by this time next week, and when will you do it?",
        ),
    },
    Domain.HEALTH: {
        Step.GOAL: (
            "What would you like to be different about how you live or feel from day to day?",
            "If one thing about your days were a little healthier a month from now, what should it be?",
            "Think of a day on which you feel well: what is in it that you would like to have more often?",
        ),
        Step.SIGN: (
            "What would you notice first, in an ordinary week, if this were going well?",
            "What would it let you do that is hard at the moment?",
            "What makes this matter to you now?",
        ),
        Step.NOW: (
            "What does a normal day look like at the moment, as far as this goes?",
            "How do things stand right now?",
            "When in your week does it already go a little better?",
        ),
        Step.OBSTACLE: (
            "What have you tried before, and what did you learn from it?",
            "At which moment of the day does it usually slip?",
            "What makes it hard to keep up?",
        ),
        Step.OPTIONS: (
            "Which two or three small changes could you imagine, however modest?",
            "What could you tie to something that you do every day anyway?",
            "If it had to be easy and take five minutes, what could you do?",
        ),
        Step.CHOICE: (
            "Which of these would you still manage on a tired day?",
            "Which one appeals to you most?",
            "Which of them would make the others easier?",
        ),
        Step.STEP: (
            "What exactly will you do, and on which day do you begin?",
            "What is the smallest version that would still count, and when will you do it first?",
            "Where and when will you do it for the first time?",
        ),
    },
    Domain.RELATIONSHIP: {
        Step.GOAL: (
            "What would you like to be different between you and the people this is about?",
            "What do you wish for, for your own part in it?",
            "If a good talk lay behind you a month from now, what would have changed?",
        ),
        Step.SIGN: (
            "What would be the first small sign that it is getting better?",
            "How would you act on a day when this is as you wish?",
            "What would it mean to you if it came about?",
        ),
        Step.NOW: (
            "How is it between you at the moment?",
            "What happened the last time this came up?",
            "What do you do, and what do you feel, when it happens?",
        ),
        Step.OBSTACLE: (
            "What have you already tried or said, and how was it received?",
            "What makes it hard to say or do what you would like to?",
            "Which part of this is yours to change?",
        ),
        Step.OPTIONS: (
            "Leaving their reaction aside for a moment, which two or three things could you do or say?",
            "What could you ask for, offer, or say no to?",
            "What did you do at a time when things were easier between you?",
        ),
        Step.CHOICE: (
            "Which of these feels most like you?",
            "Which one could you do with a calm heart, whatever the answer?",
            "Which of them would you be glad to have done a year from now?",
        ),
        Step.STEP: (
            "What exactly will you say or do, and when?",
            "How would you begin, in your own words, and on which day?",
            "What is the first small step, and what would be a good moment for it?",
        ),
    },
    Domain.GENERAL: {
        Step.GOAL: (
            "What would you like to be different?",
            "If this talk turns out to be useful, what will be clearer to you at its end?",
            "What would you be glad to have begun, decided or let go a month from now?",
        ),
        Step.SIGN: (
            "How would you notice that it had come true?",
            "What would it change in an ordinary week?",
            "What makes this important to you just now?",
        ),
        Step.NOW: (
            "How do things stand today?",
            "What is happening at the moment, as far as this is concerned?",
            "What is already there that you can build on?",
        ),
        Step.OBSTACLE: (
            "What have you tried so far, and what did it bring?",
            "What holds you back most?",
            "What would you have to give up for it, or put up with?",
        ),
        Step.OPTIONS: (
            "Which two or three things could you do, if you don't judge them yet?",
            "If time and money were no matter, what would you try?",
            "What would you do here if you were ten percent bolder?",
        ),
        Step.CHOICE: (
            "Which of these draws you most?",
            "Which one would make the biggest difference?",
            "If you could keep only one of them, which would it be?",
        ),
        Step.STEP: (
            "What exactly will you do first, and when?",
            "What is the very first step, and on which day will you take it?",
            "What will you do about it within the next week, and when?",
        ),
    },
}

COMMON: Mapping[Step, tuple[str, ...]] = {
    Step.MORE: (
        "And what else could you do?",
        "What else comes to mind, even if it is a little unusual?",
        "Suppose that way were closed: what would you do instead?",
    ),
    Step.WHEN: (
        "When will you do it, to the day and roughly the hour?",
        "Which day would suit it, and what time?",
        "What would be a good moment for it this week?",
    ),
    Step.CONFIDENCE: (
        "How sure are you, from 0 to 10, that you will do it?",
        "On a scale from 0 to 10, how likely is it that this will really happen?",
        "From 0 to 10, how confident are you about doing it?",
    ),
    Step.RAISE: (
        "What would make it one point higher?",
        "What could you make smaller or easier about it, so that the number goes up by one?",
        "Who or what could help you to get one point higher?",
    ),
    Step.TAKEAWAY: (
        "What do you take with you from this?",
        "Which thought from this talk do you want to keep?",
        "What is clearer now than at the beginning?",
    ),
    Step.CHECK_IN: (
        "How did it go?",
        "What has happened since?",
        "What is there to tell?",
    ),
    Step.LEARNED: (
        "What did you do that made it work?",
        "What did you find out about yourself in doing it?",
        "What helped you to do it?",
    ),
}

SMALLER: Mapping[Step, tuple[str, ...]] = {
    Step.GOAL: (
        "What has been on your mind most often this week?",
        "Perhaps from the other end: what would you be glad to have less of?",
        "If tomorrow were a little better than today, what would you notice first?",
    ),
    Step.SIGN: (
        "Imagine that it has worked: what is different in the first hour of the day?",
        "Who would notice it first, and by what?",
    ),
    Step.NOW: (
        "Take just yesterday as a sample: what happened?",
        "What would someone who knows you well say about how things stand?",
    ),
    Step.OBSTACLE: (
        "When was it a little easier than usual, if only once?",
        "What is the first small thing that comes to mind when you think of doing it?",
    ),
    Step.OPTIONS: (
        "What would you suggest to a good friend in your place?",
        "What has helped you with something similar before?",
        "What would be the least you could do about it, in ten minutes or so?",
    ),
    Step.CHOICE: (
        "Which one would you be sorry to leave undone?",
        "If a coin had to decide, which one would you be hoping for?",
    ),
    Step.STEP: (
        "What could you do about it in ten minutes, today or tomorrow?",
        "What would have to come even before that, as the very first move?",
    ),
    Step.WHEN: ("Would today, tomorrow or the weekend suit it best?",),
    Step.CONFIDENCE: ("A rough guess is enough: is it closer to 3, to 6 or to 9?",),
}
"""Easier ways into the same step, for someone who does not know."""


def questions(domain: Domain, step: Step) -> tuple[str, ...]:
    """The questions of a step."""
    return QUESTIONS[domain].get(step) or COMMON[step]
