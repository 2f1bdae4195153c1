"""What a user would take instead of RISE, behind the same interface (:mod:`tasks.scoring.methods`)."""
