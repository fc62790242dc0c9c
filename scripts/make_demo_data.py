"""The demo's data: sentences with a date, and that date in ISO 8601.

    python scripts/make_demo_data.py [FOLDER]     writes train.jsonl and heldout.jsonl (to scripts/demo)

Everything is invented here from a fixed seed, so the shipped files can be made again byte for byte. No date
occurs twice, so none of the held-out ones was trained on. Every spelling has one reading only: dots put the
day first, slashes the year, and everywhere else the month is a word.

Also has `small_talk`, what the tiny base model is pre-trained on: it learns to say again what it is told, and
never sees a date beside its ISO form. Knows nothing about tokens or models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from random import Random

Messages = list[dict[str, str]]

SHIPPED = Path(__file__).parent / "demo"
TRAIN_ROWS, HELDOUT_ROWS = 3_500, 200

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

SPELLINGS: tuple[Callable[[date], str], ...] = (
    lambda day: f"{day.day} {month(day)} {day.year}",
    lambda day: f"{month(day)} {day.day}, {day.year}",
    lambda day: f"the {ordinal(day.day)} of {month(day)}, {day.year}",
    lambda day: f"{month(day)} the {ordinal(day.day)}, {day.year}",
    lambda day: f"{month(day)} {ordinal(day.day)}, {day.year}",
    lambda day: f"{day.day} {month(day)[:3]} {day.year}",
    lambda day: f"{month(day)[:3]} {day.day}, {day.year}",
    lambda day: f"{day.year} {month(day)} {day.day}",
    lambda day: f"{day.day}.{day.month}.{day.year}",
    lambda day: f"{day.year}/{day.month}/{day.day}",
)

SENTENCES = (
    "{}",
    "Born on {}.",
    "Rent is due on {}.",
    "The parcel left on {}.",
    "The bridge opened on {}.",
    "The ferry ran until {}.",
    "The first frost came on {}.",
    "Ms Okafor signed it on {}.",
    "Invoice of {}, unpaid",
    "Valid from {}",
    "Backup of {} restored",
    "We met on {}!",
)

NOUNS = (
    *("bridge", "copper", "engine", "ferry", "frost", "garden", "harbour", "lamp", "ledger", "letter"),
    *("market", "mill", "orchard", "paper", "parcel", "river", "signal", "stone", "winter"),
)


def month(day: date) -> str:
    return MONTHS[day.month - 1]


def ordinal(number: int) -> str:
    if number in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"


def random_date(random: Random) -> date:
    """Any day from 1900 to 2099."""
    return date(1900, 1, 1) + timedelta(days=random.randrange(73_049))


def spelled(random: Random, day: date) -> str:
    return random.choice(SPELLINGS)(day)


def turn(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def dated_sentences(random: Random) -> Iterator[Messages]:
    """The task, without end: a sentence with a date that none before had, answered by that date in ISO."""
    used: set[date] = set()
    while True:
        day = random_date(random)
        if day not in used:
            used.add(day)
            yield turn(random.choice(SENTENCES).format(spelled(random, day)), day.isoformat())


def small_talk(random: Random) -> Messages:
    """One conversation to pre-train on: whatever the user says, the assistant says again."""
    day = random_date(random)
    numbers = [str(random.randrange(10 ** random.randint(1, 4))) for _ in range(random.randint(1, 4))]
    said = random.choice(
        (
            spelled(random, day),
            random.choice(SENTENCES).format(spelled(random, day)),
            day.isoformat(),
            " ".join(random.choices(NOUNS, k=random.randint(1, 4))),
            random.choice((" ", "-", "/", ", ", ".")).join(numbers),
        )
    )
    return turn(said, said)


def write_rows(path: Path, rows: list[Messages]) -> None:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows), encoding="utf-8")


def write_demo_data(folder: Path) -> None:
    rows = dated_sentences(Random(1987))
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", [next(rows) for _ in range(TRAIN_ROWS)])
    write_rows(folder / "heldout.jsonl", [next(rows) for _ in range(HELDOUT_ROWS)])


if __name__ == "__main__":
    write_demo_data(Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED)
