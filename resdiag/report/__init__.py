"""What a study came to: results, their judgement, figures, pages."""
