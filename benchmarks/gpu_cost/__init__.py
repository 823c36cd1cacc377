"""What compaction costs on a GPU, on paper: no device is needed, and none is asked.

    python -m benchmarks.gpu_cost

The code itself runs, on tensors without contents (torch's ``meta`` device), and every operation
that would be launched on a device is counted: its floating-point operations by precision, the bytes
that it has to move, the launch (a call of a library is one, whatever it launches in turn), and each
question to the device for which the host would wait (``counting.py``). What our own kernels do
follows from the arguments that they are launched with (``kernel_costs.py``). Times follow from the
ceilings of a device (``devices.py``).

``tests/benchmarks/test_gpu_cost.py`` holds the counts to what they are today: a change that doubles
the bytes fails there, before any device has seen it.
"""
