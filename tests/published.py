"""config.json of two published models, for what needs no weights."""

import json
from pathlib import Path

_PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "families" / "published.json").read_text())

LLAMA_3_8B = _PUBLISHED["meta-llama/Meta-Llama-3-8B"]
LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80,
}  # fmt: skip
