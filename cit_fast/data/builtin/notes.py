"""Tasks on notes about payments and appointments: dates, amounts, times, names.

The same kind of note serves all four, so that only the instruction says which part is wanted and in which form:
a model that was tuned to the last of them forgets the others.
"""

from __future__ import annotations

import datetime

from cit_fast.data.builtin.kinds import Draw, Kind
from cit_fast.data.builtin.words import FIRST_NAMES, MONTHS, SHOPS, SURNAMES, listed

_CURRENCIES = {
    "USD": ("$", "dollars", "cents"),
    "EUR": ("€", "euros", "cents"),
    "GBP": ("£", "pounds", "pence"),
}
_HOURS = listed("one two three four five six seven eight nine ten eleven twelve")
_SPOKEN_MINUTES = {0: "{} o'clock", 10: "ten past {}", 15: "quarter past {}", 20: "twenty past {}", 30: "half past {}"}


def _day(draw: Draw) -> datetime.date:
    return datetime.date(2015, 1, 1) + datetime.timedelta(days=draw.between(0, 7669))


def _written_date(draw: Draw, day: datetime.date) -> str:
    month = MONTHS[day.month - 1]
    suffix = "th" if 11 <= day.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return draw.pick(
        (
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{day.day} {month[:3]} {day.year}",
            f"{month[:3]} {day.day}, {day.year}",
            f"{month} {day.day}{suffix}, {day.year}",
            f"the {day.day}{suffix} of {month} {day.year}",
        )
    )


def _amount(draw: Draw) -> tuple[str, str]:
    """An amount as people write it, and in the house format."""
    code = draw.pick(tuple(_CURRENCIES))
    sign, name, small = _CURRENCIES[code]
    whole, part = draw.between(2, draw.pick((99, 99, 999))), draw.pick((0, 0, 5, 20, 25, 40, 50, 75, 80, 90, 95, 99))
    forms = [f"{sign}{whole}.{part:02d}", f"{whole}.{part:02d} {name}"]
    if part == 0:
        forms = [f"{sign}{whole}", f"{whole} {name}"]
    elif part >= 20:
        forms.append(f"{whole} {name} and {part} {small}")
    return draw.pick(forms), f"{code} {whole}.{part:02d}"


def _time(draw: Draw) -> tuple[str, str]:
    """A time of day as people write or say it, and in the house format."""
    hour, minute = draw.between(6, 22), draw.pick(tuple(_SPOKEN_MINUTES))
    part, half_day = ("morning", "am") if hour < 12 else ("afternoon" if hour < 18 else "evening", "pm")
    on_dial = (hour - 1) % 12 + 1
    answer = f"{on_dial}:{minute:02d} {half_day}"
    if draw.chance(0.4):
        return f"{on_dial}.{minute:02d} {half_day}", answer
    return f"{_SPOKEN_MINUTES[minute].format(_HOURS[on_dial - 1])} in the {part}", answer


def _person(draw: Draw) -> tuple[str, str]:
    return draw.pick(FIRST_NAMES), draw.pick(SURNAMES)


def _payment(draw: Draw, person: str, amount: str, date: str) -> str:
    return draw.pick(
        (
            f"{person} paid {amount} at {draw.pick(SHOPS)} on {date}.",
            f"On {date} {person} spent {amount}.",
            f"{person}, {amount}, due {date}.",
            f"{draw.pick(SHOPS)}, {date}: {amount}, {person}.",
            f"{amount} from {person}, {date}.",
        )
    )


def _appointment(draw: Draw, person: str, time: str, date: str) -> str:
    return draw.pick(
        (
            f"{person} comes to {draw.pick(SHOPS)} on {date} at {time}.",
            f"Meet {person} on {date} at {time}.",
            f"{date}, {time}: {person}.",
            f"{draw.pick(SHOPS)} expects {person} at {time}, {date}.",
            f"Call {person} on {date} at {time}.",
        )
    )


# What is not asked for is written shortly: the prompt stays below 64 tokens, which is quick to train on a CPU.
def _short_date(draw: Draw) -> str:
    day, month = draw.between(1, 28), draw.pick(MONTHS)
    return draw.pick((f"{day} {month}", f"{month} {day}"))


def _short_amount(draw: Draw) -> str:
    sign, name, _ = draw.pick(tuple(_CURRENCIES.values()))
    whole = draw.between(2, 99)
    return draw.pick((f"{sign}{whole}", f"{whole} {name}"))


def _short_time(draw: Draw) -> str:
    return draw.pick((f"{draw.between(6, 11)} am", f"{draw.between(1, 11)} pm"))


def _note(draw: Draw, person: str, date: str) -> str:
    if draw.chance(0.5):
        return _payment(draw, person, _short_amount(draw), date)
    return _appointment(draw, person, _short_time(draw), date)


def _dates(draw: Draw) -> tuple[str, str]:
    day = _day(draw)
    return _note(draw, " ".join(_person(draw)), _written_date(draw, day)), day.isoformat()


def _names(draw: Draw) -> tuple[str, str]:
    first, last = _person(draw)
    return _note(draw, f"{first} {last}", _short_date(draw)), f"{last}, {first[0]}."


def _amounts(draw: Draw) -> tuple[str, str]:
    written, answer = _amount(draw)
    return _payment(draw, " ".join(_person(draw)), written, _short_date(draw)), answer


def _times(draw: Draw) -> tuple[str, str]:
    written, answer = _time(draw)
    return _appointment(draw, " ".join(_person(draw)), written, _short_date(draw)), answer


KINDS = (
    Kind(
        "dates",
        "exact_match",
        r"\d{4}-\d{2}-\d{2}",
        (
            "Give {the date} of this note {as YYYY-MM-DD}.",
            "Find {the date} and write it {in the form YYYY-MM-DD}.",
            "{When} was it? Answer with {the ISO date only}.",
            "Extract {the date}, {formatted YYYY-MM-DD}.",
            "Return only {the date}, {year-month-day in digits}.",
            "Which {date} is named here? {Use ISO 8601}.",
            "Rewrite {the date} in this note {as year, month, day with dashes}.",
            "{Date} of this entry, {YYYY-MM-DD, nothing else}:",
            "Read the note and copy out {its date} {in ISO format}.",
            "On {which day} is this? Reply {in the format YYYY-MM-DD}.",
            "Convert {the date} below {to YYYY-MM-DD}.",
            "For the calendar: {the date} in this line, {written YYYY-MM-DD}.",
        ),
        _dates,
    ),
    Kind(
        "amounts",
        "exact_match",
        r"(USD|EUR|GBP) \d+\.\d{2}",
        (
            "Give {the amount} of this note {as code and two decimals}.",
            "Find {the sum of money} and write it {like USD 1.00}.",
            "{How much} was it? Answer with {currency code and amount}.",
            "Extract {the amount}, {formatted CODE 0.00}.",
            "Return only {the price}, {three-letter currency first}.",
            "Which {amount} is named here? {Code first, two decimals}.",
            "Rewrite {the money} in this note {as EUR, GBP or USD and two decimals}.",
            "{Amount} of this entry, {code and decimals, nothing else}:",
            "Read the note and copy out {its amount} {in the form USD 1.00}.",
            "{What does it cost}? Reply {in the format CODE 0.00}.",
            "Convert {the sum} below {to currency code and decimals}.",
            "For the ledger: {the amount} in this line, {written CODE 0.00}.",
        ),
        _amounts,
    ),
    Kind(
        "times",
        "exact_match",
        r"(1[0-2]|[1-9]):[0-5]\d [ap]m",
        (
            "Give {the time} of this note {as H:MM am or pm}.",
            "Find {the time of day} and write it {in the form H:MM am/pm}.",
            "{At what time} is it? Answer with {the time in digits only}.",
            "Extract {the time}, {formatted like 1:00 am}.",
            "Return only {hour and minute} {as digits with am or pm}.",
            "Which {time} is named here? {Use digits and am or pm}.",
            "Rewrite {the time} in this note {in digits, then am or pm}.",
            "{Time} of this entry, {H:MM am/pm, nothing else}:",
            "Read the note and copy out {its time} {in digits with am/pm}.",
            "{What time} does it start? Reply {like 1:00 am}.",
            "Convert {the time} below {to H:MM am/pm}.",
            "For the calendar: {the time} in this line, {written H:MM am or pm}.",
        ),
        _times,
    ),
    Kind(
        "names",
        "exact_match",
        r"[A-Z][a-z]+, [A-Z]\.",
        (
            "Give {the person} in this note {as surname, comma, initial}.",
            "Find {the person's name} and write it {like Doe, J.}",
            "{Who} is it? Answer with {the surname and the initial only}.",
            "Extract {the name}, {formatted Surname, I.}",
            "Return only {the person} in this text, {surname first, then the initial}.",
            "Which {person} is named here? {Surname, then initial}.",
            "Rewrite {the person's name} in this note {as surname and first initial}.",
            "{Person} of this entry, {surname and initial, nothing else}:",
            "Read the note and copy out {its person} {in the form Doe, J.}",
            "{Who is this about}? Reply {in the format Surname, I.}",
            "Convert {the name} below {to surname, comma, initial}.",
            "For the index: {the person} in this line, {written Surname, I.}",
        ),
        _names,
    ),
)
