"""RoAd on Flax NNX models: `wrap` rotates the outputs of their linear layers, `intervene` those of their blocks."""

from road_jax.nnx._intervene import Intervened as Intervened
from road_jax.nnx._intervene import RoadBlock as RoadBlock
from road_jax.nnx._intervene import get_intervention as get_intervention
from road_jax.nnx._intervene import intervene as intervene
from road_jax.nnx._intervene import set_intervention as set_intervention
from road_jax.nnx._wrap import RoadLayer as RoadLayer
from road_jax.nnx._wrap import RoadParam as RoadParam
from road_jax.nnx._wrap import SavedParam as SavedParam
from road_jax.nnx._wrap import apply as apply
from road_jax.nnx._wrap import get_adapter as get_adapter
from road_jax.nnx._wrap import merge as merge
from road_jax.nnx._wrap import set_adapter as set_adapter
from road_jax.nnx._wrap import unmerge as unmerge
from road_jax.nnx._wrap import unwrap as unwrap
from road_jax.nnx._wrap import wrap as wrap
