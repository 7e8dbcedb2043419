"""Converts RoAd adapters between Flax and PyTorch, and checks that both compute the same."""

from convert._compose import compose as compose
from convert._convert import to_flax as to_flax
from convert._convert import to_torch as to_torch
from convert._diff import Comparison as Comparison
from convert._diff import diff as diff
from convert._inspect import Summary as Summary
from convert._inspect import inspect as inspect
from convert._many import convert_all as convert_all
from convert._merge import merge as merge
from convert._verify import Verification as Verification
from convert._verify import verify as verify
from road_core import AdapterError as AdapterError
