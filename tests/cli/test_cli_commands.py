"""The commands: what they print, write and refuse, and their exit codes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_harness import BRAID, TINY, Place, Result, Served, eventually
from safetensors.numpy import load_file, save_file

LENGTHS = (1, 5, 70, 33)


@pytest.fixture
def ids_file(tmp_path: Path) -> Path:
    """Sequences of several lengths."""
    random = np.random.default_rng(0)
    path = tmp_path / "ids.safetensors"
    save_file({f"ids_{length}": random.integers(0, 256, length) for length in LENGTHS}, path)
    return path


def generate(place: Place, cell: Served, *arguments: object) -> Result:
    done = place.braid("generate", "unused", *arguments, "--ids", "--connect", cell.info.address)
    assert done.code == 0, done
    return done


def test_version_and_help(place: Place) -> None:
    assert place.braid("--version").out.startswith("braid, version ")
    done = place.braid("--help")
    assert done.code == 0
    for command in ("serve", "generate", "score", "plan", "status", "drain"):
        assert command in done.out
        assert place.braid(command, "--help").code == 0


def test_commands_do_not_wait_for_torch() -> None:
    code = "import sys; from braid_orchestrator import cli; cli.run(['plan', sys.argv[1]]); "
    command = [sys.executable, "-c", f"{code}print('torch' in sys.modules)", str(TINY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_wrong_usage_exits_with_2(place: Place) -> None:
    for arguments in ("nonsense", "generate", "serve", "serve x --only full", "serve x --full y", "score x"):
        done = place.braid(*arguments.split())
        assert done.code == 2, arguments
        assert "Error: " in done.err


def test_nobody_there_exits_with_3(place: Place, tmp_path: Path) -> None:
    nowhere = f"unix:{tmp_path}/none.sock"
    for arguments in (["status"], ["drain"], ["generate", "m", "1", "--ids"]):
        done = place.braid(*arguments, "--connect", nowhere)
        assert done.code == 3, done
        assert done.err.startswith("error SERVICE_LOST: ") and nowhere in done.err
        assert done.err.count("\n") == 1


def test_sampling_is_repeatable_with_a_seed(place: Place, cell: Served) -> None:
    hot = ("1 2 3", "-n", 24, "--temperature", 1.5)
    first = generate(place, cell, *hot, "--seed", 11)
    assert generate(place, cell, *hot, "--seed", 11).out == first.out
    assert generate(place, cell, *hot, "--seed", 12).out != first.out
    greedy = generate(place, cell, "1 2 3", "-n", 24).out
    assert generate(place, cell, *hot, "--seed", 11, "--top-k", 1).out == greedy


def test_several_prompts_are_printed_in_order(place: Place, cell: Served) -> None:
    alone = [generate(place, cell, prompt, "-n", 6).out for prompt in ("1 2 3", "7 8", "9")]
    together = generate(place, cell, "1 2 3", "7 8", "9", "-n", 6).out
    headers = [f"==> {prompt} <==\n" for prompt in ("1 2 3", "7 8", "9")]
    assert together == "".join(header + out for header, out in zip(headers, alone, strict=True))


def test_json_of_a_generation(place: Place, cell: Served) -> None:
    lines = generate(place, cell, "1 2 3", "7,8", "-n", 6, "--json").out.splitlines()
    said = [json.loads(line) for line in lines]
    assert [item["prompt"] for item in said] == [[1, 2, 3], [7, 8]]
    for item in said:
        assert len(item["token_ids"]) == item["completion_tokens"] == 6
        assert item["finish_reason"] == "length"


def test_refusals_of_the_cell_are_shown(place: Place, cell: Served) -> None:
    at = ("--connect", cell.info.address)
    place.braid("generate", "m", "999", "--ids", *at).refused("REQUEST_INVALID", "999")
    place.braid("generate", "m", "one", "--ids", *at).refused("REQUEST_INVALID", "one")
    place.braid("generate", "m", "text", *at).refused("CONFIG_INVALID", "tokenizer")
    place.braid("generate", "m", "1", "--ids", "-n", 100000, *at).refused("POOL_EXHAUSTED", "100001")
    place.braid("generate", "m", "1", "--ids", "--top-p", 2, *at).refused("REQUEST_INVALID", "top_p")
    place.braid("generate", "m", "1", "--ids", "--stop", "x", *at).refused("REQUEST_INVALID", "tokenizer")


def test_ctrl_c_exits_with_130_and_frees_everything(place: Place, cell: Served) -> None:
    process = place.start("generate", "m", "1 2 3", "--ids", "-n", 4000, "--connect", cell.info.address)
    assert process.stdout is not None
    process.stdout.read(4)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert eventually(lambda: not any(pool.used for pool in cell.client.status().pools))


def test_status_for_people(place: Place, cell: Served) -> None:
    generate(place, cell, "1 2 3", "-n", 4)
    done = place.braid("status", "--connect", cell.info.address)
    assert done.code == 0
    assert "serving" in done.out and "gated_delta" in done.out and "decode" in done.out
    assert "\x1b" not in done.out


def test_colours_are_for_terminals(place: Place, model: Path) -> None:
    def on_a_terminal(**environment: str) -> bytes:
        ours, theirs = pty.openpty()
        settings = place.environment(TERM="xterm-256color", **environment)
        settings.pop("NO_COLOR", None) if not environment else None
        with subprocess.Popen([BRAID, "plan", str(model)], stdout=theirs, env=settings) as process:
            os.close(theirs)
            seen = b""
            try:
                while data := os.read(ours, 65536):
                    seen += data
            except OSError:
                pass  # Linux reports the other end's closing so
            assert process.wait() == 0
        os.close(ours)
        return seen

    assert b"\x1b[36m" in on_a_terminal()
    assert b"\x1b[36m" not in on_a_terminal(NO_COLOR="1")
    assert "\x1b" not in place.braid("plan", model).out


def test_plan_as_json(place: Place, model: Path) -> None:
    said = json.loads(place.braid("plan", model / "config.json", "--json", "--context", 100).out)
    assert said["family"] == "qwen3_next"
    assert [layer["service"] for layer in said["target"]["layers"]] == ["linear", "linear", "linear", "full"]
    assert said["totals"]["context"] == 100


def test_plan_refuses_in_one_line(place: Place, tmp_path: Path) -> None:
    place.braid("plan", tmp_path / "none").refused("CONFIG_INVALID", "none")


def expected_logits(model: Path, ids_file: Path) -> dict[str, np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = {}
    with torch.no_grad():
        for name, ids in load_file(ids_file).items():
            logits = reference(torch.from_numpy(ids)[None], use_cache=False).logits[0]
            found[name.replace("ids_", "logits_")] = logits.numpy()
    return found


def test_score_writes_logits(place: Place, model: Path, ids_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    how = ("--chunk", 7, "--decode-tail", 3, "--dispatch", "rpc", "--placement", "embedded")
    too_small = ("--max-context", 16, "--max-sequences", 2, "--pool-bytes", "1KiB")  # and so raised
    done = place.braid("score", model, "--ids", ids_file, "--out", out, *how, *too_small)
    assert done.code == 0, done
    found, expected = load_file(out), expected_logits(model, ids_file)
    assert found.keys() == expected.keys()
    for name, logits in found.items():
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected[name], atol=2e-4, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.safetensors", "out.safetensors"]


def test_score_joins_a_cell(place: Place, cell: Served, model: Path, ids_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    at = ("--connect", cell.info.address)
    assert place.braid("score", model, "--ids", ids_file, "--out", out, *at).code == 0
    for name, logits in expected_logits(model, ids_file).items():
        np.testing.assert_allclose(load_file(out)[name], logits, atol=2e-4, rtol=0)
    done = place.braid("score", TINY, "--ids", ids_file, "--out", out, *at)
    done.refused("LAYER_PLAN_DISPUTED", cell.info.address)


def test_score_refuses_before_anything_starts(place: Place, model: Path, tmp_path: Path) -> None:
    def refused(tensors: dict[str, np.ndarray], *words: str) -> None:
        path = tmp_path / "ids.safetensors"
        save_file(tensors, path)
        done = place.braid("score", model, "--ids", path, "--out", tmp_path / "out")
        done.refused("REQUEST_INVALID", *words)

    refused({"other": np.zeros(3, np.int64)}, "ids_")
    refused({"ids_a": np.zeros(3, np.float32)}, "ids_a", "float32")
    refused({"ids_a": np.zeros((3, 2), np.int64)}, "ids_a", "[3, 2]")
    refused({"ids_a": np.zeros(0, np.int64)}, "ids_a", "[0]")
    refused({"ids_a": np.array([1, 256])}, "ids_a", "256", "255")
    refused({"ids_a": np.array([-1])}, "ids_a", "-1")
    (tmp_path / "ids.safetensors").write_bytes(b"garbage")
    done = place.braid("score", model, "--ids", tmp_path / "ids.safetensors", "--out", tmp_path / "out")
    done.refused("REQUEST_INVALID", "safetensors")
    assert not (tmp_path / "out").exists()
    assert place.braid("score", model, "--ids", tmp_path / "none", "--out", tmp_path / "out").code == 2


def test_generate_starts_and_ends_a_cell(place: Place, model: Path) -> None:
    cells = place.cells()
    own = place.braid("generate", model, "-", "--ids", "-n", 5, stdin="1 2 3\n")
    assert own.code == 0 and len(own.out.split()) == 5
    assert set(place.cells()) <= set(cells)  # those of dead owners are swept away
    assert list(place.temporary.iterdir()) == []
