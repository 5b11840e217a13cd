"""The figures: one kind a module, drawn from runs or from a monitor."""
