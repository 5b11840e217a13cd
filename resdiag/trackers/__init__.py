"""Experiment trackers that a run is sent to: TensorBoard, Weights & Biases, MLflow."""
