from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, tiny_model

from napo.language_models.fused.fuse import fuse


def test_undone_a_model_has_its_own_forwards_again() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    own = [dict(vars(module)) for module in model.modules()]
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids).logits
    fused = fuse(model)
    kinds = {type(module).__name__ for module, _ in fused.changed}
    assert {"Linear", "LlamaRMSNorm", "LlamaMLP"} <= kinds
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    fused.undo()
    assert [set(vars(module)) for module in model.modules()] == [set(names) for names in own]
    assert all(module.cast_input_dtype_enabled for module in model.modules() if hasattr(module, "lora_A"))
    assert torch.equal(model(input_ids=ids).logits, expected)
