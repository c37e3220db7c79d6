"""The quickstart's fine-tuning, followed: the landscape at ten steps of it, logarithmically spaced.

Half of the quickstart's questions, 0-shot, asked of the pretrained model and after each step that is kept: the report
shows how the answers' peaks grow as training goes on.

Takes about 9 minutes on 2 CPU cores, under 3 GB of memory.

    python launch.py --config=configs/training_smollm2.py
"""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
    """The configuration."""
    config = quickstart.get_config()
    config.data.test_per_subject = 52
    config.conditions = ("0shot", "sft@all")
    return config
