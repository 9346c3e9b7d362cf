"""The table of settings: every configuration key, its default, what it may be and what it means.

Checks, `python -m otreg_jax.config`, docs/configuration.md and the rules of resuming follow from
it; a recipe meets the same keys as an ml_collections ConfigDict (`config.default`). Choices are
listed where the thing they choose is defined.
"""

import fnmatch
from typing import Any, NamedTuple

from otreg_jax import otreg, priors, stages
from otreg_jax.allowed import (
    ANSWER,
    FLAG,
    FOLDER,
    MANIFEST,
    MANIFESTS,
    MODEL,
    MULTIPLIERS,
    NAMED_MANIFESTS,
    PROMPT,
    REGEX,
    SENTENCES,
    TEXT,
    TOKENIZER,
    VOICES,
    WRITERS,
    Allowed,
    integer,
    mapping,
    number,
    one_of,
    record,
    rising,
    series,
)
from otreg_jax.data import features, sources, text, tokenization
from otreg_jax.models import adapter, attention, layers

# What happens when a run is resumed with another value.
FIXED = ""  # refused: it would be another run
FREE = "may change"


class Setting(NamedTuple):
    """A row of the table; `on_resume`: FIXED, or what a change does when a run is resumed."""

    key: str
    default: Any
    allowed: Allowed
    meaning: str
    on_resume: str = FIXED


SIZE = integer(1)
COUNT = integer(0)
WIDTH = integer(1, 2**18)  # what is wider, or deeper, is a slip
DEPTH = integer(1, 1024)
SHARE = number(0, 1)
WEIGHT = number(0)
POSITIVE = number(above=0)
DEVICES = integer(1, also=(-1,))
OT = otreg.regularizer.__kwdefaults__  # its own defaults, but for text_set, are the recipes' too

_ROWS = (
    ("seed", 0, integer(0, 2**31 - 1), "decides everything that is drawn at random"),
    (
        "num_steps",
        1000,
        SIZE,
        "optimizer steps of the whole run",
        "may change; the learning rate and otreg.position_weight follow the new length at once, "
        "which is said",
    ),
    ("batch_size", 16, SIZE, "utterances a step, over all devices and hosts"),
    (
        "batch_seconds",
        0.0,
        WEIGHT,
        "audio of a step, padding included: each batch shape has as many rows as make it, and all "
        "steps cost about the same; 0: batch_size rows in every shape",
    ),
    ("packing", False, FLAG, "no padding between utterances in most of the LLM and of Whisper"),
    ("accumulation", 1, SIZE, "micro-batches a step, one after the other: less memory", FREE),
    ("log_every", 10, SIZE, "steps between lines of metrics.jsonl", FREE),
    ("log_to", "tensorboard", WRITERS, "where metrics go beside metrics.jsonl", FREE),
    ("checkpoint_every", 500, SIZE, "steps between checkpoints", FREE),
    ("keep_checkpoints", 2, SIZE, "the newest; and the one of the lowest dev loss, if any", FREE),
    ("keep_every", 0, COUNT, "checkpoints of multiples of it stay for good; 0: none", FREE),
    ("eval_every", 0, COUNT, "steps between cross-entropies on the dev set; 0: none", FREE),
    ("stall_seconds", 900, COUNT, "a run where nothing happens so long ends; 0: never", FREE),
    ("profile", "", TEXT, "START:STOP, steps to trace into WORKDIR/profile", FREE),
    ("max_bad_steps", 10, SIZE, "non-finite steps in a row before training stops", FREE),
    ("compute_dtype", "float32", one_of("float32", "bfloat16"), "of activations, frozen weights"),
    ("frozen_int8", False, FLAG, "frozen kernels in int8: half the memory of bfloat16"),
    ("attention", "auto", one_of(*attention.KERNELS), "cudnn: GPU; splash: TPU; rows: CPU", FREE),
    (
        "remat",
        "none",
        one_of("none", *layers.REMAT),
        "activations computed again in the backward pass, for less memory: dots, all but products "
        "with weights; full, all but the input of each layer",
    ),
    ("freeze", "^encoder/positions/", REGEX, "paths of parameters that are not trained"),
    ("mesh.data", -1, DEVICES, "devices along this axis; -1: all that the others leave", FREE),
    ("mesh.fsdp", 1, DEVICES, "likewise; parameters are split over it", FREE),
    ("mesh.tensor", 1, DEVICES, "likewise; kernels are split over it", FREE),
    ("data.train", "", MANIFESTS, "training data"),
    (
        "data.allow_change",
        False,
        FLAG,
        "resume on other utterances than those of the checkpoint; the run is then no longer exact",
        FREE,
    ),
    ("data.dev", "", MANIFEST, "in-domain evaluation", FREE),
    ("data.test", "", NAMED_MANIFESTS, "further evaluation sets", FREE),
    ("data.cache", "", TEXT, 'synthetic speech ("": WORKDIR/data), indexes ("": ~/.cache)', FREE),
    ("data.max_utterances", 0, COUNT, "use only the first so many for training; 0: all"),
    ("data.num_mels", 80, integer(1, 200), "mel bins; Whisper has 80, from large-v3 on 128"),
    ("data.window", 0.0, WEIGHT, "seconds that silence fills up, as Voxtral has it: 30; 0: none"),
    ("data.window_masked", False, FLAG, "attention is kept from that silence (Qwen2-Audio)"),
    ("data.max_duration", 30.0, POSITIVE, "seconds; longer audio is refused, never cut"),
    ("data.num_buckets", 2, SIZE, "batch shapes (frames, tokens), derived from the data"),
    ("data.num_workers", 0, COUNT, "loader processes; 0: threads of this process", FREE),
    (
        "data.on_bad_audio",
        "raise",
        one_of(*sources.ON_BAD_AUDIO),
        "skip: left out, counted, listed in WORKDIR/skipped.jsonl",
    ),
    (
        "data.long_audio",
        "reject",
        one_of(*sources.LONG_AUDIO),
        "chunk: divided between words that the manifest times",
    ),
    ("data.max_tokens", 0, COUNT, "longer transcripts are unusable; 0: no limit"),
    ("data.data_root", "", FOLDER, 'where relative audio paths start; "": the manifest\'s folder'),
    (
        "data.mixture",
        "",
        one_of(*sources.MIXTURES),
        "groups that temperature samples; corpus: file",
    ),
    (
        "data.weights",
        (),
        series(POSITIVE),
        "shares of an epoch: of each manifest, then of synthetic speech; (): data.mixture decides",
    ),
    (
        "data.distractors",
        0,
        COUNT,
        "words of other utterances that training adds to the list in a row's context",
    ),
    ("data.temperature", 1.0, number(0.1), "share of a group ~ size^(1 / temperature)"),
    ("data.features", "host", one_of(*features.PLACES), "where what the encoder reads is made"),
    (
        "data.augment.speeds",
        (1.0,),
        series(number(0.25, 4), 1),
        "one is drawn for each utterance: (0.9, 1.0, 1.1)",
    ),
    ("data.augment.noise", "", MANIFEST, "recordings of noise"),
    ("data.augment.noise_prob", 0.5, SHARE, "of utterances with added noise"),
    ("data.augment.noise_snr", (0.0, 20.0), rising(number(-100, 100)), "dB, drawn uniformly"),
    ("data.augment.rir", "", MANIFEST, "room impulse responses"),
    ("data.augment.rir_prob", 0.5, SHARE, "of utterances put into a room"),
    ("data.augment.time_masks", 0, COUNT, "SpecAugment, inside the step"),
    ("data.augment.time_width", 50, COUNT, "frames at most, and a fifth of the utterance"),
    ("data.augment.freq_masks", 0, COUNT, "SpecAugment, inside the step"),
    ("data.augment.freq_width", 20, COUNT, "mel bins at most"),
    (
        "synthetic.sentences",
        "",
        SENTENCES,
        "that eSpeak NG speaks, one a line, for training and for test sets; beside data.train if "
        'that is given. "": the templates of the recipe, if any',
    ),
    (
        "synthetic.num_train",
        0,
        COUNT,
        "utterances to train on; 0: each of the sentences once, or, without, no synthetic speech",
    ),
    ("synthetic.num_test", 100, SIZE, "sentences of each language for every test set"),
    ("synthetic.rates", (120, 220), rising(integer(40, 500)), "words a minute, drawn uniformly"),
    ("synthetic.silence", (0.0, 0.0), rising(WEIGHT), "seconds at both ends, drawn uniformly"),
    ("synthetic.lang", "en", TEXT, "of templates, and of files of sentences that name none"),
    ("synthetic.seed", 0, COUNT, "of the sentences and who speaks them"),
    ("tokenizer.path", "", TOKENIZER, '"": that of llm.path, else one is trained'),
    (
        "tokenizer.vocab_size",
        256,
        integer(8, 2**16),
        "at most, of a tokenizer trained on the training transcripts",
    ),
    (
        "tokenizer.model_type",
        "unigram",
        one_of(*tokenization.MODEL_TYPES),
        "of a trained SentencePiece",
    ),
    ("tokenizer.max_unknown", 0.05, SHARE, "of <unk> among the transcripts' tokens, at most"),
    (
        "prompt",
        "{speech}\n",
        PROMPT,
        "what surrounds the speech; the answer follows. chat:Transcribe: {speech} is a turn of the "
        "model's own chat template. {column} is a field, [[ ]] an optional part: see docs/data.md",
    ),
    ("model.path", "", MODEL, "a whole speech LLM: the default of encoder, adapter and llm.path"),
    ("model.revision", "", TEXT, "the commit of a hub id"),
    (
        "encoder.path",
        "",
        MODEL,
        'of a kind in docs/pretrained.md, Whisper say, alone or in a model; "": from scratch',
    ),
    ("encoder.revision", "", TEXT, "the commit of a hub id"),
    (
        "encoder.keep",
        False,
        FLAG,
        "compute what a frozen encoder gives once, and keep it in data.cache or WORKDIR/encoded",
    ),
    ("encoder.embed_dim", 96, integer(4, 2**18, multiple_of=2), "width"),
    ("encoder.num_layers", 2, DEPTH, "Transformer blocks"),
    ("encoder.num_heads", 4, DEPTH, "of attention; they divide the width"),
    ("encoder.mlp_dim", 384, WIDTH, "width inside a block's MLP"),
    ("encoder.max_positions", 1500, SIZE, "at most, counted after the strides"),
    (
        "encoder.strides",
        (1, 2),
        series(integer(1, 16), 1),
        "of the convolutions over 100 mel frames a second",
    ),
    ("encoder.pool", 1, DEPTH, "so many positions are averaged to one; Qwen2-Audio has 2"),
    ("adapter.path", "", MODEL, 'a speech LLM that holds one; "": from scratch'),
    ("adapter.revision", "", TEXT, "the commit of a hub id"),
    ("adapter.kind", "mlp", one_of(*adapter.KINDS), "see otreg_jax/models/adapter.py"),
    ("adapter.stack", 1, DEPTH, "encoder positions to one speech embedding"),
    ("adapter.hidden_dim", 192, WIDTH, "width between encoder and LLM"),
    ("adapter.num_layers", 2, DEPTH, "of transformer, conformer and qformer"),
    ("adapter.num_heads", 8, DEPTH, "likewise"),
    ("adapter.num_queries", 1, DEPTH, "qformer: embeddings a window"),
    ("adapter.dropout", 0.0, number(0, below=1), "of its last hidden layer"),
    (
        "adapter.norm",
        "none",
        one_of(*adapter.NORMS),
        "table: outputs have one learned norm, which starts as the median of the LLM's table",
    ),
    ("llm.path", "", MODEL, '"": from scratch'),
    ("llm.revision", "", TEXT, "the commit of a hub id"),
    ("llm.embed_dim", 96, WIDTH, "width"),
    ("llm.num_layers", 2, DEPTH, "Transformer blocks"),
    ("llm.num_heads", 4, DEPTH, "of attention: queries"),
    ("llm.num_kv_heads", 4, DEPTH, "of keys and values; they divide num_heads"),
    ("llm.head_dim", 24, integer(2, 2**12, multiple_of=2), "even: rotary embeddings turn pairs"),
    ("llm.mlp_dim", 288, WIDTH, "width inside a block's MLP"),
    ("llm.tie_embeddings", True, FLAG, "the output layer is the embedding table"),
    (
        "llm.pretrain.num_steps",
        0,
        COUNT,
        "before the speech, teach a from-scratch LLM the transcripts' language and to copy "
        "embeddings into text; kept in WORKDIR/llm",
    ),
    ("llm.pretrain.batch_size", 32, SIZE, "sentences a step"),
    ("llm.pretrain.learning_rate", 3e-3, POSITIVE, "at its peak"),
    ("llm.pretrain.num_sentences", 4000, COUNT, "drawn from the synthetic grammar, if any"),
    ("llm.pretrain.copy_fraction", 0.75, SHARE, "of the examples; the rest is plain text"),
    ("llm.pretrain.max_repeat", 6, SIZE, "copying: each token stands 1 to max_repeat times"),
    ("llm.pretrain.noise", 0.5, WEIGHT, "copying: relative to the norm of the embeddings"),
    (
        "lora.pattern",
        "",
        REGEX,
        'whole paths of kernels to adapt: "llm/layers/attn/[qv]/kernel"; "": none',
    ),
    ("lora.path", "", MODEL, "a PEFT directory: the pairs of the LLM start as they stand in it"),
    ("lora.revision", "", TEXT, "the commit of a hub id"),
    ("lora.rank", 8, DEPTH, "of the update of a kernel"),
    ("lora.scale", 1.0, POSITIVE, "of the update; what other libraries call alpha / rank"),
    ("otreg.weight", 0.0, WEIGHT, "lambda at its full value; 0: cross-entropy alone"),
    ("otreg.start_step", 0, COUNT, "stage 1 (SFT, lambda = 0) lasts until here"),
    ("otreg.ramp_steps", 0, COUNT, "lambda rises linearly over these steps"),
    (
        "otreg.layer",
        0,
        COUNT,
        "0: input embeddings; k: hidden states after k LLM layers, all but the last",
    ),
    (
        "otreg.layer_weights",
        (),
        series(WEIGHT),
        "the loss is the sum of those of layers 0, 1, … times these; (): that of otreg.layer",
    ),
    # The paper's reading. `otreg.regularizer` cannot start from it: it needs the token ids.
    ("otreg.text_set", "unique", one_of(*otreg.CHOICES["text_set"]), "tokens that take part"),
    (
        "otreg.text_mass",
        OT["text_mass"],
        one_of(*otreg.CHOICES["text_mass"]),
        "count: unique tokens weigh as often as they occur",
    ),
    (
        "otreg.center",
        OT["center"],
        one_of(*otreg.CHOICES["center"]),
        "what OTReg and InfoNCE remove: the mean text vector; pcs, also principal directions",
    ),
    ("otreg.cost", OT["cost"], one_of(*otreg.CHOICES["cost"]), "of a speech-text pair"),
    ("otreg.position_weight", OT["position_weight"], WEIGHT, "gamma, from start_step on"),
    ("otreg.position_weight_final", -1.0, number(0, also=(-1,)), "gamma at the end; -1: constant"),
    (
        "otreg.position",
        "square",
        one_of(*priors.KINDS),
        "how the prior grows with the distance from the diagonal, see otreg_jax/priors.py",
    ),
    (
        "otreg.window",
        1.0,
        number(above=0, high=1),
        "pairs further from the diagonal, relative to the lengths, carry nothing; 1: no window",
    ),
    ("otreg.structure", 0.0, number(0, below=1), "alpha of fused Gromov-Wasserstein; 0: off"),
    (
        "otreg.after_ctc",
        False,
        FLAG,
        "the plan is of what CTC's collapse leaves: its blanks give up their mass, its repeats are "
        "merged",
    ),
    ("otreg.epsilon", OT["epsilon"], POSITIVE, "entropic regularization, in units of the cost"),
    ("otreg.num_iters", OT["num_iters"], SIZE, "Sinkhorn iterations; watch marginal_error"),
    (
        "otreg.speech_tau",
        OT["speech_tau"],
        number(above=0, high=1),
        "rho: below 1 speech positions may give up mass",
    ),
    (
        "otreg.plan",
        OT["plan"],
        one_of(*otreg.CHOICES["plan"]),
        "position: the control, no similarity in the plan",
    ),
    ("otreg.backend", OT["backend"], one_of(*otreg.CHOICES["backend"]), "what solves for it", FREE),
    ("ce.weight", 1.0, WEIGHT, "cross-entropy; 0: the LLM runs only as far as the others need"),
    ("ctc.weight", 0.0, WEIGHT, "CTC over the LLM's vocabulary on the adapter's outputs; 0: none"),
    (
        "ctc.classes",
        "all",
        one_of(*text.CLASSES),
        "all rows of the LLM's table, or those of tokens used in the training transcripts: over a "
        "large table cosine logits learn nothing",
    ),
    ("ctc.scale", 10.0, POSITIVE, "initial (learned) scale of its cosine logits"),
    (
        "kl.weight",
        0.0,
        WEIGHT,
        "KL divergence from the LLM that reads the transcript to the LLM that hears it; 0: none",
    ),
    ("infonce.weight", 0.0, WEIGHT, "contrastive loss of pooled speech and text; 0: none"),
    ("infonce.temperature", 0.1, POSITIVE, "its cosines are divided by it"),
    ("optim.learning_rate", 1e-3, POSITIVE, "at the end of the warm-up"),
    ("optim.warmup_steps", 50, COUNT, "the learning rate rises linearly over these"),
    ("optim.final_fraction", 0.1, SHARE, "of the learning rate, at the end of the cosine"),
    ("optim.restart_step", 0, COUNT, "warm-up and cosine begin anew here (stage 2); 0: never"),
    ("optim.weight_decay", 0.0, WEIGHT, "on kernels and low-rank pairs only"),
    ("optim.b1", 0.9, number(0, below=1), "AdamW"),
    ("optim.b2", 0.98, number(0, below=1), "AdamW"),
    ("optim.clip_norm", 1.0, POSITIVE, "largest global norm of a gradient"),
    ("optim.ema_decay", 0.0, number(0, below=1), "evaluate averaged weights (0.999, say); 0: no"),
    ("optim.multipliers", (), MULTIPLIERS, "of the learning rate by path, first match wins"),
    (
        "decode.max_tokens",
        0,
        COUNT,
        "of a hypothesis; 0: from the longest evaluation transcript",
        FREE,
    ),
)
TABLE = {row[0]: Setting(*row) for row in _ROWS}

# Speech from templates, in the place of files of sentences: what a recipe may put into `synthetic`
# beside the keys above; * stands for any name. See configs/quickstart.py and
# `data.sets.synthetic_sets`.
_WORDS = series(TEXT, 1)
_CONDITIONS = mapping(
    record(
        voices=TEXT,
        templates=TEXT,
        rate=number(0.1, 10),
        reverb=WEIGHT,
        snr=number(-100, 100),
        silence=rising(WEIGHT),
    )
)
_SYNTHETIC = (
    ("rate", integer(40, 500), "words a minute"),
    ("templates", _WORDS, 'sentences: "call {person}"'),
    ("slots", mapping(_WORDS), "the words that fill the templates"),
    ("train_voices", VOICES, "who speaks the training and the dev set"),
    ("conditions", _CONDITIONS, "test sets beside dev"),
    ("*_templates", _WORDS, "templates of conditions that name them"),
    ("*_voices", VOICES, "voices of conditions that name them"),
    ("train_conditions", _CONDITIONS, "met in turn by the training utterances"),
)
SYNTHETIC = tuple(Setting(f"synthetic.{key}", None, *row) for key, *row in _SYNTHETIC)
NEEDED = tuple(row.key for row in SYNTHETIC[:5])  # with num_train and no sentences
# What a stage may name beside the keys of the sections `stages.SECTIONS`; * is its name.
_STAGES = (
    ("start", COUNT, "the stage's first step; the first stage starts at 0"),
    ("train", REGEX, 'paths of parameters that it trains; "": all that are not frozen'),
)
STAGES = tuple(Setting(f"stages.*.{key}", None, *row) for key, *row in _STAGES)
# Tasks that are mixed; * is a task's name. Without any, the run transcribes after `prompt`.
_TASKS = (
    ("prompts", series(PROMPT, 1), "templates, of which each draw takes one; without: `prompt`"),
    ("answer", ANSWER, "a template too; known for transcribe, translate, identify, answer"),
    ("weight", POSITIVE, "share of the draws, relative to the other tasks'; without: 1"),
)
TASKS = tuple(Setting(f"tasks.*.{key}", None, *row) for key, *row in _TASKS)
ROWS = (*TABLE.values(), *SYNTHETIC, *STAGES, *TASKS)


def find(key: str) -> Setting | None:
    """The row of a key; in a stage, the row of the key that it stands in for."""
    if key.startswith("stages."):
        _, _, rest = key.removeprefix("stages.").partition(".")
        if rest.partition(".")[0] in stages.SECTIONS:
            return TABLE.get(rest)
    patterns = (row for row in (*SYNTHETIC, *STAGES, *TASKS) if fnmatch.fnmatchcase(key, row.key))
    return TABLE.get(key) or next(patterns, None)
