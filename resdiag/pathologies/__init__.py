"""How often the verdict is right: small trainings with a planted fault, and healthy ones."""
