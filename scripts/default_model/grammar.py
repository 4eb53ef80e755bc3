"""Words, sentences and facts that the stories of stories.toml are filled with. Data only; gen_corpus.py reads it.

`[a|b|c]` is a random choice and may nest, `{x}` a slot. Everything here is ours.
"""

from __future__ import annotations

GIRLS = """
    Lily Mia Anna Sue Rosie Ella Nora Lucy Zoe Amy Kate Ruby Ivy Clara Molly Daisy Emma Sara Tina Jane
""".split()
BOYS = "Tom Ben Sam Max Tim Jack Leo Finn Noah Adam Owen Luke Billy Oscar Henry Dan Theo Jake Fred Will".split()
PETS = """
    Pip Dot Bumble Nibbles Fluffy Rusty Hazel Pebble Button Coco Biscuit Willow Acorn Misty Tuck Poppy Snowy Spot
    Honey Maple
""".split()
ANIMALS = """
    rabbit mouse bear fox squirrel duck frog hedgehog turtle cat puppy kitten bird owl beaver mole deer pig goat
    penguin
""".split()
ADJECTIVES = "little small brave kind quiet curious cheerful gentle funny clever shy happy".split()
COLOURS = "red blue green yellow orange purple white pink brown silver golden".split()
TOYS = """
    ball kite drum boat hat scarf bell book bucket basket cup train doll teddy_bear lantern whistle balloon umbrella
    blanket wagon
""".split()
PLACES = ["park", "garden", "forest", "meadow", "beach", "farm", "village", "lake", "hill", "river"]
FOODS = [
    "an apple pie",
    "a chocolate cake",
    "a berry tart",
    "a loaf of bread",
    "a honey cake",
    "a pot of soup",
    "a plate of cookies",
    "a banana cake",
    "a carrot cake",
    "a batch of muffins",
]
FRUITS = ["apples", "berries", "pears", "carrots", "nuts", "plums", "cherries", "peaches", "strawberries"]
# to do it, doing it, where
SKILLS = [
    ("swim", "swimming", "in the lake"),
    ("ride a bike", "riding", "on the path"),
    ("skate", "skating", "on the ice"),
    ("climb", "climbing", "up the old tree"),
    ("whistle", "whistling", "by the gate"),
    ("juggle", "juggling", "in the yard"),
    ("jump rope", "jumping", "in the yard"),
    ("read", "reading", "under the tree"),
    ("play the flute", "playing", "on the hill"),
    ("tie a bow", "tying bows", "at the table"),
    ("dance", "dancing", "in the kitchen"),
    ("draw a horse", "drawing", "at the table"),
]
# of what, what helps, and then
FEARS = [
    ("the dark", "a small lamp", "The room looked warm and soft"),
    ("thunder", "a big blanket", "The noise did not seem so loud"),
    ("the deep water", "a round float", "The water felt cool and nice"),
    ("the big dog next door", "a tasty bone", "The dog wagged its tail"),
    ("the old bridge", "a long rope", "The bridge did not shake so much"),
    ("the tall slide", "a warm hand", "The slide did not look so tall"),
]
BABIES = "duckling kitten puppy lamb chick bunny fawn piglet owlet".split()
MOTHERS = {
    "duckling": "duck",
    "kitten": "cat",
    "puppy": "dog",
    "lamb": "sheep",
    "chick": "hen",
    "bunny": "rabbit",
    "fawn": "deer",
    "piglet": "pig",
    "owlet": "owl",
}
# where, got out with
TRAPS = [
    ("in a tall tree", "a long ladder"),
    ("in a deep hole", "a strong rope"),
    ("under a fallen branch", "a thick stick"),
    ("in a thorn bush", "a pair of gloves"),
    ("in an old net", "a small pair of scissors"),
    ("behind a big rock", "a long pole"),
]
HIDEOUTS = [
    "under the bed",
    "behind the sofa",
    "inside an old boot",
    "under a pile of leaves",
    "in the tall grass",
    "behind the shed",
    "on top of the shelf",
    "inside the laundry basket",
    "under the kitchen table",
    "in the hollow log",
]
LOOKED = [
    "under the chair",
    "behind the door",
    "in the toy box",
    "by the pond",
    "near the fence",
    "under the stairs",
    "in the kitchen",
    "beside the gate",
    "in the closet",
    "behind the curtain",
]
PRESENTS = [
    "a shiny shell",
    "a jar of honey",
    "a warm scarf",
    "a bright feather",
    "a bag of sweets",
    "a small wooden horse",
    "a book of stories",
    "a round blue stone",
    "a new pair of mittens",
    "a paper crown",
]
# what, from what, which part falls down
BUILDINGS = [
    ("a tree house", "boards and nails", "The roof"),
    ("a sand castle", "wet sand and shells", "The tower"),
    ("a bridge", "logs and rope", "The middle"),
    ("a snow fort", "big balls of snow", "The wall"),
    ("a raft", "logs and rope", "One side"),
    ("a tent", "sticks and blankets", "The top"),
]
INSTRUMENTS = "drum flute trumpet guitar violin horn piano".split()
SEEDS = [
    ("sunflower", "It was tall and yellow"),
    ("pumpkin", "It was round and orange"),
    ("rose", "It was red and sweet"),
    ("tomato plant", "It was full of red tomatoes"),
    ("apple tree", "It had a few green leaves"),
    ("bean plant", "It climbed up a long stick"),
]
INGREDIENTS = "sugar flour butter milk honey eggs".split()

HAPPY = (
    "[{he} smiled|{he} was very happy|{he} laughed and clapped|{he} jumped up and down|{he} felt warm inside"
    "|{he} could not stop smiling]"
)
SAD = (
    "[{he} was very sad|{he} felt like crying|a tear rolled down {his} face|{his} heart felt heavy"
    "|{he} sat down and sighed]"
)
DAY = (
    "[One [sunny|bright|warm|fine|windy|quiet|cool|lovely] [day|morning|afternoon],|One day,|That morning,"
    "|Early one morning,]"
)
OPENINGS = [
    "[Once upon a time,|Long ago,|Once,|A long time ago,] there was {hdesc} named {H}.",
    "[Once upon a time,|Once,] {hdesc} named {H} lived [near|by|close to] the {place}.",
    "{H} was {hdesc} who [loved|liked very much] to play [near|by] the {place}.",
    "In a [small|cozy|little] house by the {place} lived {hdesc} named {H}.",
]
FRIENDS = [
    "{H} had a [good|best|dear] friend named {F}[.|, {fdesc}.]",
    "{H} and {his} friend {F} [did everything together|played together every day|were always together].",
    "{his_C} best friend was {fdesc} named {F}.",
]
ENDINGS = [
    "[From that day on,|After that day,|Since then,] {H} [always remembered|never forgot] that {moral}.",
    "[From that day on,|After that,] {H} and {F} were [even better friends|the best of friends|never apart].",
    "{H} went [home|to bed] that night with a [big smile|happy heart|warm feeling].",
    "And [they all lived happily ever after|everyone was happy that day].",
    "That night, {H} told {P} all about it, and {P} [was very proud|smiled and hugged {him}|gave {him} a kiss].",
    "{H} had learned that {moral}.",
]

# facts
SOUNDS = {
    "cow": "moo",
    "dog": "woof",
    "cat": "meow",
    "duck": "quack",
    "sheep": "baa",
    "pig": "oink",
    "hen": "cluck",
    "mouse": "squeak",
    "horse": "neigh",
    "bee": "buzz",
    "owl": "hoot",
    "frog": "croak",
    "lion": "roar",
    "crow": "caw",
}
THING_COLOURS = {
    "sky": "blue",
    "grass": "green",
    "snow": "white",
    "sun": "yellow",
    "tomato": "red",
    "carrot": "orange",
    "night": "dark",
    "banana": "yellow",
    "milk": "white",
    "strawberry": "red",
    "frog": "green",
    "coal": "black",
    "lemon": "yellow",
    "cloud": "white",
}
OPPOSITES = {
    "big": "small",
    "hot": "cold",
    "up": "down",
    "happy": "sad",
    "day": "night",
    "fast": "slow",
    "old": "new",
    "open": "closed",
    "left": "right",
    "long": "short",
    "wet": "dry",
    "full": "empty",
    "light": "dark",
    "hard": "soft",
    "early": "late",
    "loud": "quiet",
    "good": "bad",
    "high": "low",
}
HOMES = {
    "bird": "a nest",
    "bee": "a hive",
    "fish": "the water",
    "dog": "a house",
    "cow": "a barn",
    "rabbit": "a hole",
    "spider": "a web",
    "bear": "a cave",
    "horse": "a stable",
    "squirrel": "a tree",
    "hen": "a coop",
}
MEALS = {
    "rabbit": "carrots",
    "cow": "grass",
    "mouse": "cheese",
    "bear": "honey and berries",
    "bird": "seeds",
    "squirrel": "nuts",
    "dog": "bones",
    "frog": "flies",
    "cat": "fish",
    "horse": "hay",
    "owl": "mice",
    "monkey": "bananas",
}
NUMBERS = "zero one two three four five six seven eight nine ten".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
