"""What theory predicts for a network at initialisation, with no fitted constant."""
