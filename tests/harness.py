"""Every check that each operator gets. An operator's test module names its cases; the checks are here.

A case is run on a back end (PyTorch on a CPU variant or on CUDA, the C interface, or the CUDA
kernels emulated on the CPU) in a dtype and a layout, forward and backward, and compared with the
float64 reference on the same rounded inputs. `standard_tests` makes the tests that each loss of rows has.
"""

from backends import *  # noqa: F403
from binding import *  # noqa: F403
from comparison import *  # noqa: F403
from drawing import *  # noqa: F403
from standard import standard_tests  # noqa: F401
