"""The study in miniature: SmolLM2-135M-Instruct, 12 subjects of the embedded bank, 0-shot, 5-shot and fine-tuned.

Reproduces the picture of "The representation landscape of few-shot learning and fine-tuning in large language models"
(arXiv 2409.03662) on a laptop: few-shot prompts make peaks of subjects, fine-tuning makes peaks of answers.

Takes about 5 minutes on 2 CPU cores, under 4 GB of memory.

    python launch.py
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The configuration."""
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.model = ml_collections.ConfigDict()
    config.model.source = "smollm2-135m-instruct"  # or a folder, a GGUF file, hub:org/name
    config.model.dtype = "float32"

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 0  # devices that hold a copy each; 0: chosen by memory
    config.mesh.fsdp = 0  # devices that a copy is spread over, layer by layer
    config.mesh.tensor = 0  # devices that the heads and features of a layer are spread over

    config.data = ml_collections.ConfigDict()
    config.data.source = "bank"  # or bank:FOLDER, mmlu:FOLDER
    config.data.subjects = ()  # all
    config.data.test_per_subject = 0  # all
    config.data.mask = ""  # mmlu: file of the test rows to keep

    # "<k>shot": the pretrained model after k solved examples; "<k>shot_permuted": their order differs from question to
    # question; "sft": the fine-tuned model, 0-shot.
    config.conditions = ("0shot", "5shot", "sft")

    config.collect = ml_collections.ConfigDict()
    config.collect.site = "residual"  # or "input_norm", as the study has it, "post_attention_norm", "final_norm"
    config.collect.tokens = "last"  # or "question_mean": the mean over the question's tokens
    config.collect.layers = "all"  # or "every 4", counted back from the last, or "1,8,16"
    config.collect.token_budget = 1024  # tokens of a batch, at most (a longer prompt runs alone)
    config.collect.dtype = "float32"  # on disk

    config.finetune = ml_collections.ConfigDict()
    config.finetune.method = "full"  # or "lora"
    config.finetune.header = False  # train on the question without the line that names the subject
    config.finetune.rank = 16
    config.finetune.alpha = 32.0
    config.finetune.dropout = 0.0
    config.finetune.targets = ("q", "k", "v", "o", "gate", "up", "down")
    config.finetune.learning_rate = 3e-4
    config.finetune.steps = 80
    config.finetune.batch_size = 12
    config.finetune.warmup_ratio = 0.05
    config.finetune.final_ratio = 0.01
    config.finetune.weight_decay = 0.0
    config.finetune.beta2 = 0.95
    config.finetune.clip_norm = 1.0
    config.finetune.remat = "elementwise"
    config.finetune.checkpoint_every = 40

    config.landscape = ml_collections.ConfigDict()
    config.landscape.k = 16  # neighbours of the density estimate
    config.landscape.z = 1.6  # significance of a peak, in standard errors
    config.landscape.max_rank = 64  # largest neighbour rank of the intrinsic dimension

    config.compare = ml_collections.ConfigDict()
    config.compare.neighbors = 16  # of whose labels the share is taken

    config.report = ml_collections.ConfigDict()
    config.report.dendrogram_condition = ""  # the one with the most shots
    config.report.dendrogram_layer = 0  # 0: where the peaks match the subjects best

    return config
