"""Names, places and things that the generated inputs are made of."""

from __future__ import annotations


def listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def _paired(text: str) -> tuple[tuple[str, str], ...]:
    """Pairs from ``"singular plural|singular plural"``."""
    pairs = (pair.split() for pair in text.split("|"))
    return tuple((one, many) for one, many in pairs)


FIRST_NAMES = listed(
    "Ada Ahmed Alice Amara Anna Anton Bella Ben Boris Carla Carlos Chen Clara Daniel David Diana Elena Elif Emma "
    "Eric Farah Felix Fiona Frank George Grace Hana Hannah Hugo Ines Ivan Jack James Jana Julia Kenji Kofi Laura "
    "Leo Lina Lucas Maria Marta Martin Maya Mia Milan Nadia Nina Noah Olga Oliver Omar Oscar Paul Petra Priya "
    "Rosa Ruth Samir Sara Simon Sofia Tara Thomas Tom Vera Victor Wei Yara Yusuf Zoe"
)
SURNAMES = listed(
    "Adams Ali Bauer Becker Bell Berg Brown Carter Chan Clark Costa Cruz Diaz Dubois Evans Fischer Fox Garcia "
    "Gomez Grant Green Gupta Hall Hansen Harris Hill Ito Jensen Jones Kaya Keller Khan Kim King Kumar Lang Lee "
    "Lewis Lopez Meyer Moore Mori Murphy Nguyen Novak Okafor Olsen Park Parker Patel Perez Quinn Ramos "
    "Reed Rossi Santos Scott Shah Silva Singh Smith Stone Tanaka Turner Walker Weber White Wood Young"
)
CITIES = listed(
    "Athens Austin Basel Bergen Berlin Boston Bristol Cairo Cork Dakar Delhi Denver Dublin Florence Geneva Ghent "
    "Hamburg Helsinki Kyoto Leeds Lima Lisbon London Lyon Madrid Miami Milan Munich Nairobi Naples Oslo Paris "
    "Porto Prague Quebec Riga Rome Seattle Seoul Seville Sydney Tokyo Toronto Turin Vienna Warsaw Zurich"
)
SHOPS = tuple(
    f"{first} {second}"
    for first in listed("Central City Corner Green Harbor Hill Lake Market North Old Park River Sunny Union")
    for second in listed("Bakery Books Cafe Cinema Garage Grocery Hotel Pharmacy Pizza Tools")
)
MONTHS = listed("January February March April May June July August September October November December")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
# Things that are ordered, stored and sent: (singular, plural), easily counted.
GOODS = _paired(
    "bag bags|basket baskets|battery batteries|bed beds|belt belts|blanket blankets|bolt bolts|book books|"
    "bottle bottles|bowl bowls|box boxes|brush brushes|bucket buckets|button buttons|cable cables|camera cameras|"
    "candle candles|card cards|chair chairs|clock clocks|coat coats|cup cups|desk desks|dress dresses|"
    "fan fans|folder folders|fork forks|glass glasses|glove gloves|hammer hammers|hat hats|"
    "jacket jackets|jar jars|key keys|lamp lamps|ladder ladders|magnet magnets|mirror mirrors|mug mugs|"
    "needle needles|notebook notebooks|pan pans|pen pens|pencil pencils|phone phones|pillow pillows|plate plates|"
    "poster posters|printer printers|pump pumps|radio radios|rope ropes|rug rugs|scarf scarves|screw screws|"
    "shelf shelves|shirt shirts|sofa sofas|spoon spoons|stamp stamps|table tables|tent tents|ticket tickets|"
    "tile tiles|towel towels|tray trays|vase vases|wheel wheels"
)
# Nouns whose plural is worth asking for: endings that change, and words that have a form of their own.
NOUNS = _paired(
    "address addresses|analysis analyses|apple apples|army armies|baby babies|basis bases|beach beaches|"
    "belief beliefs|bench benches|berry berries|bird birds|body bodies|bonus bonuses|boss bosses|boy boys|"
    "branch branches|bridge bridges|brush brushes|buffalo buffaloes|bus buses|butterfly butterflies|calf calves|"
    "car cars|cat cats|chef chefs|cherry cherries|chief chiefs|child children|church churches|city cities|"
    "class classes|cliff cliffs|coach coaches|copy copies|country countries|crisis crises|criterion criteria|"
    "curry curries|daisy daisies|day days|deer deer|diary diaries|dish dishes|doctor doctors|dog dogs|"
    "donkey donkeys|duty duties|echo echoes|elf elves|enemy enemies|factory factories|family families|fish fish|"
    "flower flowers|fly flies|foot feet|fox foxes|galaxy galaxies|gallery galleries|gas gases|girl girls|"
    "goose geese|guess guesses|half halves|hero heroes|hobby hobbies|hoof hooves|house houses|inch inches|"
    "kiss kisses|knife knives|lady ladies|leaf leaves|lens lenses|library libraries|life lives|loaf loaves|"
    "loss losses|louse lice|man men|match matches|memory memories|monkey monkeys|mosquito mosquitoes|"
    "mouse mice|oasis oases|ox oxen|party parties|patch patches|peach peaches|penny pennies|person people|"
    "photo photos|piano pianos|pony ponies|potato potatoes|proof proofs|puppy puppies|reply replies|river rivers|"
    "roof roofs|salmon salmon|sandwich sandwiches|sheep sheep|ship ships|sky skies|species species|spy spies|"
    "story stories|strategy strategies|studio studios|supply supplies|switch switches|tax taxes|"
    "thesis theses|thief thieves|tomato tomatoes|tooth teeth|torch torches|toy toys|tree trees|turkey turkeys|"
    "valley valleys|video videos|virus viruses|watch watches|wife wives|witch witches|wolf wolves|woman women|"
    "zebra zebras|zoo zoos"
)
