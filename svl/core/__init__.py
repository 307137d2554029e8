"""The vocabulary of the framework: what every other package and every method file speaks.

A *strategy* reads statistics and writes a plan; a plan is data; one surgeon executes data. A *selector* says which
tokens of a sample count; a *compensation* computes what is folded into kept weights.

Words have one meaning each: layers are 0-based, `h_i` enters layer i (`h_L` leaves the last one, before the final
norm), `ratio` is the fraction of decoder layers removed, importance is higher for layers to keep.
"""

from svl.core.contract import check_stepwise, checked_patch, checked_plan, checked_weights, extended_patch, fitted_patch
from svl.core.errors import SvlError, did_you_mean, one_of
from svl.core.methods import (
    Compensation,
    HiddenStates,
    LayerRows,
    LayerStep,
    Method,
    RemovalProbe,
    Rescoring,
    SampleStates,
    Strategy,
    TokenSelector,
)
from svl.core.patch import JoinedPart, Patch, TensorChange, Update
from svl.core.plan import ROLES, Plan, layers_to_remove
from svl.core.settings import check_count, check_number, check_targets
from svl.core.stats import Stats, TokenTrace, no_selected_token

__all__ = [
    "ROLES",
    "Compensation",
    "HiddenStates",
    "JoinedPart",
    "LayerRows",
    "LayerStep",
    "Method",
    "Patch",
    "Plan",
    "RemovalProbe",
    "Rescoring",
    "SampleStates",
    "Stats",
    "Strategy",
    "SvlError",
    "TensorChange",
    "TokenSelector",
    "TokenTrace",
    "Update",
    "check_count",
    "check_number",
    "check_stepwise",
    "check_targets",
    "checked_patch",
    "checked_plan",
    "checked_weights",
    "did_you_mean",
    "extended_patch",
    "fitted_patch",
    "layers_to_remove",
    "no_selected_token",
    "one_of",
]
