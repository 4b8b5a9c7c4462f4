"""Tasks on messages of customers: which desk answers, and how soon.

Every message carries both, so that the two label sets compete for the same input.
"""

from __future__ import annotations

from cit_fast.data.builtin.kinds import Draw, Kind
from cit_fast.data.builtin.words import CITIES, GOODS, MONTHS

# {thing}, {city}, {month} and {order} are filled in. The requests of one label are divided among the splits.
REQUESTS: dict[str, tuple[str, ...]] = {
    "billing": (
        "I was charged twice for the {thing}.",
        "The {month} invoice is too high.",
        "Why is there a fee on bill {order}?",
        "My card was debited for order {order} two times.",
        "The tax on the {thing} is wrong.",
        "Please send me the invoice for order {order}.",
        "Your {month} bill lists a {thing} I never bought.",
        "The payment for the {thing} shows up twice.",
        "The discount is missing from invoice {order}.",
        "Can I pay for the {thing} by bank transfer?",
        "You took too much money in {month}.",
        "My {month} payment was not booked.",
        "The price on invoice {order} is not what we agreed.",
        "I paid bill {order} and still get reminders.",
        "There is a wrong charge for the {thing}.",
        "I need a receipt for the {month} payment.",
    ),
    "shipping": (
        "Where is parcel {order}?",
        "The {thing} has not arrived yet.",
        "The courier left the {thing} in {city}.",
        "When will order {order} reach {city}?",
        "Tracking for parcel {order} stopped in {city}.",
        "Please bring the {thing} to our office in {city}.",
        "The van with the {thing} never came.",
        "The {thing} is late.",
        "Has the {thing} been dispatched?",
        "Parcel {order} went to the wrong address.",
        "The driver could not find us in {city}.",
        "Can you deliver the {thing} to {city}?",
        "My package has been stuck in {city} since {month}.",
        "The delivery of the {thing} was promised for {month}.",
        "Please change the delivery address to {city}.",
        "Nobody delivered order {order}.",
    ),
    "returns": (
        "I want to send the {thing} back.",
        "The {thing} broke, please replace it.",
        "How do I return order {order}?",
        "The {thing} does not fit, can I exchange it?",
        "I got a damaged {thing}.",
        "Please take the {thing} back.",
        "The {thing} is faulty and I want a new one.",
        "I would like to swap the {thing} for another color.",
        "Where do I send the broken {thing}?",
        "The {thing} arrived cracked.",
        "I changed my mind about the {thing}, can it go back?",
        "Send me a return label for the {thing}.",
        "This {thing} is the wrong size, I will return it.",
        "The {thing} stopped working after a week, I want a replacement.",
        "May I bring the {thing} back to the shop in {city}?",
        "The {thing} has a scratch, please exchange it.",
    ),
    "account": (
        "I cannot log in.",
        "I forgot my password.",
        "Please change my user name.",
        "The login code never reaches my phone.",
        "My profile has been locked since {month}.",
        "Please delete my profile.",
        "How do I change my password?",
        "The site says my user name is unknown.",
        "I have a new e-mail address, please update my profile.",
        "The password reset link does not work.",
        "Somebody else signed in to my profile from {city}.",
        "Please turn off the newsletter in my settings.",
        "I cannot sign in from {city}.",
        "My login was blocked in {month}.",
        "Please merge my two profiles.",
        "The app asks for my password again and again.",
    ),
    "sales": (
        "Do you have the {thing} in blue?",
        "Is the {thing} in stock?",
        "Which {thing} would you recommend?",
        "How much is a {thing}?",
        "Do you sell a larger {thing}?",
        "I want {order} more of the {thing} for my company.",
        "Is there a cheaper {thing}?",
        "I am looking for a {thing} for my kitchen.",
        "Is the {thing} made of wood?",
        "Do you offer the {thing} in other colors?",
        "What is the difference between your {thing} models?",
        "I would like to buy a {thing}.",
        "Will the {thing} be on sale in {month}?",
        "Do you have a shop in {city} that sells a {thing}?",
        "Please quote me a price for the {thing}.",
        "When is the new {thing} available?",
    ),
}
URGENCY: dict[str, tuple[str, ...]] = {
    "now": (
        "I need an answer right now.",
        "This cannot wait until tomorrow.",
        "Please help immediately.",
        "It is an emergency.",
        "We are losing money every hour.",
        "I need this today.",
        "This is very urgent.",
        "Please call me at once.",
        "Our shop is closed until this is solved.",
        "Answer within the hour, please.",
        "It has to be settled this morning.",
        "Everything has stopped because of this.",
        "I must know in ten minutes.",
        "Drop everything, please.",
        "We need it immediately.",
        "Urgent, please hurry.",
    ),
    "week": (
        "Please answer this week.",
        "I would like to hear from you in a few days.",
        "By Friday would be good.",
        "Please reply in two or three days.",
        "Can you look at it this week?",
        "An answer in the next days is fine.",
        "I hope to hear from you this week.",
        "Please settle it by the weekend.",
        "Let me know in a couple of days.",
        "A reply by Thursday is enough.",
        "Within the week, please.",
        "I expect an answer by Friday.",
        "Please get back to me in a few days.",
        "Do it this week, please.",
        "It should be done by the end of the week.",
        "Give me an answer in three days.",
    ),
    "later": (
        "There is no hurry.",
        "Whenever you have time.",
        "It is not urgent at all.",
        "Take your time.",
        "Next month is fine too.",
        "It can wait.",
        "Answer when it suits you.",
        "No rush.",
        "I am only curious.",
        "Some day would be nice.",
        "I can wait a long time.",
        "Please do not hurry.",
        "This has no priority.",
        "Any time is fine.",
        "No need to answer quickly.",
        "It is not important.",
    ),
}
_GREETINGS = ("", "", "Hello. ", "Hi! ", "Good morning. ", "Hi there. ")


def _message(draw: Draw) -> tuple[str, str, str]:
    """A message, its desk and its urgency."""
    desk, urgency = draw.pick(tuple(REQUESTS)), draw.pick(tuple(URGENCY))
    request = draw.pick_reserved(REQUESTS[desk]).format(
        thing=draw.pick(GOODS)[0],
        city=draw.pick(CITIES),
        month=draw.pick(MONTHS),
        order=draw.between(11, 99),
    )
    parts = [request, draw.pick(URGENCY[urgency])]
    if draw.chance(0.3):
        parts.reverse()
    return draw.pick(_GREETINGS) + " ".join(parts), desk, urgency


def _intents(draw: Draw) -> tuple[str, str]:
    message, desk, _ = _message(draw)
    return message, desk


def _priority(draw: Draw) -> tuple[str, str]:
    message, _, urgency = _message(draw)
    return message, urgency


KINDS = (
    Kind(
        "intents",
        "accuracy",
        "|".join(REQUESTS),
        (
            "{Which desk} answers: {billing, shipping, returns, account or sales}?",
            "Label {the topic} {as billing, shipping, returns, account or sales}.",
            "Choose {one label}: {billing, shipping, returns, account, sales}.",
            "{Topic} of this message ({billing, shipping, returns, account, sales}):",
            "Route this to {billing, shipping, returns, account or sales}. {One word}.",
            "Is this about {billing, shipping, returns, account or sales}? {Answer with the label}.",
            "Classify {the request}: {account, billing, returns, sales, shipping}.",
            "Pick {the department} {from account, billing, returns, sales, shipping}.",
            "What does {the customer want}? {billing, shipping, returns, account or sales}",
            "Sort the mail {by topic} into {sales, returns, shipping, billing or account}.",
            "Tag this with {its topic}: {sales, account, shipping, billing or returns}.",
            "Answer with {one word} for {the topic}: {billing, shipping, returns, account, sales}.",
        ),
        _intents,
        tuple(REQUESTS),
    ),
    Kind(
        "priority",
        "accuracy",
        "|".join(URGENCY),
        (
            "{How soon} is an answer needed: {now, week or later}?",
            "Label {the urgency} {as now, week or later}.",
            "Choose {the deadline}: {now, week, later}.",
            "{Urgency} of this message ({now, week, later}):",
            "Rate {how urgent} this is, {one word: now, week or later}.",
            "Must this be done {now, this week or later}? {Answer now, week or later}.",
            "Classify {the deadline}: {later, week, now}.",
            "Pick {the urgency} {from later, week, now}.",
            "When does {the customer want an answer}? {now, week or later}",
            "Sort the mail {by urgency} into {later, week or now}.",
            "Tag this with {its urgency}: {week, now or later}.",
            "Answer with {one word} for {the urgency}: {now, week, later}.",
        ),
        _priority,
        tuple(URGENCY),
    ),
)
