"""Names of torch functions that are asked for without PyTorch: importing it takes seconds."""

NORMALISATIONS = frozenset(
    {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm"}
)
"""Functions whose output has the scale of their weights, whatever that of their input."""
