"""Watch a service work: outside in a throwaway view of the host, inside in its jail."""

from .process import Process
from .run import Attach, Identity, Observation, inside, outside
from .view import View

__all__ = ["Attach", "Identity", "Observation", "Process", "View", "inside", "outside"]
