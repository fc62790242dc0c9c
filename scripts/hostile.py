"""Meet hostile models, adapters, templates and rows with the real command, under an audit hook.

    python scripts/hostile.py            every case of proofs/corpus.py, a few seconds each

None may execute anything, write outside its output_dir, reach for the network, or hang; each is refused by name, with
exit code 2 and no traceback. The exit code is 1 if one isn't.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proofs import corpus, forks
from proofs.bench import Tally, Workplace

SECONDS = 120.0
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="WORD", help="cases whose names hold one of these words")
    only = parser.parse_args().only
    forks.import_everything()
    tally = Tally("hostile input")
    with tempfile.TemporaryDirectory(prefix="lora-hostile-") as folder:
        place = Workplace.made(Path(folder), 0)
        _see_that_it_watches(place, tally)
        for case in corpus.CASES:
            if not only or any(word in case.name for word in only):
                meet(case, place, tally)
    print(f"{tally.name}: {tally.tried} tried, {len(tally.failures)} failed", file=sys.stderr)
    for failure in tally.failures:
        print(f"  {failure}", file=sys.stderr)
    return int(bool(tally.failures) or not tally.tried)


def meet(case: corpus.Case, place: Workplace, tally: Tally) -> None:
    """Let the command meet a case."""
    tally.tried += 1
    folder = place.folder / f"case-{tally.tried}"
    folder.mkdir()
    model = folder / "model"
    shutil.copytree(place.folder / "model", model)
    arguments = case.make(model, folder)
    noticed = folder / "noticed"
    child = forks.start(arguments, folder / "log", lambda: _watch(folder, noticed))
    try:
        code = child.wait(SECONDS)
    except TimeoutError:
        tally.check(False, f"{case.name}: hangs")
        return
    said = child.said()
    seen = noticed.read_text(encoding="utf-8")
    tally.check(not seen, f"{case.name}: {seen[:300]}")
    tally.check(not (folder / corpus.CANARY).exists(), f"{case.name}: it was executed")
    tally.check(code == case.code and "Traceback" not in said, f"{case.name}: ended with {code}: {said[-500:]}")
    message = " ".join((said[said.index("error:") :] if "error:" in said else said).split())
    tally.check(case.named in message, f"{case.name}: {case.named!r} is not named: {message[:300]}")
    tally.check(case.code == 0 or not (folder / "run").exists(), f"{case.name}: something was written")


def _see_that_it_watches(place: Workplace, tally: Tally) -> None:
    """What doesn't notice a pickle that is read, a module that is run and a file that is written proves nothing."""
    folder = place.folder / "control"
    (folder / "model").mkdir(parents=True)
    corpus.make_pickle(folder / "model" / "evil.pkl")
    corpus.make_code(folder / "model" / "evil_code.py")

    def offend() -> None:
        _watch(folder, folder / "noticed")
        with (folder / "model" / "evil.pkl").open("rb") as file:
            pickle.load(file)
        (folder / corpus.CANARY).rmdir()
        sys.path.insert(0, str(folder / "model"))
        __import__("evil_code")

    forks.start(["schema"], folder / "log", offend).wait(SECONDS)
    seen = (folder / "noticed").read_text(encoding="utf-8")
    for event in ("pickle.find_class", "import: evil_code", "exec", "os.mkdir"):
        tally.check(event in seen, f"control: {event} went unnoticed")


def _watch(folder: Path, noticed: Path) -> None:
    """In the child: note whatever a hostile file has no business with."""
    descriptor = os.open(noticed, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    own = folder / "tmp"
    own.mkdir()
    tempfile.tempdir = str(own)
    offence = _judge(str(folder), (str(folder / "run"), str(own), "/dev/null"))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        found = offence(event, arguments)
        if found:
            os.write(descriptor, f"{event}: {found}\n".encode())

    os.environ["GIT_DIR"] = "/nowhere"
    sys.addaudithook(hook)


def _judge(folder: str, allowed: tuple[str, ...]) -> Callable[[str, tuple[Any, ...]], str | None]:
    def judge(event: str, arguments: tuple[Any, ...]) -> str | None:
        match event:
            case "pickle.find_class" | "socket.connect":
                return repr(arguments)
            case "exec" if getattr(arguments[0], "co_filename", "").startswith(folder):
                return str(arguments[0].co_filename)
            case "import" if "evil" in str(arguments[0]):
                return str(arguments[0])
            case "open" if isinstance(arguments[0], str) and _writes(arguments):
                path = os.path.abspath(arguments[0])
                return None if path.startswith(allowed) else path
            case "os.mkdir" | "os.rename" | "os.remove" | "os.symlink" | "os.link":
                path = _absolute(os.fspath(arguments[0]), arguments[-1])
                return None if path.startswith(allowed) else path
            case _ if event in _PROGRAMS and "git" not in str(arguments):
                return repr(arguments)
        return None

    return judge


def _absolute(path: str, folder: int) -> str:
    """A path, perhaps relative to an open folder."""
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd(), path)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(mode and set(mode) & set("wax+")) or bool(flags & _WRITES)


if __name__ == "__main__":
    sys.exit(main())
