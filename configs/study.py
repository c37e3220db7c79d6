"""The study: Llama-3-8B on MMLU, 0/1/2/5-shot and through fine-tuning.

The setting of "The representation landscape of few-shot learning and fine-tuning in large language models" (arXiv
2409.03662): up to 200 test questions of each of MMLU's 57 subjects; states of the last token before each block's
attention; LoRA of rank 64 on all projections, on 20 questions a subject out of dev and validation, four times each,
without the header line and with every subject counting the same; the landscape of 10 checkpoints on the way.

The study draws its 200 test questions a subject by a mask, which config.data.mask takes; without one the first 200 are
taken. MMLU (MIT licence) is not shipped: put the hub's parquet files (cais/mmlu, config "all") in a folder with the
layout FOLDER/all/{dev,validation,test}-*.parquet. The model asks for Meta's licence and a login (hf auth login); any
other model goes by its folder or hub name.

Not measured: by --dry_run (with another tokenizer than Llama's, and test questions in place of validation's) one H100
has about 7 minutes of arithmetic at half its peak, of which 35 s train; weights, compiling and the landscapes of 14
conditions come on top. It takes 28 GB of its memory, and on disk 67 GB of states and 7 GB of checkpoints.

    python launch.py --config=configs/study.py --config.data.source=mmlu:FOLDER --workdir=workdirs/study
    python launch.py --config=configs/study.py --config.data.source=mmlu:FOLDER --dry_run --assume_kind=H100
"""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
    """The configuration."""
    config = quickstart.get_config()
    config.model.source = "hub:meta-llama/Meta-Llama-3-8B"
    config.model.dtype = "bfloat16"
    config.data.source = "mmlu:data/mmlu"
    config.data.test_per_subject = 200
    config.conditions = ("0shot", "1shot", "2shot", "5shot", "sft@all")
    config.collect.site = "input_norm"
    config.collect.token_budget = 16384
    config.finetune.update(
        method="lora",
        rank=64,
        alpha=16.0,
        dropout=0.1,
        rslora=False,
        optimizer="adamw",
        learning_rate=1e-4,
        epochs=4.0,
        batch_size=16,
        warmup_ratio=0.05,
        final_ratio=0.01,
        remat="blocks",
        evaluations=0,
        validation="",
        checkpoints=10,
        splits=("dev", "validation"),
        per_subject=20,
        class_weights=True,
    )
    return config
