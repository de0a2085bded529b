"""What a private step costs, beside plain training and beside other libraries.

Run as `python -m benchmarks`. Nothing here is installed.
"""

import os

# torch's and XLA's threads share the cores. torch's OpenMP threads by default spin after each
# parallel region, on the very cores that XLA then computes on; so here they sleep. Has to be set
# before torch is imported. Set OMP_WAIT_POLICY=ACTIVE to see what it does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Compile times are of a first compilation, in this process.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
