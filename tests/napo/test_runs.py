from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from napo import files
from napo.files import content_hash, read_json, write_json
from napo.runs import Run, fingerprint, sealed, staging


def quiet(_: str) -> None:
    pass


def test_finished_stage_is_skipped_until_inputs_or_outputs_change(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    calls = []

    def work(aside: Path) -> None:
        calls.append(1)
        (aside / "out").write_text("done")

    first = run.stage("a", work, inputs={"steps": 1}, outputs=["out"], say=quiet)
    assert run.stage("a", work, inputs={"steps": 1}, outputs=["out"], say=quiet) == first
    assert len(calls) == 1
    assert run.stage("a", work, inputs={"steps": 2}, outputs=["out"], say=quiet) != first
    (run.path / "out").unlink()
    run.stage("a", work, inputs={"steps": 2}, outputs=["out"], say=quiet)
    assert len(calls) == 3


def test_a_run_that_cannot_be_written_is_refused_by_its_name() -> None:
    """As a copy that is read-only; in /proc nobody may make a folder, whatever their rights."""
    run = Run("/proc/self/fd/run")
    with pytest.raises(ValueError, match=r"run: /proc/self/fd/run cannot be written into \(.+\); copy it to where"):
        run.configure(seed=0)


def test_stage_that_died_is_redone_from_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)

    def dies(aside: Path) -> None:
        (aside / "out").mkdir()
        (aside / "out" / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage("a", dies, inputs={}, outputs=["out"], say=quiet)
    assert run.stamp("a") is None
    run.stage("a", lambda aside: (aside / "out").mkdir(), inputs={}, outputs=["out"], say=quiet)
    assert list((run.path / "out").iterdir()) == []


def test_seconds_are_those_of_all_sittings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They used to be those of the last one."""
    now = [0.0]
    monkeypatch.setattr(staging, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run = Run(tmp_path)

    def work(aside: Path) -> None:
        now[0] += 100
        if now[0] < 250:
            raise KeyboardInterrupt
        (aside / "out").mkdir()

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run.stage("a", work, inputs={}, outputs=["out"])
    run.stage("a", work, inputs={}, outputs=["out"])
    stamp = run.stamp("a")
    assert stamp is not None and stamp["seconds"] == 300 and "killed" not in stamp
    assert capsys.readouterr().out == "a: 300 s\n"

    def killed(aside: Path) -> None:
        shutil.copytree(aside, tmp_path / "kept")
        raise KeyboardInterrupt

    run = Run(tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        run.stage("b", killed, inputs={}, outputs=["out"])
    shutil.rmtree(run.path / ".working" / "b")
    (tmp_path / "kept").rename(run.path / ".working" / "b")  # as SIGKILL leaves it
    for _ in range(2):
        run.stage("b", work, inputs={}, outputs=["out"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "b: more than 100 s; those until it was killed are not counted"
    assert said[1] == "b: finished before in more than 100 s, skipped"


def test_stage_must_write_what_it_promises(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="without writing out"):
        Run(tmp_path).stage("a", lambda aside: None, inputs={}, outputs=["out"], say=quiet)


OUTPUTS = ["models/a", "notes/a.json"]
STEPS = ((Path, "replace"), (Path, "rename"), (files, "_exchange"), (shutil, "rmtree"))
"""What changes names in a run folder."""


def make(run: Run, number: int, *, calls: list[int] | None = None, overwrite: bool = False) -> None:
    """Stage ``a`` with the option ``number``, which is what its outputs hold."""

    def work(aside: Path) -> None:
        if calls is not None:
            calls.append(number)
        for output in OUTPUTS:
            (aside / output).parent.mkdir(exist_ok=True)
        (aside / OUTPUTS[0]).mkdir()
        (aside / OUTPUTS[0] / "weights").write_text(str(number))
        (aside / OUTPUTS[1]).write_text(str(number))
        (aside / "checkpoint").write_text("large")

    run.stage("a", work, options={"number": number}, inputs={}, outputs=OUTPUTS, overwrite=overwrite, say=quiet)


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Whether a process that does ``work`` gets as far as it is to be killed: at the ``step``-th change of names,
    before it for even numbers and after it for odd ones."""
    child = os.fork()
    if child == 0:
        seen = 0
        for owner, name in STEPS:
            original = getattr(owner, name)

            def dying(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == step + 1:
                    os._exit(9)
                result = original(*args, **kwargs)
                seen += 1
                if seen == step + 1:
                    os._exit(9)
                return result

            setattr(owner, name, dying)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_killed_while_outputs_are_put_in_place_the_next_call_does_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, before: bool
) -> None:
    """At every change of names: what was made is kept, whole, once, and never costs the work again."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    kept = 0
    for step in range(100):
        run = Run(tmp_path / f"{step}")
        if before:
            make(run, 1)
        if not killed_at(step, lambda run=run: make(run, 2, overwrite=True)):  # type: ignore[misc]
            break
        path = run.path / "stages" / "a.json"
        finished = path.is_file() and json.loads(path.read_text())["fingerprint"] == fingerprint(
            {"options": {"number": 2}, "inputs": {}}
        )
        kept += finished
        if finished:  # other options are as little done in its place as they would be later
            with pytest.raises(ValueError, match="made with other options"):
                make(run, 3)
        calls: list[int] = []
        make(run, 2, calls=calls, overwrite=True)
        assert calls == ([] if finished else [2])
        assert (run.path / OUTPUTS[0] / "weights").read_text() == (run.path / OUTPUTS[1]).read_text() == "2"
        stamp = run.stamp("a")
        assert stamp is not None and stamp["outputs"] == {o: content_hash(run.path / o) for o in OUTPUTS}
        names = {"a", "a.json", "config.json", ".lock", "models", "notes", "stages", "weights"}
        assert {path.name for path in run.path.rglob("*")} == names
    assert kept >= 7 and step < 99


def test_outputs_that_somebody_changed_meanwhile_are_made_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    make(run, 1)
    stamp = json.loads((run.path / "stages" / "a.json").read_text())
    write_json(run.path / "stages" / "a.json", sealed(stamp | {"replacing": True}))
    (run.path / OUTPUTS[1]).write_text("other")
    calls: list[int] = []
    make(run, 1, calls=calls)
    assert calls == [1] and (run.path / OUTPUTS[1]).read_text() == "1" and "replacing" not in (run.stamp("a") or {})


def test_a_path_counts_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("x")
    (tmp_path / "two").write_text("x")
    assert fingerprint({"f": tmp_path / "one"}) == fingerprint({"f": tmp_path / "two"})
    (tmp_path / "two").write_text("y")
    assert fingerprint({"f": tmp_path / "one"}) != fingerprint({"f": tmp_path / "two"})
    before = content_hash(tmp_path)
    (tmp_path / "two").rename(tmp_path / "three")
    assert content_hash(tmp_path) != before


def test_reading_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        Run(tmp_path, create=False)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json:1: not JSON"):
        _ = Run(tmp_path, create=False).config


def test_checkpoints_of_other_options_do_not_go_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A typo in the command that goes on with an interrupted training used to delete its checkpoints."""
    run, found = Run(tmp_path / "run"), []

    def work(aside: Path) -> None:
        found.append((aside / "checkpoint-5").exists())
        (aside / "checkpoint-5").mkdir(exist_ok=True)
        (aside / "checkpoint-5" / "weights").write_text("hours")
        raise OSError("interrupted")

    def call(rate: float, data: str = "a", *, overwrite: bool = False) -> None:
        options = {"by": "sft", "rate": rate}
        with pytest.raises(OSError, match="interrupted"):
            run.stage("m", work, options=options, inputs={"data": data}, outputs=["o"], overwrite=overwrite)

    call(0.5)
    refused = r"m: \S+m has checkpoints of a training with other options \(rate 0.5 -> 0.05\).*give another --name or"
    with pytest.raises(ValueError, match=refused):
        call(0.05)
    call(0.5)
    call(0.05, overwrite=True)
    call(0.05)
    assert capsys.readouterr().out == ""
    call(0.05, data="b")  # nobody could go on with them
    assert "m: begins anew, what it is made from has changed since it was interrupted (data a -> b)" in (
        capsys.readouterr().out
    )
    assert found == [False, True, False, True, False]


def test_a_default_is_the_same_given_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, calls = Run(tmp_path / "run"), []

    def call(*, overwrite: bool = False, **options: Any) -> None:
        def work(aside: Path) -> None:
            calls.append(options)
            (aside / "o").write_text(str(options))

        run.stage(
            "m",
            work,
            options={"seed": 0, "options": options},
            defaults={"options": {"dim": 64, "distill": 0.0, "tokens": None, "lora": {"r": 16, "alpha": 32}}},
            inputs={"data": "a"},
            outputs=["o"],
            overwrite=overwrite,
        )

    call(tokens=8)
    stamp = run.path / "stages" / "m.json"
    for record in (read_json(stamp), {"options": {"seed": 0, "options": {"tokens": 8.0, "lora": {"r": 16}}}}):
        # The second is as an older napo left it, whose fingerprint counts what was given.
        record = read_json(stamp) | record
        made_from = {"options": record["options"], "inputs": record["inputs"]}
        write_json(stamp, sealed(record | {"fingerprint": fingerprint(made_from)}))
        for same in ({}, {"dim": 64}, {"distill": 0}, {"lora": {"r": 16}}, {"lora": {}}, {"dim": 64.0}):
            call(tokens=8, **same)
        call(tokens=8.0)
    assert len(calls) == 1
    for other, change in (
        ({"tokens": 8, "dim": 32}, "dim 64 -> 32"),
        ({"tokens": 8, "lora": {"r": 8}}, "lora.r 16 -> 8"),
        ({"dim": 64}, "tokens 8.0 -> none"),
        ({"tokens": 9}, "tokens 8.0 -> 9"),
    ):
        with pytest.raises(ValueError, match=rf"was made with other options \({change}\); pass --overwrite"):
            call(**other)
    call(dim=32, overwrite=True)
    with pytest.raises(ValueError, match=r"was made with other options \(dim 32 -> 64\); pass"):
        call()
    assert len(calls) == 2


def test_an_interrupted_training_goes_on_whether_a_default_is_given_or_not(tmp_path: Path) -> None:
    run, found = Run(tmp_path / "run"), []

    def work(aside: Path) -> None:
        found.append((aside / "checkpoint-5").exists())
        (aside / "checkpoint-5").mkdir(exist_ok=True)
        (aside / "checkpoint-5" / "weights").write_text("hours")
        if len(found) < 4:
            raise OSError("interrupted")
        (aside / "o").write_text("whole")

    def call(**options: Any) -> None:
        made_from: dict[str, Any] = {"options": options, "inputs": {}}
        run.stage("m", work, **made_from, defaults={"dim": 64}, outputs=["o"])

    for given in ({}, {"dim": 64}):
        with pytest.raises(OSError, match="interrupted"):
            call(**given)
    with pytest.raises(ValueError, match=r"with other options \(dim 64 -> 32\), which was interrupted"):
        call(dim=32)
    # As an older napo left it, whose fingerprint counts what was given.
    aside = run.path / ".working" / "m"
    write_json(aside / ".made_from.json", {"options": {"dim": 64}, "inputs": {}})
    (aside / ".fingerprint").write_text(fingerprint({"options": {"dim": 64}, "inputs": {}}))
    with pytest.raises(OSError, match="interrupted"):
        call()
    call(dim=64)
    assert found == [False, True, True, True] and not aside.exists()
