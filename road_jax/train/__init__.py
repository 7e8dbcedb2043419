"""Supervised fine-tuning of RoAd on Hugging Face decoders: `train`, and the ``road-train`` command."""

from road_jax.train._options import TrainOptions as TrainOptions
from road_jax.train._run import TrainResult as TrainResult
from road_jax.train._run import train as train
