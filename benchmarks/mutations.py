"""What is noticed when files of a saved model, a saved function or a checkpoint change.

    python -m benchmarks.mutations             # prints counts and limits
    python -m benchmarks.mutations --record    # and writes benchmarks/results/

Some thousands of each kind of folder are changed: bits flipped, ranges cut, inserted,
swapped and zeroed, files lost, renamed and exchanged, JSON and the headers of arrays
edited. Each is loaded by a worker process, which has two seconds and is replaced when
it dies. What loads with other values, dtypes, shapes or another program is silent; of a
checkpoint, the one before must come back, with a warning. Then the same with digests
made to fit, as only someone who means harm would: then values may differ, but nothing
may crash or hang. (A forged program is read, not called.) A minute and a half.
--turns is how many of each kind.
"""

import collections
import contextlib
import copy
import hashlib
import json
import random
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import measure
from benchmarks.measure import entry
from l0jax import encoding, models, storage, units
from l0jax.checkpoints import Checkpoints

Files = dict[str, bytes]
"""The files of a folder, by their paths within it."""

SECONDS = 2
FAULTS = ("silent", "crash", "hang", "foreign error")


# --------------------------------------------------------------------- what is changed


def save_model(folder: Path) -> None:
    storage.save(models.MLP((12, 7, 5, 3), rngs=nnx.Rngs(0)), folder)


def save_program(folder: Path) -> None:
    def apply(params, x, scale):
        h = jnp.tanh(x @ params["a"]) * params["half"].astype(jnp.float32)[None]
        noise = jax.random.normal(params["key"], (2,))
        return h @ params["b"] * scale + noise[None], params["count"] + 1

    rng = np.random.default_rng(0)
    params = {
        "a": jnp.float32(rng.normal(size=(4, 6))),
        "half": jnp.bfloat16(rng.normal(size=6)),
        "b": jnp.float32(rng.normal(size=(6, 2))),
        "count": jnp.int32(3),
        "key": jax.random.key(0),
    }
    storage.save_function(
        apply, params, jnp.ones((3, 4)), jnp.ones((3, 1)), folder=folder
    )


def state(value: float) -> dict[str, Any]:
    return {
        "theta": {"w": jnp.linspace(0, value, 6).reshape(3, 2), "b": [jnp.int32(9)]},
        "half": jnp.full(4, value, jnp.bfloat16),
        "key": jax.random.key(int(value)),
    }


def save_checkpoints(folder: Path) -> None:
    for step in (9, 10):
        Checkpoints(folder).save(step, state(step), {"epoch": step})


SAVE = {"model": save_model, "program": save_program, "checkpoint": save_checkpoints}


def files_of(folder: Path) -> Files:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def put(files: Files, folder: Path) -> None:
    """Makes `folder` hold these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


# ----------------------------------------------------------------------- how it changes


def ranges(content: bytes, rng: random.Random) -> tuple[int, int]:
    a = rng.randrange(len(content))
    return a, min(len(content), a + rng.choice((1, 2, 4, 8, 16, 64, 256)))


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.choice((1, 4, 8, 64))) + content[at:]


def cut(content: bytes, rng: random.Random) -> bytes:
    a, b = ranges(content, rng)
    return content[:a] + content[b:]


def zero(content: bytes, rng: random.Random) -> bytes:
    a, b = ranges(content, rng)
    return content[:a] + bytes(b - a) + content[b:]


def swap(content: bytes, rng: random.Random) -> bytes:
    a, b = ranges(content, rng)
    c = rng.randrange(len(content))
    changed = bytearray(content)
    d = min(len(content), c + b - a)
    b = a + d - c
    changed[a:b], changed[c:d] = content[c:d], content[a:b]
    return bytes(changed)


def repeat(content: bytes, rng: random.Random) -> bytes:
    a, b = ranges(content, rng)
    return content[:b] + content[a:b] + content[b:]


BYTES = (flip, flip, flip, truncate, insert, cut, zero, swap, repeat)

ODD = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 10**18, 10**300, 0.5, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "float64",
        "int8",
        "complex128",
        "U8",
        [],
        {},
    ),
    *([[]], [10**9, 10**9], [1] * 1000, {"shape": [2**40]}, "mlp", "../../x", "i3d"),
)


def nodes(tree: Any, below: tuple = ()) -> list[tuple]:
    """The paths of all that a JSON value holds."""
    found = []
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            found += [(*below, key), *nodes(tree[key], (*below, key))]
    return found


def edited(tree: Any, rng: random.Random) -> Any:
    """A JSON value with one node changed, lost, renamed or doubled."""
    tree, paths = copy.deepcopy(tree), nodes(tree)
    if not paths:
        return rng.choice(ODD)
    *above, last = rng.choice(paths)
    node = tree
    for key in above:
        node = node[key]
    match rng.randrange(6):
        case 0:
            del node[last]
        case 1 if isinstance(node, dict):
            node[f"{last}{rng.choice('x .0')}"] = node.pop(last)
        case 2 if isinstance(node[last], int | float):
            node[last] = node[last] * rng.choice((-1, 2, 10**6)) + rng.choice(
                (0, 1, -1)
            )
        case 3:
            nested = []
            for _ in range(rng.choice((3, 500, 900))):
                nested = [nested]
            node[last] = nested
        case 4:
            other = tree
            for key in rng.choice(paths):
                other = other[key]
            node[last] = copy.deepcopy(other)
        case _:
            node[last] = rng.choice(ODD)
    return tree


def edit_json(content: bytes, rng: random.Random) -> bytes:
    """An edit of JSON, well-formed but for where it is too deep."""
    changed = edited(json.loads(content), rng)
    if not rng.randrange(20):
        return b"[" * 10**5
    return (json.dumps(changed, indent=rng.choice((None, 2))) + "\n").encode()


def edit_header(content: bytes, rng: random.Random) -> bytes:
    """An edit of the header of arrays, or of its length alone."""
    length = int.from_bytes(content[:8], "little")
    if not rng.randrange(4):
        absurd = rng.choice((0, 1, length - 1, length + 8, 2**31, 2**62, 2**64 - 1))
        return absurd.to_bytes(8, "little") + content[8:]
    changed = edited(json.loads(content[8 : 8 + length]), rng)
    text = json.dumps(changed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def mutated(files: Files, only: str, rng: random.Random) -> Files:
    """The files with one change, of one whose path begins with `only`."""
    while (changed := _mutated(files, only, rng)) == files:
        pass
    return changed


def _mutated(files: Files, only: str, rng: random.Random) -> Files:
    files, names = dict(files), [name for name in files if name.startswith(only)]
    name = rng.choice(names)
    content = files[name]
    kind = rng.random()
    if kind < 0.05:
        del files[name]
    elif kind < 0.1:
        files[f"{name}{rng.choice(('x', '.bak', '~'))}"] = files.pop(name)
    elif kind < 0.15:
        other = rng.choice(names)
        files[name], files[other] = files[other], content
    elif kind < 0.2:
        files[name] = b""
    elif kind < 0.6 and name.endswith(".json"):
        files[name] = edit_json(content, rng)
    elif kind < 0.6 and name.endswith(".safetensors"):
        files[name] = edit_header(content, rng)
    elif content:
        files[name] = rng.choice(BYTES)(content, rng)
    return files


def forged(files: Files, rng: random.Random) -> Files:
    """A change of a model or a function, with all digests made to fit."""
    files = dict(files)
    record = encoding.opened(files[storage.ARCHITECTURE])
    if storage.PROGRAM in files and rng.randrange(2):
        program = rng.choice(BYTES)(files[storage.PROGRAM], rng)
        files[storage.PROGRAM] = program
        record["program"] = hashlib.sha256(program).hexdigest()
        record["program bytes"] = len(program)
    else:
        record = edited(record, rng)
        # What describes no arrays goes with those there were.
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            files[storage.ARRAYS] = _filled(record["arrays"], rng)
    try:
        files[storage.ARCHITECTURE] = encoding.sealed(record).encode()
    except (AttributeError, TypeError, ValueError):
        return forged(files, rng)
    return files


def _filled(described: Any, rng: random.Random) -> bytes:
    """Arrays of these sizes, their digests put into their descriptions."""
    encoding.check_descriptions(described)
    if sum(map(encoding.size_of, described.values())) > 10**6:
        raise ValueError("too large to write")
    arrays = {}
    for path, each in described.items():
        size = encoding.size_of(each)
        content = b"\1" * size if each["dtype"] == "bool" else rng.randbytes(size)
        each["sha256"] = hashlib.sha256(content).hexdigest()
        arrays[path] = np.frombuffer(content, np.uint8)
    return encoding.pack(described, arrays)


# -------------------------------------------------------------------- what comes of it


def fingerprint(found: Any) -> str:
    """All that makes a loaded model, function or state what it is."""
    if isinstance(found, storage.Program):
        about, arrays = (found.text, found.derivatives), found.params
    elif isinstance(found, nnx.Module):
        about = (type(found).__name__, found.architecture)  # pyrefly: ignore
        arrays = units.arrays(nnx.state(found))
    else:
        about, arrays = str(jax.tree.structure(found)), units.arrays(found)
    whole, _ = encoding.encode_all(arrays)
    return hashlib.sha256(f"{about}{whole}".encode()).hexdigest()


def outcome(kind: str, folder: Path, forged: bool = False) -> str:
    """In a word, what comes of loading a folder: `refused: …` or `loaded: …`."""
    try:
        if kind != "checkpoint":
            found = storage.load(folder)
            # A forged program is read here; to call it is to run it.
            return "loaded: " + ("" if forged else fingerprint(found))
        lines = []
        found = Checkpoints(folder).restore(lambda _: state(1), lines.append)
    except (FileNotFoundError, ValueError) as error:
        ours = type(error) in (FileNotFoundError, ValueError) and str(folder) in str(
            error
        )
        return ("refused: " if ours else "foreign error: ") + repr(error)[:200]
    except BaseException as error:
        return "foreign error: " + repr(error)[:200]
    if found is None:
        return "silent: nothing was restored"
    step, restored, notes = found
    if step == 9 and not any(str(folder / "10") in line for line in lines):
        return "silent: the one before came back without a warning"
    whole = fingerprint(restored) == fingerprint(state(step)) and notes == {
        "epoch": step
    }
    if not whole:
        return "silent: another state was restored"
    return "loaded: whole" if step == 10 else "refused: the one before came back"


def verdict(found: str, whole: str) -> str:
    """An outcome, where a whole folder has another."""
    word = found.split(":")[0]
    if word == "loaded" and whole:
        return "harmless" if found == whole else "silent"
    return word


class Worker:
    """A process that loads folders, one line for each."""

    def __init__(self):
        self.process = None

    def ask(self, question: str, seconds: float) -> str:
        """Its answer, or `crash` or `hang`."""
        if self.process is None:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-m",
                    "benchmarks.mutations",
                    "--work",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self.process
        assert process.stdin
        assert process.stdout
        process.stdin.write(question + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        answer = process.stdout.readline() if ready else ""
        if not answer.endswith("\n"):
            self.stop()
            return "crash" if ready else "hang"
        return answer.strip()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = None


def work() -> None:
    for line in sys.stdin:
        kind, folder, forged = json.loads(line)
        print(" ".join(outcome(kind, Path(folder), forged).split()), flush=True)


# ------------------------------------------------------------------------------- counts


def count(kind: str, forge: bool, turns: int, place: Path) -> tuple[dict, dict]:
    """How often what came of it, and an example of each."""
    whole, folder = place / f"{kind}-whole", place / kind
    if not whole.exists():
        SAVE[kind](whole)
    files, worker = files_of(whole), Worker()
    counts, examples = collections.Counter(), {}
    question = json.dumps([kind, str(folder), forge])

    def fresh() -> str:
        put(files, folder)
        return worker.ask(question, 60)

    expected = fresh()
    assert expected.startswith("loaded"), expected
    newest = "10" if kind == "checkpoint" else ""
    for seed in range(turns):
        rng = random.Random(f"{kind} {seed}")
        changed = forged(files, rng) if forge else mutated(files, newest, rng)
        put(changed, folder)
        if worker.process is None:
            fresh()
            put(changed, folder)
        found = worker.ask(question, SECONDS)
        word = verdict(found, "" if forge else expected)
        counts[word] += 1
        examples.setdefault(word, f"seed {seed}: {found}")
    worker.stop()
    return counts, examples


def main(arguments) -> list[dict]:
    entries = []
    with tempfile.TemporaryDirectory() as place:
        for forge, kind in (
            *((False, k) for k in SAVE),
            (True, "model"),
            (True, "program"),
        ):
            counts, examples = count(kind, forge, arguments.turns, Path(place))
            for fault in FAULTS:
                if fault in examples:
                    print(f"{kind}: {fault}: {examples[fault]}", file=sys.stderr)
            made = "digests made to fit" if forge else "changed"
            summary = ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
            faults = [f for f in FAULTS if not forge or f != "silent"]
            entries += [
                entry(
                    f"{kind}s, {made}: {fault}, of {arguments.turns:,}",
                    counts[fault],
                    0,
                    "",
                    summary,
                )
                for fault in faults
            ]
    return entries


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        measure.run(__doc__, "mutations", main, turns=3000)
