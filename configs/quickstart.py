"""The study in miniature: SmolLM2-135M-Instruct, 12 subjects of the embedded bank, 0-shot, 5-shot and fine-tuned.

Reproduces the picture of "The representation landscape of few-shot learning and fine-tuning in large language models"
(arXiv 2409.03662) on a laptop: few-shot prompts make peaks of subjects, fine-tuning makes peaks of answers.

Takes about 7 minutes on 2 CPU cores, under 3 GB of memory.

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
    # question; "sft": the fine-tuned model, 0-shot; "sft@40": as it was after step 40, where that one is kept;
    # "sft@all": after every step that is kept, the last one as "sft".
    config.conditions = ("0shot", "5shot", "sft")

    config.collect = ml_collections.ConfigDict()
    config.collect.site = "residual"  # or "input_norm", as the study has it, "post_attention_norm", "final_norm"
    config.collect.tokens = "last"  # or "question_mean": the mean over the question's tokens
    config.collect.layers = "all"  # or "every 4", counted back from the last, or "1,8,16"
    config.collect.token_budget = 1024  # tokens of a batch, at most (a longer prompt runs alone)
    config.collect.dtype = "float32"  # on disk

    config.finetune = ml_collections.ConfigDict()
    config.finetune.method = "lora"  # or "full": all weights
    config.finetune.rank = 64  # of LoRA, as the next five
    config.finetune.alpha = 128.0  # the update is scaled by alpha / rank
    config.finetune.dropout = 0.0
    config.finetune.targets = ("q", "k", "v", "o", "gate", "up", "down")
    config.finetune.rslora = True  # ... by alpha / sqrt(rank)
    config.finetune.dora = False  # train lengths and directions of the kernels' columns apart
    config.finetune.adapter = ""  # a folder in PEFT's format: "sft" is this adapter, nothing is trained
    config.finetune.optimizer = "adamw(b2=0.95)"  # any optimiser of optax, with its options
    config.finetune.learning_rate = 1.5e-4
    config.finetune.steps = 100
    config.finetune.epochs = 0.0  # times that each question is shown, instead of steps
    config.finetune.batch_size = 12
    config.finetune.accumulation = 1  # parts that a step is computed in, one after the other, to save memory
    config.finetune.warmup_ratio = 0.05
    config.finetune.final_ratio = 0.01  # of the learning rate, at the end of the cosine
    config.finetune.clip_norm = 1.0  # 0: the gradient is not clipped
    config.finetune.remat = "elementwise"  # recomputed to save memory; or "blocks" (more), "none"
    config.finetune.packing = False  # several questions in a row of attention: the same loss, less padding
    config.finetune.evaluations = 5  # times that the validation questions are asked, after the first
    config.finetune.checkpoints = 10  # steps that are kept, logarithmically spaced; "sft@all" asks at each
    config.finetune.save_every = 50  # steps between two states to resume from
    config.finetune.keep = 1  # of these states on disk
    config.finetune.header = False  # train on the question without the line that names the subject
    config.finetune.splits = ("train",)  # trained on; mmlu: ("dev", "validation")
    config.finetune.per_subject = 0  # questions of each subject that are trained on, at most; 0: all
    config.finetune.class_weights = True  # subjects count the same, however many questions they have
    config.finetune.validation = "held_out"  # some of what would be trained on; or a split; "": none is asked
    config.finetune.validation_share = 0.1  # of each subject, that "held_out" holds out
    config.finetune.validation_questions = 96  # at most so many, of all subjects alike; 0: all
    config.finetune.trackers = ()  # of "tensorboard", "wandb": the log goes there too
    config.finetune.export_merged = False  # write the fine-tuned model as a hub-format folder

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
