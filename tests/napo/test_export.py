"""An exported model is the adapted one, in a folder that transformers reads without napo."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from run_hashes import without_hashes
from transformers import AutoModelForCausalLM, AutoTokenizer

from napo.export import export
from napo.files import read_json
from napo.language_models.loading import load_model
from napo.runs import Run


@pytest.fixture(scope="module")
def exported(demo_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(demo_run, "napo", tmp_path_factory.mktemp("export") / "napo")


def test_logits_are_those_of_base_and_adapter(demo_run: Run, small_world: Path, exported: Path) -> None:
    adapted, tokenizer = load_model(small_world / "model", dtype="fp32", adapter=demo_run.adapter("napo"))
    model = AutoModelForCausalLM.from_pretrained(exported)
    ids = torch.tensor([tokenizer("Movies watched, in order:\nBlue Red\nKing Moon\n")["input_ids"]])
    with torch.no_grad():
        logits, expected = model(ids).logits, adapted(ids).logits
        base = AutoModelForCausalLM.from_pretrained(small_world / "model")(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (base - expected).abs().max() > 0.05  # the adapter does something
    again = AutoTokenizer.from_pretrained(exported)
    assert again("Blue Red\n")["input_ids"] == tokenizer("Blue Red\n")["input_ids"]
    assert model.config.use_cache and not list(exported.glob("adapter*"))


def test_rounded_once(demo_run: Run, exported: Path, tmp_path: Path) -> None:
    export(demo_run, "napo", tmp_path / "napo", dtype="bf16")
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "napo")
    assert rounded.dtype == torch.bfloat16
    whole = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, whole[name].to(torch.bfloat16)), name


def test_the_card_says_where_it_comes_from(demo_run: Run, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "model" and "license" not in front
    record = next(r for r in read_json(demo_run.path / "metrics.json") if r["model"] == "napo")
    assert f"| napo | {record['n']} | {record['hr@1']:.3f} |" in card
    assert card.count("95%") == 1 and " (interval: 95%, percentile bootstrap over users).\n" in card
    assert "`napo train`, seed 0" in card and "`napo sft`, seed 0" in card and '"negatives": 4' in card
    assert "- items: 60" in card and "not stated in its folder" in card
    assert '`tokenizer(title + "\\n", add_special_tokens=False, split_special_tokens=True)`' in card
    assert "Movies watched, in order:\n" in card and "normalised over the titles of the catalogue" in card


def test_figures_of_other_weights_are_left_out(demo_run: Run, small_world: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(demo_run.path, run.path, ignore=shutil.ignore_patterns("data"))
    shutil.copytree(small_world / "model", tmp_path / "base")
    weights = "adapter_model.safetensors"
    shutil.copyfile(run.path / "models" / "sft" / weights, run.path / "models" / "napo" / weights)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: was changed after it was finished"):
        export(run, "napo", tmp_path / "out")
    without_hashes(run)
    card = (export(run, "napo", tmp_path / "out") / "README.md").read_text()
    assert "Not evaluated since it was trained" in card


def test_figures_that_are_not_what_their_name_says_are_marked(demo_run: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(demo_run.path, run.path, ignore=shutil.ignore_patterns("data"))
    card = (export(run, "napo", tmp_path / "out") / "README.md").read_text()
    assert "| napo |" in card and "†" not in card
    weights = "adapter_model.safetensors"
    shutil.copyfile(run.path / "models" / "napo" / weights, run.path / "models" / "sft" / weights)
    without_hashes(run)
    card = (export(run, "napo", tmp_path / "out", overwrite=True) / "README.md").read_text()
    assert "| napo † |" in card and "| sasrec |" in card
    assert card.count("\n† napo: sft was trained again after napo was trained from it\n") == 1


def test_bad_input(demo_run: Run, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"napo holds an export; give another folder, or pass --overwrite"):
        export(demo_run, "napo", exported)
    assert export(demo_run, "sft", exported, overwrite=True) == exported
    with pytest.raises(ValueError, match="is a combination; export its language model, napo"):
        export(demo_run, "napo+sasrec", tmp_path / "x")
    with pytest.raises(ValueError, match="has no 'dpo'; it has sft, sft-longer, napo"):
        export(demo_run, "dpo", tmp_path / "x")
    with pytest.raises(ValueError, match="dtype: expected auto, bf16, fp16, fp32; got 'int8'"):
        export(demo_run, "napo", tmp_path / "x", dtype="int8")


def test_only_an_export_is_replaced(demo_run: Run, exported: Path, tmp_path: Path) -> None:
    def refused(out: Path, words: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=words):
                export(run, "sft", out, overwrite=overwrite)
        assert sorted(tmp_path.rglob("*")) == before

    run = Run(tmp_path / "runs" / "one")
    shutil.copytree(demo_run.path, run.path, ignore=shutil.ignore_patterns("data"))
    for place in (run.path, run.path.parent, run.path / ".." / "one"):
        refused(place, r"out: .* holds .*one, which the export is made from; give another folder")
    base = Path(run.origin("sft").base)
    with pytest.raises(ValueError, match="which the export is made from"):
        export(run, "sft", base, overwrite=True)
    assert (base / "config.json").is_file()
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    refused(tmp_path / "mine", r"out: .*mine holds photos, so it is no export to be replaced; give another folder")
    shutil.copytree(base, tmp_path / "other")
    refused(tmp_path / "other", r"has no README.md with the line 'tags: .*', so it is no export")
    shutil.copytree(exported, tmp_path / "mixed")
    (tmp_path / "mixed" / "figures.csv").write_text("mine")
    refused(tmp_path / "mixed", r"holds figures\.csv, so it is no export")
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "file is a file, so it is no export")
    (tmp_path / "empty").mkdir()
    assert export(run, "sft", tmp_path / "empty") == tmp_path / "empty"
    for link, target in (("link", "empty"), ("dangling", "new")):
        (tmp_path / link).symlink_to(tmp_path / target)
        export(run, "sft", tmp_path / link, overwrite=True)
        assert (tmp_path / link).is_symlink() and (tmp_path / target / "config.json").is_file()
