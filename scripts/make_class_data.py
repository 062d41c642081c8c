#!/usr/bin/env python3
"""Make two demo tasks of classification: pairs of sentences, and folders of small pictures.

    make_class_data.py [FOLDER]        (default data/demo: pairs/{train,eval}.tsv, shapes/{train,eval}/CLASS/*.png)

pairs: does the second sentence follow from the first? As in GLUE's RTE, with the labels entailment and not_entailment.
The first sentence says who has which thing of which colour, and where; the second repeats a part of it, or changes one
word of that part. Both labels are equally frequent, and no pair occurs twice.

shapes: circles, squares and triangles of 16 x 16 pixels, of random place, size and colours, with some noise.

Same Python, same bytes: the seed is fixed. Only the standard library is needed.
"""
import random
import struct
import sys
import zlib
from pathlib import Path

SEED = 20240921
PAIRS = {"train": 480, "eval": 96}
SHAPES = {"train": 20, "eval": 8}
SIDE = 16

NAMES = "Adam Alice Ben Clara Diego Elena Felix Grace Hana Ivan Julia Karim Linda Marco Nina Omar".split()
COLOURS = "red green blue yellow black white brown grey".split()
THINGS = "cup lamp chair book box ball coat bag hat plate".split()
PLACES = "kitchen garden hall office cellar attic garage school".split()


def pair(rng, label):
    """One pair of sentences with this label."""
    fact = {"name": rng.choice(NAMES), "colour": rng.choice(COLOURS), "thing": rng.choice(THINGS), "place": rng.choice(PLACES)}
    choices = {"name": NAMES, "colour": COLOURS, "thing": THINGS, "place": PLACES}
    first = rng.choice(["{name} has a {colour} {thing} in the {place}.", "In the {place}, {name} keeps a {colour} {thing}."])
    second, told = rng.choice(
        [
            ("The {thing} is {colour}.", ["thing", "colour"]),
            ("The {thing} is in the {place}.", ["thing", "place"]),
            ("{name} has a {thing}.", ["name", "thing"]),
            ("{name} is the owner of something {colour}.", ["name", "colour"]),
        ]
    )
    claim = dict(fact)
    if label == "not_entailment":
        key = rng.choice(told)
        claim[key] = rng.choice([word for word in choices[key] if word != fact[key]])
    return first.format(**fact), second.format(**claim)


def write_pairs(folder, rng):
    folder.mkdir(parents=True, exist_ok=True)
    seen = set()
    for split, count in PAIRS.items():
        rows = []
        while len(rows) < count:
            label = ["entailment", "not_entailment"][len(rows) % 2]
            sentences = pair(rng, label)
            if sentences not in seen:
                seen.add(sentences)
                rows.append((*sentences, label))
        rng.shuffle(rows)
        lines = ["sentence1\tsentence2\tlabel"] + ["\t".join(row) for row in rows]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def inside(shape, x, y, radius):
    """Whether a point lies in a shape around the origin."""
    if shape == "circle":
        return x * x + y * y <= radius * radius
    if shape == "square":
        return max(abs(x), abs(y)) <= 0.85 * radius
    return -radius <= y <= 0.7 * radius and abs(x) <= (y + radius) / 1.7


def picture(rng, shape):
    """Rows of red, green and blue bytes."""
    radius = rng.uniform(0.25, 0.42) * SIDE
    centre = [rng.uniform(radius, SIDE - radius) for _ in range(2)]
    while True:
        colours = [[rng.randrange(256) for _ in range(3)] for _ in range(2)]
        if sum(abs(a - b) for a, b in zip(*colours)) > 240:
            break
    rows = []
    for y in range(SIDE):
        row = bytearray()
        for x in range(SIDE):
            colour = colours[inside(shape, x + 0.5 - centre[0], y + 0.5 - centre[1], radius)]
            row += bytes(min(255, max(0, value + rng.randrange(-12, 13))) for value in colour)
        rows.append(bytes(row))
    return rows


def png(rows):
    """A PNG of 8-bit red, green and blue."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(rows[0]) // 3, len(rows), 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def write_shapes(folder, rng):
    for split, count in SHAPES.items():
        for shape in ["circle", "square", "triangle"]:
            place = folder / split / shape
            place.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                (place / f"{index:02}.png").write_bytes(png(picture(rng, shape)))


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/demo")
    write_pairs(folder / "pairs", random.Random(SEED))
    write_shapes(folder / "shapes", random.Random(SEED + 1))


if __name__ == "__main__":
    main()
