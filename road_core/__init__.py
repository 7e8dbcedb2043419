"""What a RoAd adapter is, without a framework: the maths, the config, the record and the files."""

from road_core._adapter import Adapter as Adapter
from road_core._adapter import bfloat16 as bfloat16
from road_core._adapter import to_float32 as to_float32
from road_core._compose import compose as compose
from road_core._config import RoadConfig as RoadConfig
from road_core._errors import AdapterError as AdapterError
from road_core._format import read_flax as read_flax
from road_core._format import read_peft as read_peft
from road_core._format import write_flax as write_flax
from road_core._format import write_peft as write_peft
from road_core._intervention import Intervention as Intervention
from road_core._intervention import InterventionConfig as InterventionConfig
from road_core._intervention import intervene as intervene
from road_core._intervention import position_mask as position_mask
from road_core._intervention import read_intervention as read_intervention
from road_core._intervention import write_intervention as write_intervention
from road_core._reference import check_group_size as check_group_size
from road_core._reference import coefficients as coefficients
from road_core._reference import inverse as inverse
from road_core._reference import merge as merge
from road_core._reference import output_size as output_size
from road_core._reference import parameter_size as parameter_size
from road_core._reference import rotate as rotate
from road_core._reference import subspace_mask as subspace_mask
from road_core._reference import unmerge as unmerge
from road_core._targets import select_modules as select_modules
