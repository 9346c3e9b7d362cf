"""The study: which form of OTReg generalizes, measured against its controls and rivals.

A small SLM of frozen pretrained parts learns from two voices and one narrow text domain, then is
tested on other voices, conditions and texts. `benchmarks/study.py` makes the parts, runs every arm
and writes docs/study.md; a single run, once the parts are there:

    python -m otreg_jax.train --config=configs/study.py:trimmed,ce,0 --workdir=runs/study-ce

The argument is "world,arm,seed", or an arm alone. Worlds: trimmed, untrimmed (0.2 to 0.8 s of
silence at both ends), human (recordings of several languages; the adapter learns from one), each
with options after "+": `lora` (rank 8 on the LLM, else frozen), `tuned` (the encoder learns at a
tenth of the rate, else frozen), `screen` (the split that hyper-parameters are chosen on: other
voices, texts and domains).
Further key=value items change the recipe: "trimmed+screen,ce,0,optim.learning_rate=0.001".
"encoder" and "llm" alone are the recipes of the pretrained parts, "human-encoder" and "human-llm"
of those for recordings.
"""

import ast
import runpy
from pathlib import Path

from otreg_jax import config as config_lib

FOLDER = "runs/study"  # of the parts and of the speech
STEPS = 300

SLOTS = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["SLOTS"]
# Four text domains over the same words: training and new domain of either split.
DOMAINS = {
    "confirm": (
        "set a timer for {number} {unit}",
        "turn {state} the {device} in the {room}",
        "call {person} at {tens} {number}",
        "remind {person} on {day} at {number}",
        "meet {person} and {person} in {month}",
        "move the meeting from {day} to {day} {number}",
        "send {tens} messages to {person} in the {room}",
    ),
    "confirm-new": (
        "{person} and {person} meet {number} {unit} from the {room}",
        "{tens} {number} messages for {person} on {day}",
        "in {month} {person} call the {room}",
        "at {number} {unit} to {number} move the {device}",
        "{day} the {number} a meeting in the {room}",
        "the {device} {state} timer for {tens} {unit}",
        "{person} set the {room} {device} for {day}",
    ),
    "screen": (
        "for {person} turn the {device} {state} at {number}",
        "{day} at {tens} {number} call the {room}",
        "meet in the {room} from {number} to {number}",
        "a meeting and a timer on {month} {number}",
        "send the {device} to {person} in {month}",
        "move {number} messages to {day}",
        "set {tens} {unit} and remind {person}",
    ),
    "screen-new": (
        "{person} to {person} {number} messages",
        "on {day} set the {room} {device} {state}",
        "the meeting for {month} and {month}",
        "timer at {tens} {number} turn {state}",
        "remind the {room} in {number} {unit}",
        "call from {person} at {number}",
        "{tens} {unit} a {device} move",
    ),
}
WORDS = sorted(
    {word for templates in DOMAINS.values() for t in templates for word in t.split()}
    - {f"{{{name}}}" for name in SLOTS}
    | {word for words in SLOTS.values() for word in words}
)
# What the encoder and, beside the domains, the LLM were pretrained on: words in random order.
RANDOM_ORDER = tuple(" ".join(["{word}"] * length) for length in range(3, 9))

# (eSpeak voice + variant, pitch 0-99). The encoder hears all but `unheard`.
VOICES = {
    "confirm": {
        "train": (("en-us", 40), ("en-us+f2", 55)),
        "other": (("en-gb", 50), ("en-us+m7", 60), ("en-gb+f4", 65), ("en-us+m1", 30)),
        "unheard": (("en-us+f3", 50), ("en-gb+m5", 45), ("en-gb-scotland", 50), ("en-us+m4", 35)),
    },
    "screen": {
        "train": (("en-gb+m3", 35), ("en-gb+f1", 70)),
        "other": (("en-us+m2", 45), ("en-us+f4", 60), ("en-gb+m6", 55), ("en-gb+f5", 50)),
        "unheard": (("en-us+m8", 50), ("en-gb+f3", 60), ("en-gb+m4", 40), ("en-us+f5", 65)),
    },
}
CONDITIONS = {
    "voices": {"voices": "other"},
    "unheard": {"voices": "unheard"},
    "fast": {"rate": 1.3},
    "reverb": {"reverb": 0.4},
    "noise": {"snr": 10.0},
    "silence": {"silence": (0.2, 0.8)},
    "domain": {"templates": "new"},
    "domain_voices": {"templates": "new", "voices": "other"},
}
SILENCE = (0.2, 0.8)  # seconds at either end of untrimmed speech

LAYER1 = {
    "otreg.weight": 3.0,
    "otreg.layer": 1,
    "otreg.text_set": "sequence",
    "otreg.center": "mean",
    "otreg.epsilon": 0.02,
    "otreg.num_iters": 100,
}
LAYER0 = {"otreg.weight": 3.0, "otreg.layer": 0, "otreg.position_weight": 3.0}
LIGHT, FAINT = {"otreg.weight": 1.0}, {"otreg.weight": 0.3}
FADING = {"otreg.position_weight": 3.0, "otreg.position_weight_final": 0.0}
POSITION = {"otreg.plan": "position", "otreg.position_weight": 3.0}
RELAXED = {"otreg.speech_tau": 0.5, "otreg.epsilon": 0.05}
STAGE2 = {"otreg.start_step": STEPS // 2, "otreg.ramp_steps": STEPS // 8}
RESTART = {"optim.restart_step": STEPS // 2}
CTC = {"ctc.weight": 0.3}

ARMS = {
    # Step 0, whose learning rate is 0: what the others start from.
    "untrained": {"num_steps": 1, "optim.warmup_steps": 1},
    "ce": {},
    # Rivals.
    "dropout": {"adapter.dropout": 0.1},
    "weight_decay": {"optim.weight_decay": 0.1},
    "restart": RESTART,
    "infonce": {"infonce.weight": 0.3},
    "ctc": CTC,
    # The paper's reading: rows of the embedding table, unique tokens, no prior, second stage.
    "paper": {"otreg.weight": 1.0, **STAGE2, **RESTART},
    "paper0": {"otreg.weight": 1.0},  # from step 0
    "layer0_prior": LAYER0,
    "layer0_centred": {**LAYER0, **FADING, "otreg.center": "mean"},
    "layer0_pcs": {**LAYER0, **FADING, "otreg.center": "pcs"},
    "position0": {**LAYER0, **POSITION},
    # Contextual: hidden states after the first layer, the transcript alone as the target.
    "layer1": LAYER1,
    "layer1_prior": {**LAYER1, **FADING},
    "layer1_light": {**LAYER1, **FADING, **LIGHT},
    "layer1_faint": {**LAYER1, **FADING, **FAINT},
    "layer1_relaxed": {**LAYER1, **RELAXED},
    "layer2_prior": {**LAYER1, **FADING, "otreg.layer": 2},
    "position1": {**LAYER1, **POSITION},
    # With CTC.
    "layer1_prior_ctc": {**LAYER1, **FADING, **CTC},
    "layer1_light_ctc": {**LAYER1, **FADING, **LIGHT, **CTC},
    "layer1_faint_ctc": {**LAYER1, **FADING, **FAINT, **CTC},
    "layer1_relaxed_ctc": {**LAYER1, **RELAXED, **CTC},
    "layer1_relaxed_faint_ctc": {**LAYER1, **RELAXED, **FAINT, **CTC},
    "position1_ctc": {**LAYER1, **POSITION, **CTC},
}
WORLDS = ("trimmed", "untrimmed", "human")
OPTIONS = ("lora", "tuned", "screen")


def get_config(name: str = "trimmed,ce,0"):
    """The recipe of "world,arm,seed", or of a part: "encoder", "llm"."""
    if name in PARTS:
        return PARTS[name]()
    if "," not in name:
        name = f"trimmed,{name},0"
    world, arm, seed, *changes = (name if name.count(",") > 1 else f"{name},").split(",")
    world, *options = world.split("+")
    problems = [f"no such world {world!r}: {', '.join(WORLDS)}"] if world not in WORLDS else []
    problems += [f"no such option {o!r}: {', '.join(OPTIONS)}" for o in options if o not in OPTIONS]
    problems += [f"no such arm {arm!r}: {', '.join(ARMS)}"] if arm not in ARMS else []
    problems += [f"seed {seed!r} is no number"] if not seed.isdigit() else []
    problems += [f"{change!r} is not key=value" for change in changes if "=" not in change]
    if problems:
        raise ValueError(f"configs/study.py:{name}: write world,arm,seed; " + "; ".join(problems))

    split = "screen" if "screen" in options else "confirm"
    c = human_base() if world == "human" else base()
    c.seed = int(seed)
    c.num_steps = STEPS
    c.batch_size = 16
    c.checkpoint_every = STEPS
    c.keep_checkpoints = 1
    c.data.cache = f"{FOLDER}/data"
    c.data.num_buckets = 1
    part = "human-" if world == "human" else ""
    c.encoder.path = f"{FOLDER}/{part}encoder"
    c.llm.path = f"{FOLDER}/{part}llm"
    if world == "human":  # these files are written by benchmarks/study.py
        c.data.train = f"{FOLDER}/human/train.jsonl"
        c.data.dev = f"{FOLDER}/human/dev.jsonl"
    else:
        c.synthetic.update(
            synthetic(
                DOMAINS[split],
                VOICES[split]["train"],
                num_train=400,
                num_test=48,
                seed=1000 if split == "screen" else 0,
                new_templates=DOMAINS[f"{split}-new"],
                conditions=CONDITIONS,
                other_voices=VOICES[split]["other"],
                unheard_voices=VOICES[split]["unheard"],
                silence=SILENCE if world == "untrimmed" else (0.0, 0.0),
            )
        )
    c.freeze = r"^(encoder|llm)/"
    if "lora" in options:
        c.lora.pattern = "llm/layers/attn/(q|k|v|o)/kernel"
        c.freeze = r"^(encoder|llm)/(?!.*/lora_[ab]$)"
    if "tuned" in options:
        c.freeze = c.freeze.replace("(encoder|llm)/", "(encoder/positions|llm)/")
        c.optim.multipliers = (("^encoder/", 0.1),)
    c.optim.learning_rate = 3e-3
    c.optim.warmup_steps = 30
    c.update_from_flattened_dict(ARMS[arm])
    for key, value in (change.split("=") for change in changes):
        c.update_from_flattened_dict({key: ast.literal_eval(value)})
    return c


def base():
    """The sizes that all recipes share."""
    c = config_lib.default()
    c.encoder.update(embed_dim=96, num_layers=3, num_heads=4, mlp_dim=384, strides=(2, 2, 2))
    c.encoder.max_positions = 100  # 12.5 a second
    c.llm.update(embed_dim=96, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=24, mlp_dim=288)
    c.tokenizer.update(model_type="word", vocab_size=120)
    c.data.max_duration = 8.0
    return c


def human_base():
    """The same for recordings: more positions, pieces of words."""
    c = base()
    c.encoder.update(embed_dim=144, num_layers=4, mlp_dim=576, strides=(2, 2))
    c.encoder.max_positions = 250  # 25 a second
    c.tokenizer.update(model_type="unigram", vocab_size=256)
    c.data.max_duration = 8.0
    c.data.on_bad_audio = "skip"  # what is longer
    return c


def encoder():
    """The recipe of the speech encoder: that of an SLM from scratch, by CTC and cross-entropy, on
    many voices and conditions and words in random order."""
    c = base()
    c.num_steps = 1500
    c.llm.num_layers = 1  # only the encoder is kept
    c.ctc.weight = 1.0
    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 100
    c.data.cache = f"{FOLDER}/data"
    voices = [v for split in VOICES.values() for v in (*split["train"], *split["other"])]
    c.synthetic.update(
        synthetic(
            RANDOM_ORDER,
            (*voices, ("en-gb+m1", 45)),
            num_train=2600,
            num_test=32,
            seed=77,
            conditions={},
            train_conditions={
                "plain": {},
                "fast": {"rate": 1.25},
                "slow": {"rate": 0.85},
                "reverb": {"reverb": 0.3},
                "noise": {"snr": 12.0},
                "silence": {"silence": SILENCE},
            },
        )
    )
    return c


def llm():
    """The recipe of the text LLM, which reads all four domains and words in random order, and
    learns to copy them."""
    c = base()
    c.llm.pretrain.update(num_steps=2000, batch_size=16, num_sentences=12000)
    templates = [template for domain in DOMAINS.values() for template in domain]
    c.synthetic.update(
        synthetic((*templates, *RANDOM_ORDER[:-1]), (), num_train=1, num_test=1, seed=77)
    )
    return c


def human_encoder():
    """The recipe of the speech encoder for recordings: CTC of characters on all their languages."""
    c = human_base()
    c.tokenizer.update(model_type="char", vocab_size=100)
    c.num_steps = 2500
    c.llm.num_layers = 1
    c.ctc.weight = 1.0
    c.optim.warmup_steps = 400
    c.data.num_buckets = 3
    c.data.augment.update(freq_masks=1, freq_width=12, time_masks=1, time_width=15)
    c.data.train = f"{FOLDER}/human/all.jsonl"
    return c


def human_llm():
    """The recipe of the LLM that reads the transcripts of all the languages."""
    c = human_base()
    c.llm.pretrain.update(num_steps=1500, batch_size=16, max_repeat=4)
    c.data.train = f"{FOLDER}/human/all.jsonl"
    return c


def synthetic(templates, train_voices, **keys) -> dict:
    slots = {name: tuple(words) for name, words in SLOTS.items()} | {"word": tuple(WORDS)}
    return {
        "lang": "en",
        "rate": 175,
        "templates": templates,
        "slots": slots,
        "train_voices": train_voices,
        **keys,
    }


PARTS = {
    "encoder": encoder,
    "llm": llm,
    "human-encoder": human_encoder,
    "human-llm": human_llm,
}
