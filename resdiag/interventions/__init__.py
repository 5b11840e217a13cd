"""Change one thing about a network and compare: interventions on the variants and on any model."""
