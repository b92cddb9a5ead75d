"""A run killed with SIGKILL at random moments and resumed gives the weights of an uninterrupted run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs import build_cache, distance, train, weights
from tiny import conversations, write_jsonl

ROOT = Path(__file__).resolve().parents[3]
KILLS = 4

# Forks a run, kills it after a few steps and a random delay, and forks the next one, until one ends by itself.
# Like a user, resumes if the output has a checkpoint, else starts again.
LAUNCHER = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
from pipeline.student.training.output_directory import is_finished, last_checkpoint
from runs import train

output, cache, student, kills, options = json.loads(sys.argv[1])
said, rng = [], random.Random(int(sys.argv[2]))


def life():
    resume = last_checkpoint(output) is not None
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            train(Path(output), Path(cache), student=Path(student), resume=resume, overwrite=not resume, **options)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return pid


def step():
    checkpoint = last_checkpoint(output)
    return 0 if checkpoint is None else int(str(checkpoint).rpartition("-")[2])


def wait(pid, done):
    while not done():
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)


while True:
    first = step()
    pid = life()
    enough = first + rng.randint(1, 3)
    status = wait(pid, lambda: len(said) < kills and step() >= enough)
    if status is None:  # let it run into saving, a step or another checkpoint
        until = time.monotonic() + rng.uniform(0.0, 0.1)
        status = wait(pid, lambda: time.monotonic() >= until)
    if status is not None:
        break
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    said.append(step())
    if is_finished(Path(output)):  # killed after the student was saved
        status = 0
        break
print(json.dumps([status, said]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_resume_after_random_kills_is_exact(tmp_path: Path, teacher_dir: Path, student_dir: Path):
    cache = build_cache(tmp_path / "cache", teacher_dir, write_jsonl(tmp_path / "chat.jsonl", conversations(24)))
    options = {"epochs": 2, "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-2}
    options |= {"batch_size": 2, "gradient_accumulation_steps": 2}
    whole = train(tmp_path / "whole", cache, student=student_dir, **options)
    given = [str(tmp_path / "parts"), str(cache), str(student_dir), KILLS, options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])}
    command = [sys.executable, "-c", LAUNCHER, json.dumps(given), str(os.getpid())]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    status, found = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    assert len(found) >= 2 and found == sorted(found), "it was over before it could be killed, or lost a checkpoint"
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0.0
    assert json.loads((tmp_path / "parts/trainer_state.json").read_text())["global_step"] == whole.steps
