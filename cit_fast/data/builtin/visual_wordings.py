"""The instructions of the visual tasks, with their key parts in braces: several a task, CoIN's Origin, CoIN's Diverse.

CoIN (Chen et al. 2024, arXiv 2403.08350) words its tasks in three ways. ``several`` is like its "10Type"; ``origin``
has one wording a task, in which tasks of short answers share theirs; ``diverse`` has one wording for each task alone.
"""

from __future__ import annotations

SEVERAL: dict[str, tuple[str, ...]] = {
    "colour": (
        "Answer with {the colour's name} {in small letters}.",
        "Name {the colour} {in one lower-case word}.",
        "{Which colour}? Reply {with the plain word only}.",
        "Give {the colour} as {a single small word}.",
        "Say {what colour it has}, {one word, no capitals}.",
        "Write {only the colour}, {in lower case}.",
        "Reply with {the name of the colour}, {nothing else}.",
        "Tell {the colour} {in one small word}.",
    ),
    "count": (
        "Answer with {the number} {as a digit}.",
        "Count and give {how many} {in digits only}.",
        "{How many}? Reply {with one digit}.",
        "Give {the count} as {a single digit}.",
        "Say {how many there are}, {one digit, no words}.",
        "Write {only the number}, {in digits}.",
        "Reply with {the total}, {as a figure}.",
        "Tell {the quantity} {as one figure}.",
    ),
    "left": (
        "Answer with {the shape's name}, {with a capital letter}.",
        "Name {the shape} {in one capitalised word}.",
        "{Which shape} is it? Reply {with a word that starts with a capital}.",
        "Give {the shape on that side} as {one word with a large first letter}.",
        "Say {which shape lies there}, {one word, capital first}.",
        "Write {only the shape}, {first letter large}.",
        "Reply with {the kind of shape}, {capitalised}.",
        "Tell {the shape} {in one word with a capital}.",
    ),
    "digits": (
        "Read {the digits} and write them {without spaces}.",
        "Copy {the number shown} {as one figure}.",
        "{Which number} is it? Reply {with its digits in a row}.",
        "Give {the printed number} {in digits, left to right}.",
        "Type {what is printed}, {digits only}.",
        "Write {only the number shown}, {no spaces, no words}.",
        "Transcribe {the digits} {as a single number}.",
        "Tell {the code} {as digits without spaces}.",
    ),
    "box": (
        "Give {the box} of what is named {as x1,y1,x2,y2}.",
        "Find {its place} and write it {like 10,20,30,40}.",
        "{Where} is it? Reply {with left,top,right,bottom in hundredths}.",
        "Locate {the shape}; {four numbers with commas}.",
        "Return {its bounding box}, {as four integers from 0 to 99}.",
        "Write {only the coordinates}, {separated by commas}.",
        "Mark {the region} {by x1,y1,x2,y2}.",
        "Tell {its corners} {as four numbers with commas}.",
    ),
    "yesno": (
        "Answer {with Yes or No}: {is it true}?",
        "Check {the claim}; {reply Yes or No}.",
        "{True or not}? Say {Yes or No only}.",
        "Decide {whether it holds}, {Yes or No}.",
        "Look and confirm {what is asked} {with Yes or No}.",
        "Write {only Yes or No}, {whichever is right}.",
        "Reply {Yes} if {it is so} and {No} if not.",
        "Tell {if that is the case}: {Yes or No}.",
    ),
    "choice": (
        "Answer with {the option's letter} {alone}.",
        "Pick {the right option}; {reply with its letter}.",
        "{Which option} is right? Say {A, B or C}.",
        "Choose {the answer} {by its letter}.",
        "Select {one of the options}, {letter only}.",
        "Write {only the letter} of {the right choice}.",
        "Reply {A, B or C} for {the option that fits}.",
        "Tell {the correct choice} {as one letter}.",
    ),
    "bars": (
        "Answer with {the bar's colour}, {in capitals}.",
        "Name {the highest bar} {in CAPITAL LETTERS}.",
        "{Which bar} wins? Reply {with its colour in capitals}.",
        "Give {the colour of the tallest bar}, {all letters large}.",
        "Say {which bar is highest}, {one word in capitals}.",
        "Write {only the colour of the longest bar}, {in upper case}.",
        "Reply with {the bar that rises most}, {upper case}.",
        "Tell {the top bar} {as one word in capitals}.",
    ),
}

_SHORT = "Answer the question {using a single word or phrase}."
ORIGIN: dict[str, str] = {
    "colour": _SHORT,
    "count": _SHORT,
    "left": _SHORT,
    "digits": _SHORT,
    "box": "Please provide {the bounding box} of {the region that the text describes}.",
    "yesno": _SHORT,
    "choice": "Answer {with the option's letter} from the given choices directly.",
    "bars": _SHORT,
}

DIVERSE: dict[str, str] = {
    "colour": "Look at the shape and reply with {its colour} {in lower case}.",
    "count": "Go through the picture and report {the number of such shapes} {as a digit}.",
    "left": "Compare the places and reply with {the shape on the side that is named}, {capitalised}.",
    "digits": "Read the print and copy {the digits} {in a row}.",
    "box": "Search the picture and return {the corners of the shape} {as four numbers with commas}.",
    "yesno": "Judge the claim by the picture: {Yes or No}?",
    "choice": "Weigh the options against the picture and return {the letter of the right one}.",
    "bars": "Study the chart and report {the colour of the highest bar} {in capitals}.",
}
