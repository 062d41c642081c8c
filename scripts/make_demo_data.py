#!/usr/bin/env python3
"""Make the demo task: one English sentence in, one compact JSON object out.

    make_demo_data.py [FOLDER]        (default data/demo: train.jsonl, eval.jsonl, test.jsonl)
    make_demo_data.py --notes FILE    text for a small base model (JSON lines with a field `text`)

A sentence tells of an order, a meeting, a trip or an expense. The answer copies what the sentence says, with small
normalisations: numbers as digits, weekdays in lower case, dates as MM-DD, currencies as a code. Keys have a fixed
order, so an answer is right exactly when it equals the reference. All splits draw on the same words; no answer and no
sentence occurs twice, within a split or across them. Same Python, same bytes: the seed is fixed.

The notes teach a base model the words, and that facts are copied, but not the task: sentences that are in none of the
splits, each followed by what it says as lines `key: value`, in any order, with other keys and without normalisation.
"""
import json
import random
import sys
from pathlib import Path

SEED = 20240917
SPLITS = {"train": 1600, "eval": 64, "test": 200}
NOTES = 24000
SYSTEM = "Answer in JSON."

NAMES = """Adam Alice Amira Anna Ben Bella Boris Carla Chen Clara Daniel Diana Diego Elena Emma Erik Farah Felix Fiona
George Grace Hana Hassan Helen Hugo Ines Irene Ivan Jack Jane Jonas Julia Karim Kate Klaus Laura Leo Linda Lucas Maria
Marco Mina Nadia Nina Noah Oliver Olga Omar Paul Petra Rachel Ravi Rosa Samuel Sara Simon Sofia Tara Thomas Victor Wei
Yusuf Zoe""".split()
CITIES = """Amsterdam Athens Barcelona Berlin Bergen Boston Bristol Cairo Chicago Copenhagen Dallas Delhi Denver Dublin
Florence Geneva Glasgow Hamburg Helsinki Istanbul Kyoto Lagos Lima Lisbon London Lyon Madrid Milan Montreal Munich
Nairobi Naples Oslo Paris Porto Prague Quebec Rome Seattle Seoul Sydney Tokyo Toronto Turin Venice Vienna Warsaw
Zurich""".split()
ITEMS = """bottle lamp chair desk keyboard monitor notebook printer backpack blanket bicycle camera candle carpet clock
cup curtain drill fan filter guitar hammer helmet jacket kettle ladder mattress mirror mug pencil pillow plate radio
scarf shelf shovel sofa speaker spoon stapler suitcase table telescope tent toaster towel umbrella vase""".split()
PURPOSES = """books breakfast coffee dinner fuel groceries insurance laundry lunch medicine parking postage rent repairs
shoes software stationery taxi tickets tools""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()
CURRENCIES = {"usd": ["${}", "{} dollars"], "eur": ["{} euros", "€{}"], "gbp": ["{} pounds", "£{}"]}

ORDERS = [
    "{name} from {city} ordered {count} {items}.",
    "Please send {count} {items} to {name} in {city}.",
    "We got an order for {count} {items} from {name}, who lives in {city}.",
    "Ship {count} {items} to {city}; the customer is {name}.",
    "{name} would like {count} {items} delivered to {city}.",
    "{count} {items} go to {city} for {name}.",
]
MEETINGS = [
    "{name} meets {other} on {day} at {time}.",
    "On {day} at {time}, {name} has a meeting with {other}.",
    "{name} will see {other} at {time} on {day}.",
    "Put it in the calendar: {name} and {other}, {day}, {time}.",
    "There is a meeting between {name} and {other} at {time} this {day}.",
    "{day} {time}: {name} talks to {other}.",
]
TRIPS = [
    "{name} flies from {origin} to {goal} on {date}.",
    "On {date}, {name} takes the train to {goal} from {origin}.",
    "{name} leaves {origin} for {goal} on {date}.",
    "Book a ticket to {goal} for {name}, leaving {origin} on {date}.",
    "{name} travels to {goal} on {date}, starting in {origin}.",
    "A trip from {origin} to {goal} is planned for {name} on {date}.",
]
EXPENSES = [
    "{name} spent {money} on {purpose} on {date}.",
    "On {date}, {name} paid {money} for {purpose}.",
    "{name} wants {money} back for {purpose} bought on {date}.",
    "Add an expense of {money} for {purpose}: {name}, {date}.",
    "For {purpose}, {name} was charged {money} on {date}.",
    "{date}: {name}, {purpose}, {money}.",
]


def plural(item):
    return {"shelf": "shelves"}.get(item, item + "s")


def pick_date(rng):
    """A date as written in a sentence and as MM-DD."""
    month, day = rng.randrange(12), rng.randint(1, 28)
    written = rng.choice([f"{MONTHS[month]} {day}", f"{day} {MONTHS[month]}"])
    return written, f"{month + 1:02}-{day:02}"


def make_order(rng):
    name, city, item, quantity = rng.choice(NAMES), rng.choice(CITIES), rng.choice(ITEMS), rng.randint(2, 40)
    count = NUMBERS[quantity - 2] if quantity <= 12 and rng.random() < 0.7 else str(quantity)
    sentence = rng.choice(ORDERS).format(name=name, city=city, count=count, items=plural(item))
    answer = {"kind": "order", "name": name, "item": item, "quantity": quantity, "city": city}
    return sentence, answer, {"customer": name, "how many": count, "goods": plural(item), "place": city}


def make_meeting(rng):
    name, other = rng.sample(NAMES, 2)
    day, time = rng.choice(DAYS), f"{rng.randint(8, 18):02}:{rng.choice(['00', '15', '30', '45'])}"
    sentence = rng.choice(MEETINGS).format(name=name, other=other, day=day, time=time)
    answer = {"kind": "meeting", "name": name, "with": other, "day": day.lower(), "time": time}
    return sentence, answer, {"first": name, "second": other, "weekday": day, "hour": time}


def make_trip(rng):
    name, (origin, goal) = rng.choice(NAMES), rng.sample(CITIES, 2)
    written, date = pick_date(rng)
    sentence = rng.choice(TRIPS).format(name=name, origin=origin, goal=goal, date=written)
    answer = {"kind": "trip", "name": name, "from": origin, "to": goal, "date": date}
    return sentence, answer, {"traveller": name, "start": origin, "end": goal, "on": written}


def make_expense(rng):
    name, purpose, amount = rng.choice(NAMES), rng.choice(PURPOSES), rng.randint(3, 480)
    currency = rng.choice(list(CURRENCIES))
    written, date = pick_date(rng)
    money = rng.choice(CURRENCIES[currency]).format(amount)
    sentence = rng.choice(EXPENSES).format(name=name, purpose=purpose, money=money, date=written)
    answer = {"kind": "expense", "name": name, "for": purpose, "amount": amount, "currency": currency, "date": date}
    return sentence, answer, {"payer": name, "bought": purpose, "price": money, "when": written}


MAKERS = [make_order, make_meeting, make_trip, make_expense]


def capitalised(sentence):
    return sentence[0].upper() + sentence[1:]


def record(sentence, answer):
    return {"messages": [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": capitalised(sentence)},
        {"role": "assistant", "content": json.dumps(answer, separators=(",", ":"))},
    ]}


def make_splits():
    """Records of each split, and all their sentences and answers."""
    rng = random.Random(SEED)
    seen = set()
    splits = {}
    for split, size in SPLITS.items():
        records = []
        while len(records) < size:
            sentence, answer, _ = MAKERS[len(records) % len(MAKERS)](rng)
            keys = {sentence, json.dumps(answer)}
            if keys & seen:
                continue
            seen |= keys
            records.append(record(sentence, answer))
        rng.shuffle(records)
        splits[split] = records
    return splits, seen


def make_notes(seen):
    rng = random.Random(SEED + 1)
    notes = []
    while len(notes) < NOTES:
        sentence, answer, facts = rng.choice(MAKERS)(rng)
        if {sentence, json.dumps(answer)} & seen:
            continue
        lines = [f"{key}: {value}" for key, value in rng.sample(list(facts.items()), len(facts))]
        notes.append({"text": "\n".join([capitalised(sentence), *lines])})
    return notes


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    print(f"{path}: {len(records)} records")


def main():
    splits, seen = make_splits()
    if sys.argv[1:2] == ["--notes"]:
        write(Path(sys.argv[2]), make_notes(seen))
        return
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "data" / "demo"
    for split, records in splits.items():
        write(folder / f"{split}.jsonl", records)


if __name__ == "__main__":
    main()
