"""What a step of the study on real parts costs, on paper: FLOPs of its matrix products.

    python -m benchmarks.study_real_cost        # prints the table of docs/stages.md

For every loss that aligns, and every one that is added to cross-entropy afterwards, a step is
traced, forward and backward, with SmolLM2-135M, Qwen2.5-1.5B and Qwen2.5-7B (their config.json
alone) behind a frozen encoder whose outputs are kept. Nothing is computed.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import tqdm

from benchmarks import common, study_real
from benchmarks.tables import markdown
from otreg_jax import aot, build, flops, optim, stages, train_step
from otreg_jax.models import encoders

PARTS = {
    "135M": ("whisper-base", "smollm2-135m"),
    "1.5B": ("whisper-large-v3", "qwen2.5-1.5b"),
    "7B": ("whisper-large-v3", "qwen2.5-7b"),
}
ROWS, FRAMES, TOKENS = 8, 500, 24  # utterances a step, five seconds each
CLASSES = 3600  # tokens in use, of CTC
ALIGN = (
    "ctc",
    "otreg0",
    "otreg1",
    "ctc+otreg0",
    "ctc+collapsed0",
    "ctc+window0",
    "ctc+structure0",
    "ctc+layers01",
)
SFT = ("ce+otreg0", "ce+otreg1", "ce+ctc", "ce+kl")


def step_flops(parts: tuple[str, str], arm: str, name: str) -> int:
    """FLOPs of a step of the stage `name` of the arm "align/sft"."""
    encoder, llm = (str(common.SHAPES / part) for part in parts)
    changes = {"encoder.path": encoder, "llm.path": llm, "compute_dtype": "bfloat16"}
    changes["data.num_mels"] = 128 if "large-v3" in encoder else 80
    size = study_real.SIZES["cpu"]._replace(batch=ROWS)
    split = dict.fromkeys(("train", "dev", "test"), "none.jsonl")
    config = study_real.configure(f"read,{arm},1", size, Path("runs"), {"read": split}, changes)
    stage = next(stage for stage in stages.stages_of(config) if stage.name == name)
    slm = aot.modules_of(config, None)
    trained, frozen = build.abstract_params(slm, config)
    if "ctc" in trained:
        frozen |= {"ctc": {"classes": jax.ShapeDtypeStruct((CLASSES,), jnp.int32)}}
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((ROWS, *shape), dtype)
    positions = encoders.output_length(slm.encoder.config, FRAMES)
    batch = {
        "encoded": array(jnp.bfloat16, positions, slm.encoder.config.embed_dim),
        "tokens": array(jnp.int32, TOKENS),
        **{key: array(jnp.int32) for key in ("mel_length", "token_length", "index")},
    }
    optimizer = optim.make_optimizer(stage.config, stage.train)
    state = jax.eval_shape(lambda p: train_step.init_state(p, optimizer), trained)
    schedules = train_step.losses.make_schedules(stage.config, stage.start)

    def step(state, frozen, batch):
        return train_step.train_step(
            state,
            frozen,
            batch,
            slm=slm,
            config=stage.config,
            optimizer=optimizer,
            schedules=schedules,
            train=stage.train,
        )

    return flops.count(step, state, frozen, batch)


def table() -> str:
    """Shares of the step of cross-entropy alone, in percent."""
    steps = [("SFT", "none/ce", "sft")]
    steps += [("align", f"{losses}/ce", "align") for losses in ALIGN]
    steps += [("SFT", f"none/{losses}", "sft") for losses in SFT]
    rows = []
    for stage, arm, name in tqdm.tqdm(steps, unit="step"):
        found = [step_flops(parts, arm, name) for parts in PARTS.values()]
        if not rows:
            whole = found
            rows.append(["TFLOP of a step of `ce`", *(f"{x / 1e12:.2f}" for x in whole)])
        shares = (f"{100 * x / y:.1f} %" for x, y in zip(found, whole, strict=True))
        rows.append([f"{stage} `{arm.split('/')[name == 'sft']}`", *shares])
    return markdown(["step", *PARTS], rows)


if __name__ == "__main__":
    print(table())
