"""What a run takes, from a config alone: memory, disk, time; and what to change if it is more."""

from autoround_modifier.planning.hardware import Machine, find_machine
from autoround_modifier.planning.plan import Plan, plan
from autoround_modifier.planning.quantities import Phase, Quantity

__all__ = ["Machine", "Phase", "Plan", "Quantity", "find_machine", "plan"]
