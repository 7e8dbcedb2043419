"""RoAd for JAX and Flax: adapt any model functionally, train it through optax, save what PyTorch can load."""

from road_core import AdapterError as AdapterError
from road_core import InterventionConfig as InterventionConfig
from road_core import RoadConfig as RoadConfig
from road_jax import models as models
from road_jax import nnx as nnx
from road_jax._compose import compose as compose
from road_jax._generate import generate as generate
from road_jax._intervene import Intervened as Intervened
from road_jax._intervene import intervene as intervene
from road_jax._intervene import load_intervention as load_intervention
from road_jax._intervene import save_intervention as save_intervention
from road_jax._io import load_adapter as load_adapter
from road_jax._io import save_adapter as save_adapter
from road_jax._layout import Layout as Layout
from road_jax._layout import einsum_layout as einsum_layout
from road_jax._quantize import QuantizedKernel as QuantizedKernel
from road_jax._quantize import dequantize as dequantize
from road_jax._quantize import quantize as quantize
from road_jax._rotate import rotate as rotate
from road_jax._sharding import shardings as shardings
from road_jax._stack import stack_adapters as stack_adapters
from road_jax._transform import Road as Road
from road_jax._transform import transform as transform
