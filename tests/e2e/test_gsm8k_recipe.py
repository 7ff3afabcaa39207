"""The real-size recipe on the real data, with a tiny random model saved to disk in place of the 0.6B one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rlhf.models import build_model, build_tokenizer
from rlhf.recipe.schema import BuildModelConfig, BuildTokenizerConfig
from tests.e2e.running import ROOT, TINY, records

DATA = ROOT.parent / "shared" / "data" / "gsm8k"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the GSM8K files are not at {DATA}")
def test_recipe_runs_on_gsm8k_with_a_model_from_disk(tmp_path):
    """Would catch: a recipe whose columns, template, reward or placement do not fit the data or a saved model."""
    tokenizer = build_tokenizer(
        BuildTokenizerConfig(kind="bpe", vocab_size=512, train_on=str(DATA / "test.jsonl"))
    )
    config = TINY["model"]["build"]["config"] | {"max_position_embeddings": 768}
    model = build_model(
        BuildModelConfig(model_type="qwen3", config=config), tokenizer, dtype="bfloat16", seed=0
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    eval_set = "evaluation.sets.gsm8k"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rlhf.cli", "train", str(ROOT / "recipes" / "gsm8k_grpo.yaml")),
            *(
                f"model.path={tmp_path / 'model'}",
                "placement.all.gpus=0",
                "runtime.threads=1",
                "tracking.wandb=off",
            ),
            *(f"data.path={DATA / 'train.jsonl'}", "data.subset=null", "data.split=null", "data.limit=64"),
            *(f"{eval_set}.path={DATA / 'test.jsonl'}", f"{eval_set}.subset=null", f"{eval_set}.split=null"),
            *(f"{eval_set}.limit=8", "trainer.epochs=null", "trainer.steps=2", "trainer.prompts_per_step=4"),
            *("rollout.max_response_tokens=24", "rollout.group_size=2", "trainer.warmup_steps=0"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = records(tmp_path / "runs" / "gsm8k_grpo")[-1]
    assert last["step"] == 2 and "reward/gsm8k/mean" in last and "eval/gsm8k/pass@1" in last
    assert last["mismatch/logprob_abs_max"] == 0.0  # bfloat16, gradient checkpointing and all
    sample = json.loads((tmp_path / "runs" / "gsm8k_grpo" / "samples.jsonl").read_text().splitlines()[0])
    assert "after ####" in sample["prompt"]
