"""Word lists, and made-up words so that copying cannot be replaced by memory."""
import zlib

L = str.split
NAMES = L("Ada Alan Alice Amir Ana Anton Arun Bea Ben Bruno Carla Carmen Chen Clara Dan Daria David Dora Edgar Elena Elif Emma Eric Eva "
          "Farid Felix Fiona Frida George Gina Greta Hana Hans Harry Hugo Ida Igor Ines Irene Ivan Jack Jana Jonas Julia Kai Karim Kate "
          "Kofi Lars Laura Lena Leo Lina Liu Luca Lucy Maja Marco Maria Marta Max Maya Mei Mia Milan Mina Mira Nadia Nico Nina Noah Nora "
          "Olaf Olga Omar Oscar Otto Pablo Paul Petra Pia Priya Quinn Rafael Rana Ravi Rita Rosa Ruth Salma Sam Sara Simon Sofia Stefan "
          "Sven Tara Theo Tina Tom Uma Vera Victor Wanda Will Yara Yusuf Zara Zoe")
PLACES = L("Berlin Paris Rome Madrid Lisbon Vienna Prague Oslo Stockholm Helsinki Dublin London Athens Cairo Nairobi Lagos Accra Tunis "
           "Mumbai Delhi Tokyo Osaka Seoul Beijing Shanghai Hanoi Bangkok Jakarta Sydney Perth Auckland Toronto Montreal Boston Chicago "
           "Denver Seattle Dallas Miami Lima Bogota Quito Santiago Havana Zurich Geneva Milan Turin Naples Munich Hamburg Cologne Lyon "
           "Nice Porto Seville Warsaw Krakow Budapest Riga Tallinn Vilnius Sofia Ankara Izmir")
ANIMALS = L("fox bear rabbit owl cat dog horse mouse wolf deer goat sheep duck goose frog turtle snake crow raven eagle hedgehog badger otter "
            "beaver squirrel donkey lion tiger elephant monkey parrot penguin whale dolphin crab snail bee ant spider robin swan mole hare pony")
COLOURS = L("red blue green yellow white black grey brown orange purple pink golden silver violet crimson turquoise copper amber")
THINGS = L("lamp key box book map clock bell coin rope boat kite drum mirror basket bottle candle chair table ladder hammer cup plate hat coat "
           "scarf shoe ring stone feather shell leaf apple pear cake bread lantern wheel flute violin camera button ribbon pencil letter "
           "blanket pillow jar bucket brush needle spoon kettle umbrella compass telescope sword shield crown statue puzzle ball")
SITES = L("tower gate bridge library museum harbour station garden castle cellar vault archive office hall tunnel warehouse laboratory "
          "workshop chapel theatre school hospital market mill barn cabin lighthouse fountain greenhouse observatory depot hangar dock "
          "kitchen attic court stadium bakery studio embassy factory")
CODES = L("code password number key pin token badge reference")
ADJ = L("small big old young kind brave quiet clever happy sad lonely gentle proud shy funny curious tired hungry careful cheerful lazy "
        "friendly nervous patient wise strange bright dark cold warm soft heavy tiny huge long short deep narrow empty dusty shiny broken "
        "hidden secret magic lost forgotten wooden iron glass paper")
VERBS = L("found lost made painted carried dropped cleaned hid opened closed repaired borrowed sold bought broke washed kept lifted "
          "watched followed")
NATURE = L("forest river hill lake meadow valley mountain beach island field cave village town pond desert swamp road path orchard cliff")
WEATHER = L("sunny cloudy rainy windy snowy foggy stormy clear")
FRUIT = L("apples pears plums cherries oranges lemons grapes peaches figs bananas melons mangoes berries dates kiwis")
JOBS = L("baker teacher doctor farmer sailor painter writer miner pilot gardener tailor cook nurse singer driver carpenter engineer judge "
         "librarian mechanic waiter dentist chemist plumber")
HOBBIES = L("reading chess swimming cooking painting hiking cycling fishing dancing singing gardening running sewing photography skating "
            "climbing sailing astronomy knitting pottery")
FOODS = L("soup rice pasta pizza bread cheese salad cake pie curry noodles beans eggs fish potatoes pancakes chocolate honey")
COLUMNS = L("id name age city price size colour weight email phone date total status owner title year country score level room amount")
WEEKDAYS = L("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = L("January February March April May June July August September October November December")
DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
_C, _V = L("b c d f g h k l m n p r s t v w z br dr gr kr pl st tr sh th"), L("a e i o u ai ei ou ia")


def made_up(r, n=None):
    w = "".join(r.choice(_C) + r.choice(_V) for _ in range(n or r.randint(2, 3)))
    return w + r.choice(["", "n", "r", "s", "l", "k", "m"])


def name(r):
    return r.choice(NAMES) if r.random() < 0.75 else made_up(r).capitalize()


def place(r):
    return r.choice(PLACES) if r.random() < 0.75 else made_up(r).capitalize()


def noun(r):
    return r.choice(THINGS + ANIMALS + FRUIT + SITES) if r.random() < 0.85 else made_up(r)


def held(key):
    """True for the sixteenth of all value combinations that is kept out of the training data."""
    return zlib.crc32(repr(key).encode()) % 16 == 0


def pick(r, split, draw):
    """Draws until the combination belongs to the wanted split."""
    while True:
        v = draw()
        if held(v) == (split == "eval"):
            return v


def a(w):
    return ("an " if w[0] in "aeiou" else "a ") + w
