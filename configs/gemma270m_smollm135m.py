"""A real pair on a laptop: Gemma 3 270M, adapted to medical text, teaches SmolLM2 135M across their tokenizers.

    distil-jax run --config configs/gemma270m_smollm135m.py

Fetches both models from the hub (0.8 GB; the teacher's licence has to be accepted there first), or takes directories:

    distil-jax run --config configs/gemma270m_smollm135m.py \\
        --config.teacher.path=DIR --config.student.path=DIR --config.data.files=train.jsonl

The teacher first learns the definitions of the Human Phenotype Ontology with its embedding frozen: 100 of its 268
million parameters move, and the gradient and the optimiser state of a 262,144 x 640 matrix never exist. Then the same
student is trained three times with equal steps and batches: control, smoothing, distilled.

Estimated at 40 minutes on a laptop with eight cores, from the measured steps of two (docs/recipes.md); 11.2 GiB of
memory at its fullest.

It prints, and writes to summary.json and report/index.html, bits per byte, token accuracy and agreement with the
teacher of the teacher, the untouched student and each trained one, with their intervals (docs/recipes.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of the order of the data, and of the fit of W
    c.workdir = "work/gemma270m_smollm135m"  # everything a run writes, about 15 GB
    c.mesh = "data:-1"  # "slices:2,data:1,fsdp:4,tensor:2" over all chips (docs/scale.md); -1: what the others leave
    # How models attend (docs/models.md): "explicit", "blocks" (long rows, any device), "splash" (TPU); "auto" knows.
    c.attention = "auto"

    c.data = ConfigDict()
    c.data.files = ""  # your JSONL, Parquet or CSV files, separated by commas; empty: the Human Phenotype Ontology
    c.data.corpus = "definitions"  # of terms; or "frequencies": of features in diseases, full of numbers; without files
    # The medical corpus instead (docs/data.md): "all", or names of its sources; from a folder, "hub", or "tfds:FOLDER".
    c.data.sources = ""
    c.data.root = "hub"
    c.data.explanations = True  # what a source says of why an answer is right follows it
    c.data.mend = False  # repair texts; refuse empty, gigantic and foreign ones
    c.data.duplicates = "keep"  # "exact": each text once; "near": nearly the same ones too
    c.data.personal = "keep"  # "report": count personal data, replace it in forums; "replace": everywhere
    # Questions that models will be scored on, so rows that hold one are refused (docs/prepare.md): tasks, or files.
    c.data.benchmarks = ""
    c.data.student_length = 256  # tokens in a packed row
    c.data.teacher_length = 256
    c.data.rows_per_shard = 2048
    c.data.chat = "off"  # "on": a prompt is the user's message and its completion the assistant's (docs/chat.md)
    c.data.chat_any_share = False  # True: take conversations of which nothing, or everything, would be learned
    c.data.processes = 0  # that clean, tokenise and align the text; 0: as many as cores; the result is the same
    # How often a source is read (docs/data.md): "name=2, other=0.5"; a temperature above 1 evens the sources out; at
    # most so many rows of each, 0 for all.
    c.data.weights = ""
    c.data.temperature = 1.0
    c.data.cap = 0

    c.teacher = ConfigDict()
    c.teacher.path = "google/gemma-3-270m"  # a hub id or a Hugging Face directory
    c.teacher.licence = ""  # of the model at path, as docs/export.md names them; empty: recognised
    c.teacher.dtype = "float32"  # of the frozen parameters while it teaches; "bfloat16" or "int8" on accelerators
    c.teacher.adapt = True  # train it on the corpus first; False: it teaches as it came
    c.teacher.spread = "fsdp"  # of its parameters, over fsdp and tensor; "tensor": over that alone; or "replicated"
    c.teacher.scores = "online"  # the teacher in memory while the student learns; "stored": asked once, by `score`
    c.teacher.training = training(steps=80, learning_rate=1e-4)
    c.teacher.training.freeze = "embedding"  # tied, so the head too

    c.student = ConfigDict()
    c.student.path = "HuggingFaceTB/SmolLM2-135M"
    c.student.licence = ""
    c.student.training = training(steps=80, learning_rate=3e-4)

    # Low-rank adapters learn in place of the student's parameters, which stay as they are.
    c.student.lora = ConfigDict()
    c.student.lora.rank = 0  # 0: none, all parameters learn
    c.student.lora.alpha = 16.0  # the update of a kernel is alpha / rank times a b
    c.student.lora.targets = "layers.attention,layers.mlp"  # kernels, or what holds them, separated by commas
    c.student.lora.dtype = "bfloat16"  # of the frozen parameters; float32, or int8 for their kernels

    c.projection = ConfigDict()
    c.projection.size = 8  # student tokens that one teacher token may become
    c.projection.prior = 1.0  # observations that the first piece is worth beside the counts
    c.projection.fit_rows = 64  # packed training rows whose positions W is fitted on
    c.projection.fit_top = 32  # of the teacher's tokens at each position
    c.projection.fit_steps = 100
    c.projection.fit_learning_rate = 0.05
    c.projection.fit_keep = 0.1  # weight of KL(W || W as built)

    c.score = ConfigDict()  # what is stored of the teacher (docs/scores.md); alignment of attention needs it online
    c.score.top_k = 64  # of its tokens at each position; 276 bytes, and 6 or 7 more for each further temperature
    # Exact at these, interpolated between. For a schedule: its ends, 1.0, and some between, as 1.0,2.0,4.0,8.0.
    c.score.temperatures = (1.0,)

    # sum_n w_n (alpha_n CE_n + (1 - alpha_n) tau^2 KL_n) / sum_n w_n + beta L_att + lambda |W - W0|^2
    c.objective = ConfigDict()
    # How the models are compared: the teacher through W, or as docs/rivals.md has it: strict, uld, gold, xtoken_p,
    # xtoken_h, alm, bpm, mlp, low_rank.
    c.objective.kind = "projected"
    c.objective.map_size = 1024  # hidden units of mlp, or rank of low_rank
    c.objective.alpha = schedule("constant", 0.5, 0.5)  # share of cross-entropy where the teacher has something to say
    c.objective.temperature = schedule("constant", 1.0, 1.0)
    c.objective.divergence = "forward"  # KL(teacher || student); also reverse, skewed_forward, skewed_reverse, jsd
    c.objective.skew = 0.1  # share of the teacher in the mixture of the last three (0.5 is usual for jsd)
    c.objective.top_k = 0  # of the teacher's tokens that are projected, the others as one remainder; 0: all of them
    # Targets that the teacher speaks about: "roots", parts of one of its tokens from the first byte on; "boundaries",
    # all that begin where one of its tokens does; "all", also those inside its tokens and across them.
    c.objective.positions = "all"
    c.objective.learn_projection = False  # W learns through the loss too (docs/projection.md says why it should not)
    c.objective.projection_learning_rate = 0.01  # of W's logits, at the peak
    c.objective.projection_keep = 0.1  # lambda of |W - W0|^2
    c.objective.beta = schedule("constant", 0.0, 0.0)  # weight of the distance of attention maps; the paper: 0.2
    c.objective.attention = ConfigDict()
    c.objective.attention.pairs = 2  # layers of each model that are compared, at equal relative depths
    c.objective.attention.student_layers = ""  # "0,1": these instead, against as many of the teacher
    c.objective.attention.teacher_layers = ""
    c.objective.attention.heads = "mean"  # of the maps of a layer, or "mixed": by weights that learn
    c.objective.hidden_states = 0.0  # weight of the distance of those layers' states, through matrices that learn
    c.objective.specialty_weighting = "given"  # or "inverse_frequency", or "dro": driven by each specialty's loss
    c.objective.dro_rate = 0.01  # of "dro" alone: a loss one nat higher gains this much log weight a step
    c.objective.specialty_weights = ""  # "cardiology=1.2,radiology=1.0"; 1 where a specialty is not named
    c.objective.label_smoothing = 0.1  # of the smoothing control alone
    c.objective.block = 256  # tokens whose logits exist at one time; 262,144 x 256 float32 is 0.25 GiB

    # A variant is a name and what it changes in the objective: {"hot": {"temperature": {"start": 4.0}}}.
    c.variants = ConfigDict()
    c.runs = ("control", "smoothing", "distilled")  # students to train, of these three and the variants

    c.watch = ConfigDict()  # of training, without a say in its result (docs/training.md)
    c.watch.hang_seconds = 1800  # without a step: the run ends with status 72, to be started again; 0: never
    c.watch.profile = ""  # "10:13": a trace of these steps in the run's folder, for TensorBoard or Perfetto
    c.watch.tensorboard = False  # the numbers of metrics.jsonl as TensorBoard events too
    c.watch.wandb = ""  # the project of Weights & Biases that they go to as well; empty: none

    c.evaluation = ConfigDict()
    c.evaluation.batch_size = 8
    c.evaluation.rows = 64  # packed test rows that are scored, spread over the split; 0: all
    c.evaluation.curve_rows = 16  # validation rows behind the curve of the report
    c.evaluation.bootstrap = 2000  # resamples of documents behind each interval
    # Benchmarks that every model answers (docs/evaluation.md): "mmlu_medical,medmcqa"; empty: none.
    c.evaluation.tasks = ""
    c.evaluation.task_data = "hub"  # or the folder with their files
    c.evaluation.shots = "0"  # examples before each question; "0,5" for both
    c.evaluation.limit = 0  # items of each task, 0 for all
    c.evaluation.answers = 4  # held-out questions answered by each model in the report
    c.evaluation.answer_tokens = 32

    c.export = ConfigDict()
    c.export.run = "distilled"  # the student that is exported: distilled or a variant
    c.export.dtype = "float32"  # of the stored weights
    c.export.name = ""  # of the model and its folder; empty: that of the work folder, as the licences allow
    c.export.licence_files = ""  # texts that the models' folders lack, separated by commas
    c.export.push_to = ""  # "owner/name" on the Hugging Face hub; empty: nowhere
    c.export.private = True  # of the repository that a push makes

    c.report = ConfigDict()
    c.report.sentence = ""  # whose tokens and attention are shown; empty: a held-out one
    c.report.calibration_rows = 32  # packed test rows behind the reliability of the next token; 0: none
    c.report.turns = 5  # of the measurement of speed, for each model; 0: it is not measured
    c.report.prompt_tokens = 128  # in a turn
    c.report.new_tokens = 64
    c.report.batch = 1
    return c.lock()


def training(steps: int, learning_rate: float) -> ConfigDict:
    """How one model is trained. Pretrained weights move less than fresh ones: low rates, little decay."""
    t = ConfigDict()
    t.steps = steps
    t.batch_size = 8  # packed rows, over all devices
    t.accumulate = 1  # pieces that the batch is taken in, one after the other: less memory, the same numbers
    t.learning_rate = learning_rate  # peak; warm-up, then a cosine
    t.warmup = 10
    t.end_fraction = 0.1  # of the peak, at the last step
    t.weight_decay = 0.01
    t.clip = 1.0  # global gradient norm, over the parameters that learn
    t.freeze = ""  # parameters that stay as they are: "embedding", or dotted paths separated by commas
    t.ema = 0.0  # decay of a running average of the parameters, which is then evaluated and kept; 0: none
    t.compute_dtype = "float32"  # "bfloat16" on accelerators; on a CPU it is slower
    t.remat = "none"  # what is computed again in the backward pass: none, dots (all but matrix products), full (all)
    t.log_every = 5
    t.evaluate_every = 40
    t.checkpoint_every = 40
    t.keep = 2  # newest checkpoints that stay
    t.keep_best = False  # the best point of the validation curve stays too, and is what the run leaves
    t.max_skipped = 5  # updates with a loss or gradient that is not finite, before the run stops
    return t


def schedule(kind: str, start: float, end: float) -> ConfigDict:
    """From start to end over the run: constant, linear, cosine or exponential."""
    return ConfigDict({"kind": kind, "start": start, "end": end})
