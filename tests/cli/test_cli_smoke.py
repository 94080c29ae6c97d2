"""The seconds-long check that the whole works: text from three processes is transformers' text."""

from __future__ import annotations

import pytest
from braid.v1 import common_pb2
from braid_orchestrator.launcher import launch
from braid_orchestrator.settings import Settings
from cli_harness import TINY, Place

PROMPT = "def read(self, size=-1):\n    "
COUNT = 32


@pytest.mark.smoke
def test_text_is_that_of_transformers(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("BRAID_RUNTIME_DIR", str(place.runtime))
    with launch(Settings(TINY)) as cell, cell.client() as client:
        found = client.complete(PROMPT, COUNT)
        status = client.status()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = reference.generate(ids, max_new_tokens=COUNT, do_sample=False)[0, ids.shape[1] :].tolist()
    if found.finish_reason == "stop":
        expected = expected[:-1]  # the end token is no part of the output
    assert list(found.token_ids) == expected
    assert found.text == tokenizer.decode(expected, skip_special_tokens=True)
    target = [layer for layer in status.layers if layer.role == common_pb2.ROLE_TARGET]
    services = {layer.layer_id: layer.side for layer in target}
    assert len(services) == reference.config.num_hidden_layers
    assert all(sum(layer.dispatches.values()) >= COUNT for layer in target)
    assert not any(pool.used for pool in status.pools)
