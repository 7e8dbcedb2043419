"""Decoders in Linen, loaded from Hugging Face checkpoints without torch."""

from road_jax.models._config import DecoderConfig as DecoderConfig
from road_jax.models._decoder import Cache as Cache
from road_jax.models._decoder import Decoder as Decoder
from road_jax.models._load import load as load
from road_jax.models._load import read_config as read_config
from road_jax.models._loss import cross_entropy as cross_entropy
from road_jax.models._mesh import check_mesh as check_mesh
from road_jax.models._mesh import make_mesh as make_mesh
from road_jax.models._mesh import shardings as shardings
