"""Tasks on stock and parcels: number words, plurals, units, sorting, records, e-mail addresses."""

from __future__ import annotations

import json
from decimal import Decimal

from cit_fast.data.builtin.kinds import Draw, Kind
from cit_fast.data.builtin.words import CITIES, DAYS, FIRST_NAMES, GOODS, NOUNS, SURNAMES, listed

_ONES = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = listed("zero ten twenty thirty forty fifty sixty seventy eighty ninety")


def _number_words(number: int) -> str:
    """English words for 1..9999, with "and" after the hundreds."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    size, word = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head, rest = divmod(number, size)
    if not rest:
        return f"{_ONES[head]} {word}"
    return f"{_ONES[head]} {word}{' and' if rest < 100 else ''} {_number_words(rest)}"


def _numbers(draw: Draw) -> tuple[str, str]:
    number = draw.between(2, draw.pick((99, 999, 999, 9999)))
    plural = draw.pick(GOODS)[1]
    city, words = draw.pick(CITIES), _number_words(number)
    return draw.pick(
        (
            f"Send {words} {plural} to {city}.",
            f"The {city} store has {words} {plural} left.",
            f"{city} ordered {words} {plural}.",
            f"We counted {words} {plural} in {city}.",
            f"On {draw.pick(DAYS)} {words} {plural} arrived from {city}.",
        )
    ), f"{plural}: {number}"


def _plurals(draw: Draw) -> tuple[str, str]:
    (one, many), (other, others) = draw.pick_reserved(NOUNS), draw.pick_reserved(NOUNS)
    first, second = draw.between(1, 40), draw.between(1, 40)
    return (
        f"{one} x {first}, {other} x {second}",
        f"{first} {one if first == 1 else many} + {second} {other if second == 1 else others}",
    )


_MEASURES = (
    ("km", "m", ("Cable", "Fence", "Rope", "Pipe", "Path", "Run", "Hike", "Ride", "Road", "Trail")),
    ("kg", "g", ("Flour", "Rice", "Sugar", "Cheese", "Nails", "Coffee", "Salt", "Sand", "Parcel", "Butter")),
    ("l", "ml", ("Milk", "Paint", "Oil", "Juice", "Water", "Ink", "Soap", "Fuel", "Wine", "Glue")),
)


def _units(draw: Draw) -> tuple[str, str]:
    """Exact: at most two decimals times one thousand is whole, so nothing is rounded."""
    large, small, things = draw.pick(_MEASURES)
    value = Decimal(draw.between(1, 99)) / draw.pick((10, 10, 100, 1))
    thing, city = draw.pick(things), draw.pick(CITIES)
    return draw.pick(
        (
            f"{thing} for {city}: {value} {large}",
            f"{thing}, {value} {large}, {city}",
            f"{value} {large} {thing.lower()} in {city}",
            f"{city} needs {value} {large} ({thing.lower()}).",
        )
    ), f"{int(value * 1000)} {small}"


def _sorting(draw: Draw) -> tuple[str, str]:
    """Three entries of a week plan, out of order."""
    entries = [(DAYS.index(day), f"{day} {draw.pick(FIRST_NAMES)}") for day in draw.distinct(DAYS, 3)]
    if entries == sorted(entries):
        entries.reverse()
    written = [entry for _, entry in entries]
    return draw.pick((", ".join(written), "; ".join(written), f"{written[0]}, {written[1]} and {written[2]}")), (
        " | ".join(entry for _, entry in sorted(entries))
    )


def _records(draw: Draw) -> tuple[str, str]:
    values = {
        "name": draw.pick(FIRST_NAMES),
        "city": draw.pick(CITIES),
        "item": draw.pick(GOODS)[0],
        "day": draw.pick(DAYS),
        "count": draw.between(2, 99),
        "room": draw.between(1, 99),
    }
    keys = draw.distinct(tuple(values), 2)
    between, after = draw.pick(((": ", ", "), (" = ", "; "), (" is ", ", "), (" - ", " / ")))
    written = after.join(f"{key}{between}{values[key]}" for key in keys)
    return written, json.dumps({key: values[key] for key in sorted(keys)})


_HOSTS = tuple(f"{word}.example" for word in listed("acme cedar delta harbor maple north orbit pine river oak"))


def _address(draw: Draw, host: str) -> str:
    first, last = draw.pick(FIRST_NAMES), draw.pick(SURNAMES)
    return draw.pick((f"{first}", f"{last}", f"{first}.{last[0]}", f"{first[0]}.{last}")) + f"@{host}"


def _emails(draw: Draw) -> tuple[str, str]:
    one, other = (_address(draw, host) for host in draw.distinct(_HOSTS, 2))
    city = draw.pick(CITIES)
    if draw.chance(0.5):
        note = draw.pick(
            (
                f"Write to {one} about the {city} order.",
                f"Sent by {one} from {city}.",
                f"The {city} office is {one}, open on {draw.pick(DAYS)}.",
            )
        )
        return note, f"<{one.lower()}>"
    note = draw.pick(
        (
            f"Ask {one} or {other} in {city}.",
            f"From {one} to {other}: the {city} list.",
            f"{one} left, use {other} for {city}.",
        )
    )
    return note, f"<{one.lower()}>, <{other.lower()}>"


KINDS = (
    Kind(
        "numbers",
        "exact_match",
        r"[a-z]+: \d+",
        (
            "Give {the goods and their count} {as goods: digits}.",
            "Write {the number} {in digits after the goods}.",
            "{How many of what}? Answer {like pens: 12}.",
            "Extract {the goods and the count}, {formatted goods: number}.",
            "Return only {what is counted} and {its number in digits}.",
            "Turn {the number words} {into digits, goods first}.",
            "Stock entry for this note, {goods, colon, number in digits}:",
            "{Which goods and how many}? Reply {in the form goods: number}.",
            "Read the note and write {its count} {as goods, colon, digits}.",
            "Convert {the count} below {to goods: digits}.",
            "For the stock list: {goods and count}, {written goods: 12}.",
            "Note {what and how many}, {in the style pens: 12}.",
        ),
        _numbers,
    ),
    Kind(
        "plurals",
        "exact_match",
        r"\d+ [a-z]+ \+ \d+ [a-z]+",
        (
            "Write {each count with its noun}, {joined by a plus sign}.",
            "Count first, {noun in the right number}, {with + between}.",
            "Turn the list into {counts and correct plurals}, {separated by +}.",
            "Give {the plural where it is needed}, {count first, joined by +}.",
            "Rewrite as {count and noun}, {like 2 cats + 1 dog}.",
            "List {the counted nouns} {in the form 2 cats + 1 dog}.",
            "Inflect {each noun for its count}; {join with +}.",
            "Say {how many of each}, {count, noun, plus sign}.",
            "Put {the number before its noun} and {inflect it}, {+ between}.",
            "Form {plurals from these counts}, {written 2 cats + 1 dog}.",
            "For the label: {counts with plurals}, {joined by plus signs}.",
            "Answer with {the correct plural forms}, {counts first, + between}.",
        ),
        _plurals,
    ),
    Kind(
        "units",
        "exact_match",
        r"\d+ (m|g|ml)",
        (
            "Convert the measure {to the unit 1000 times smaller}.",
            "Give {the quantity} {in m, g or ml}.",
            "{How much} is it {in the smaller unit (m, g, ml)}?",
            "Extract {the measure} and {write it in m, g or ml}.",
            "Return only {the measure}, {converted to m, g or ml}.",
            "Rewrite {km as m, kg as g, l as ml}.",
            "{Measure} of this entry {as a whole number of m, g or ml}:",
            "Turn {the quantity} {into metres, grams or millilitres}.",
            "Read the line and give {its measure} {in the small unit}.",
            "Change {the unit} below {to m, g or ml}.",
            "For the label: {the measure}, {in m, g or ml}.",
            "Express {the amount} {in units a thousand times smaller}.",
        ),
        _units,
    ),
    Kind(
        "sorting",
        "exact_match",
        r"\w+day \w+ \| \w+day \w+ \| \w+day \w+",
        (
            "Sort these {by weekday}, {separated by |}.",
            "Put the list {in the order of the week}, {with | between}.",
            "Order the entries {from Monday to Sunday} and {join them with |}.",
            "List these {from Monday on} {as x | y | z}.",
            "Arrange {by day of the week}, {separated by bars}.",
            "Return the entries {sorted by day}, {joined by |}.",
            "Order {the days}; {use | between entries}.",
            "Rewrite the plan {in weekday order}, {divided by |}.",
            "What is {the order from Monday to Sunday}? {Use | as separator}.",
            "Give the shifts {earliest day first}, {in the form x | y | z}.",
            "For the week plan: the entries {sorted by weekday}, {bars between}.",
            "Sort {by day}, {one line, | between}.",
        ),
        _sorting,
    ),
    Kind(
        "records",
        "exact_match",
        r'\{"[a-z]+": ("[A-Za-z]+"|\d+), "[a-z]+": ("[A-Za-z]+"|\d+)\}',
        (
            "Write the pairs {as one line of JSON}, {keys sorted}.",
            "Convert {to JSON} with {keys in alphabetical order}.",
            "Turn the fields {into a JSON object}, {sorted by key}.",
            "Return only {the JSON object}, {keys from A to Z}.",
            "Make {a JSON record} of this, {keys sorted, one line}.",
            "Rewrite {as JSON}, {numbers without quotes, keys sorted}.",
            "Give {these values as JSON} with {sorted keys}.",
            "Parse the line {into JSON}; {order the keys A-Z}.",
            "Encode these fields {as compact JSON}, {keys in order}.",
            "{JSON} for this entry, {sorted keys, nothing else}:",
            "Put key and value {in a JSON object}, {alphabetical keys}.",
            "For the database: the pairs {as JSON}, {sorted by key}.",
        ),
        _records,
    ),
    Kind(
        "emails",
        "set_match",
        r"<[a-z.]+@[a-z]+\.example>(, <[a-z.]+@[a-z]+\.example>)?",
        (
            "List {every e-mail address} {in lower case, in <>}.",
            "Extract {all e-mail addresses}, {lower-cased, each in angle brackets}.",
            "Which {addresses} are in this text? {Use <a@b>, lower case}.",
            "Return only {the e-mail addresses}, {in small letters and <>}.",
            "Find {the mail addresses} and write them {as <a@b>, <c@d>}.",
            "{E-mail addresses} of this note, {lower case, in <>, nothing else}:",
            "Copy out {each address}, {lower-cased and bracketed}.",
            "{Whom can I mail}? Give {lower-case addresses in <>}.",
            "Collect {the addresses} {in the form <a@b>, comma between}.",
            "Read the note and give {its addresses}, {small letters, in <>}.",
            "For the mailing list: {all addresses}, {lower case, in <>}.",
            "Pick out {the e-mail contacts}, {written <a@b> in lower case}.",
        ),
        _emails,
    ),
)
